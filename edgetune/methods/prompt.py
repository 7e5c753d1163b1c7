"""Prompt tuning, through PEFT: Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field

from .common.base import rate_factor
from .common.prompt import InitializedOptions, TokenMethod

if TYPE_CHECKING:
    from peft import PeftModel


class PromptTuningOptions(InitializedOptions):
    """Options of prompt tuning, named as in PEFT."""

    init_text: str | None = Field(
        None,
        validation_alias=AliasChoices("init_text", "prompt_tuning_init_text"),
        description="Text that initializes the virtual tokens. null: the first training rows.",
    )
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = Field(
        "TEXT",
        description="Initialization: embeddings of a text, embeddings of random tokens, or random values.",
    )
    learning_rate_factor: float = rate_factor(10.0)


class Prompt(TokenMethod[PromptTuningOptions]):
    """Trained token embeddings before the prompt: use it for the smallest file, if prefix tuning is not needed."""

    options = PromptTuningOptions
    peft_type = "PROMPT_TUNING"

    def peft_settings(self, options: PromptTuningOptions) -> Mapping[str, Any]:
        """Another initialization than TEXT, for which PEFT needs a tokenizer on disk: `initialize` sets the text."""
        return {"prompt_tuning_init": "RANDOM" if options.prompt_tuning_init == "RANDOM" else "SAMPLE_VOCAB"}

    def initialize(self, peft: PeftModel, options: PromptTuningOptions) -> None:
        """Initialize from the embeddings of a text's tokens."""
        from .common.prompt_model import repeated

        if options.prompt_tuning_init == "TEXT" and options.init_tokens:
            embed = peft.get_base_model().get_input_embeddings()
            tokens = repeated(options.init_tokens, options.num_virtual_tokens).to(embed.weight.device)
            peft.prompt_encoder[peft.active_adapter].embedding.weight.data.copy_(embed(tokens)[0])


METHOD = Prompt()

"""Activated LoRA: a LoRA that acts only from its invocation tokens on, such as the beginning of the assistant's turn.

aLoRA: Greenewald et al. 2025, arXiv:2504.12397, through PEFT. What stands before these tokens is computed by the base
alone, so that its keys and values serve every such adapter and a switch in the middle of a conversation costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Folded, LowRank
from edgetune_runtime.errors import UsageError
from edgetune_runtime.states.activation import start_of
from edgetune_runtime.text.chat import render
from pydantic import Field, NonNegativeInt

from .common.base import Checkpoint
from .common.peft import as_names
from .lora import Lora, LoraOptions

if TYPE_CHECKING:
    from edgetune_runtime.engines.base import Tokenizer
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example


class AloraOptions(LoraOptions):
    """Options of LoRA, and from where on it acts."""

    invocation: str | None = Field(
        default=None,
        min_length=1,
        description="The adapter acts from the last place of this text in a prompt on, with the space before it; null "
        "takes what the base's chat template puts before an answer.",
    )
    invocation_tokens: tuple[NonNegativeInt, ...] = Field(
        default=(), description="The same in tokens of the base; taken from invocation when empty."
    )


class Alora(Lora):
    """LoRA that leaves the prompt's keys and values to the base: take it to switch in the middle of a conversation."""

    options = AloraOptions
    peft_type = "LORA"
    takes_encoders = False

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A LoRA with invocation tokens."""
        return config.get("peft_type") == self.peft_type and bool(config.get("alora_invocation_tokens"))

    def shapes(self, options: LoraOptions) -> tuple[str, ...]:
        """A product of low rank with its invocation tokens; a merged model would act before them."""
        return (LowRank.shape,)

    def prepared(self, options: LoraOptions, tokenizer: Tokenizer, rows: Sequence[Example]) -> LoraOptions:
        """With the invocation's tokens; UsageError when a row has nothing to learn behind them."""
        assert isinstance(options, AloraOptions)
        tokens = _tokens(options, tokenizer)
        unfit = sum(not any(row.learned[start_of(row.tokens, tokens) + 1 :]) for row in rows)
        if unfit:
            shown = f"{options.invocation!r}" if options.invocation else f"of tokens {list(tokens)}"
            remedy = "give invocation: a text that every prompt has, with the space before it, or take method lora"
            raise UsageError(f"{unfit} of {len(rows)} rows learn nothing behind the invocation {shown}", remedy)
        return options.model_copy(update={"invocation_tokens": tokens})

    def attach(self, base: PreTrainedModel, options: LoraOptions, steps: int) -> PeftModel:
        """Add LoRA modules in float32 to `base`; UsageError as with lora, and where there is nothing to act from."""
        from .common.activated import gate  # noqa: PLC0415 - torch only when training

        assert isinstance(options, AloraOptions)
        if not options.invocation_tokens or not base.can_generate():
            message = "alora needs invocation tokens, and a base that writes text"
            raise UsageError(message, "give invocation_tokens, or take method lora for an encoder")
        if "lm_head" in as_names(options.target_modules):
            raise UsageError("alora cannot adapt lm_head", "name other target_modules, or take method lora")
        model = super().attach(base, options, steps)
        gate(model)
        return model

    def config(self, base: PreTrainedModel, options: LoraOptions, steps: int) -> LoraConfig:
        """PEFT's configuration."""
        assert isinstance(options, AloraOptions)
        config = super().config(base, options, steps)
        config.alora_invocation_tokens = list(options.invocation_tokens)
        return config

    def objective(self, options: LoraOptions) -> Objective[Any]:
        """The next token, behind the invocation."""
        from .common.activated import ActivatedNextToken  # noqa: PLC0415 - torch only when training

        assert isinstance(options, AloraOptions)
        return ActivatedNextToken(options.invocation_tokens)

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """Read from the folder, with the invocation tokens that it names."""
        return fold_peft(checkpoint.folder, checkpoint.name, self.name)


def _tokens(options: AloraOptions, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens given, or else those of the text."""
    given = options.invocation_tokens
    if given and options.invocation is None:
        return given
    tokens = tuple(tokenizer.tokenize(options.invocation or _before_answer(tokenizer), continues=True))
    if given and given != tokens:
        message = f"invocation_tokens {list(given)} are not those of invocation {options.invocation!r}, {list(tokens)}"
        raise UsageError(message, "give one of both")
    return tokens


def _before_answer(tokenizer: Tokenizer) -> str:
    """What the chat template puts before an answer; UsageError when that is nothing."""

    def rendered(*, add_generation_prompt: bool) -> str:
        template, ends = tokenizer.chat_template, {"bos": tokenizer.bos, "eos": tokenizer.eos}
        messages = [{"role": "user", "content": "a"}]
        return render(template, messages, add_generation_prompt=add_generation_prompt, **ends)

    before, whole = rendered(add_generation_prompt=False), rendered(add_generation_prompt=True)
    if not whole.startswith(before) or whole == before:
        message = "the base's chat template puts no text of its own before an answer"
        raise UsageError(message, "give the method an invocation: a text that every prompt has")
    return whole.removeprefix(before)


METHOD = Alora()

"""Activated LoRA: LoRA that acts from its invocation tokens on, such as those that begin the assistant's turn.

aLoRA: Greenewald et al. 2025, arXiv:2504.12397, through PEFT. The tokens before the invocation are computed by the base
alone. So all such adapters share their keys and values, and a switch in the middle of a conversation costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Folded
from edgetune_export.architectures.base import OUTPUT_LAYER
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.states.activation import start_of
from edgetune_runtime.text.chat import render
from pydantic import Field, NonNegativeInt

from .common.base import Checkpoint
from .common.peft import as_names
from .lora import Lora, LoraOptions

if TYPE_CHECKING:
    from edgetune_export.architectures.shape import SizedModule
    from edgetune_runtime.engines.base import Tokenizer
    from peft import PeftModel
    from transformers import PreTrainedModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example


_REMEDY = "set invocation to a text in every prompt, with the space before it, or use method lora"


class AloraOptions(LoraOptions):
    """Options of LoRA, and the invocation from which on it acts."""

    token_options = ("invocation_tokens",)

    invocation: str | None = Field(
        default=None,
        min_length=1,
        description="The adapter acts from the last occurrence of this text in a prompt on. Include the space before "
        "the text. null: the text that the base's chat template puts before an answer.",
    )
    invocation_tokens: tuple[NonNegativeInt, ...] = Field(
        default=(), description="The invocation as token ids of the base. Empty: the tokens of `invocation`."
    )


class Alora(Lora[AloraOptions]):
    """LoRA that reuses the base's KV cache of the prompt: use it to switch in the middle of a conversation."""

    options = AloraOptions
    peft_type = "LORA"
    takes_encoders = False
    takes_cache = False

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A LoRA with invocation tokens."""
        return config.get("peft_type") == self.peft_type and bool(config.get("alora_invocation_tokens"))

    def shapes(self, options: AloraOptions) -> tuple[str, ...]:
        """Low-rank only; a merged model would act before the invocation tokens too."""
        return ("low_rank",)

    def prepared(self, options: AloraOptions, tokenizer: Tokenizer, rows: Sequence[Example]) -> AloraOptions:
        """The options with the invocation's tokens. Raises UsageError if a row has nothing to learn after them."""
        tokens = _tokens(options, tokenizer)
        unfit = sum(not any(row.learned[start_of(row.tokens, tokens) + 1 :]) for row in rows)
        if unfit:
            text = options.invocation or (None if options.invocation_tokens else _before_answer(tokenizer))
            shown = f"of tokens {list(tokens)}" if text is None else repr(text)
            raise UsageError(f"{unfit} of {len(rows)} rows have nothing to learn after the invocation {shown}", _REMEDY)
        return options.model_copy(update={"invocation_tokens": tokens})

    def check_texts(self, options: AloraOptions, texts: Sequence[str]) -> None:
        """Raise UsageError if the invocation is what the chat template puts before an answer."""
        if texts and options.invocation is None and not options.invocation_tokens:
            message = f"{len(texts)} rows of plain text, such as {texts[0]}, have nothing to learn after the invocation"
            raise UsageError(f"{message}, which by default the chat template puts before an answer", _REMEDY)

    def check(self, options: AloraOptions, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError as lora does, and for the output layer."""
        super().check(options, linear, shapes)
        if OUTPUT_LAYER in as_names(options.target_modules):
            raise UsageError(f"alora cannot adapt {OUTPUT_LAYER}", "use other target_modules, or method lora")

    def attach(self, base: PreTrainedModel, options: AloraOptions, steps: int) -> PeftModel:
        """Add LoRA modules in float32 to `base`. Raises UsageError if there is no invocation."""
        from .common.activated import gate

        if not options.invocation_tokens or not base.can_generate():
            message = "alora needs invocation tokens and a decoder as its base"
            raise UsageError(message, "set invocation_tokens, or use method lora for an encoder")
        model = super().attach(base, options, steps)
        gate(model)
        return model

    def peft_settings(self, options: AloraOptions, steps: int) -> Mapping[str, Any]:
        """The invocation."""
        return {"alora_invocation_tokens": list(options.invocation_tokens)}

    def objective(self, options: AloraOptions) -> Objective[Any]:
        """The next token, after the invocation."""
        from .common.activated import ActivatedNextToken

        return ActivatedNextToken(options.invocation_tokens)

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """Read from the folder, with its invocation tokens. IncompatibleError if the base has no such tokens."""
        folded = fold_peft(checkpoint.folder, checkpoint.name, self.name)
        vocabulary = checkpoint.base.config.get_text_config().vocab_size
        if max(folded.invocation, default=0) >= vocabulary:
            message = (
                f"adapter {folded.name!r} has the invocation token {max(folded.invocation)}, which the vocabulary of "
                f"{vocabulary} tokens lacks, so it would never act"
            )
            raise IncompatibleError(message, "use the base that the adapter was trained on")
        return folded


def _tokens(options: AloraOptions, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The given tokens, or those of the invocation text."""
    chosen = options.invocation_tokens
    if chosen and options.invocation is None:
        return chosen
    tokens = tuple(tokenizer.tokenize(options.invocation or _before_answer(tokenizer), continues=True))
    if chosen and chosen != tokens:
        message = f"invocation_tokens {list(chosen)} are not the tokens of invocation {options.invocation!r}"
        raise UsageError(message, f"set only one of them, or invocation_tokens to {list(tokens)}")
    return tokens


def _before_answer(tokenizer: Tokenizer) -> str:
    """The text that the chat template puts before an answer. Raises UsageError if there is none."""

    def rendered(*, add_generation_prompt: bool) -> str:
        template, bos, eos = tokenizer.chat_template, tokenizer.bos, tokenizer.eos
        messages = [{"role": "user", "content": "a"}]
        return render(template, messages, add_generation_prompt=add_generation_prompt, bos=bos, eos=eos)

    before, whole = rendered(add_generation_prompt=False), rendered(add_generation_prompt=True)
    if not whole.startswith(before) or whole == before:
        message = "the base's chat template adds no text before an answer"
        raise UsageError(message, "set the method's invocation to a text that is in every prompt")
    return whole.removeprefix(before)


METHOD = Alora()

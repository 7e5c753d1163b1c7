"""What methods that learn a prefix or a prompt share: through PEFT, trained on packed rows, folded to a prefix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgetune_export.adapters.shapes import Folded, Prefix
from edgetune_runtime.errors import IncompatibleError, UsageError
from pydantic import Field, NonNegativeInt, PositiveInt

from .base import Checkpoint, Method, MethodOptions
from .peft import array, load_peft, no_grad

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from edgetune_runtime.engines.base import Tokenizer
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from edgetune.objectives.example import Example

    from .prompt_model import PrefixedModel


class PromptOptions(MethodOptions):
    """Options of all methods that learn a prefix or a prompt, by PEFT's names."""

    num_virtual_tokens: PositiveInt = Field(20, description="Positions of the context that the adapter takes.")


class BeginOptions(PromptOptions):
    """Options of those that begin as a text."""

    init_text: str | None = Field(None, description="The text to begin as; without one, the first training rows.")
    init_tokens: tuple[NonNegativeInt, ...] = Field(
        (), description="Token ids to begin as, repeated as far as needed; a build makes them of the text."
    )


P = TypeVar("P", bound=PromptOptions)


class PromptMethod(Method[P]):
    """A method that puts trained positions in front of every sequence; the base's weights stay as they are."""

    def shapes(self, options: P) -> tuple[str, ...]:
        """A prefix, exactly."""
        return ("prefix",)

    def prefix_tokens(self, options: P) -> int:
        """The virtual tokens."""
        return options.num_virtual_tokens

    @abstractmethod
    def config(self, base: PreTrainedModel, options: P) -> PeftConfig:
        """PEFT's configuration."""

    @abstractmethod
    def behind(self, peft: PeftModel) -> PrefixedModel:
        """The base behind the trained positions, as packed rows ask for."""

    @abstractmethod
    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, key/value heads, tokens, head size] of what PEFT saved [tokens, width]."""

    def prepared(self, options: P, tokenizer: Tokenizer, rows: Sequence[Example]) -> P:
        """With the tokens to begin as."""
        if not isinstance(options, BeginOptions) or options.init_tokens:
            return options
        of_rows = chain.from_iterable(row.tokens for row in rows)
        tokens = tokenizer.tokenize(options.init_text) if options.init_text else of_rows
        return options.model_copy(update={"init_tokens": tuple(islice(tokens, options.num_virtual_tokens))})

    def begin(self, peft: PeftModel, options: P) -> None:
        """Set the first values of what is trained, where PEFT's own are not wanted."""

    def attach(self, base: PreTrainedModel, options: P, steps: int) -> PrefixedModel:
        """The base behind trainable positions, in float32; UsageError when it has no room for them."""
        from peft import get_peft_model  # noqa: PLC0415 - torch only when training

        room = base.config.max_position_embeddings
        if options.num_virtual_tokens >= room:
            message = f"num_virtual_tokens {options.num_virtual_tokens} fills the base's {room} positions"
            raise UsageError(message, f"give fewer than {room}")
        peft = get_peft_model(base, self.config(base, options))
        self.begin(peft, options)
        return self.behind(peft)

    def save(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - PEFT carries no types
        """Write PEFT's folder; of an encoder that makes the positions, it holds what comes out."""
        model.eval()
        model.peft.save_pretrained(str(folder), save_embedding_layers=False)

    def detach(self, model: torch.nn.Module) -> None:
        """PEFT puts these around the base and changes nothing in it, so there is nothing to take off."""

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[torch.nn.Module]:
        """PEFT's own model of the folder, on the base."""
        from .prompt_model import GivenTokensModel  # noqa: PLC0415 - torch only when exporting

        yield GivenTokensModel(_unscaled(checkpoint))

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The keys and values of the trained positions."""
        peft = _unscaled(checkpoint)
        with no_grad():
            keys, values = self.states(checkpoint.base, peft.prompt_encoder[peft.active_adapter].embedding.weight)
        return Prefix(checkpoint.name, self.name, array(keys), array(values))


class CacheMethod(PromptMethod[P]):
    """A method whose positions are keys and values of every layer."""

    def behind(self, peft: PeftModel) -> PrefixedModel:
        """Behind a cache of them."""
        from .prompt_model import CachePrefixedModel  # noqa: PLC0415 - torch only when training

        return CachePrefixedModel(peft)

    def begin_as(self, peft: PeftModel, tokens: Sequence[int], length: int) -> None:
        """Begin as the base's states of the tokens, which are repeated as far as needed; of none, as random ones."""
        from .prompt_model import join_states, random_tokens, repeated, states_of  # noqa: PLC0415 - torch only when training

        base = peft.get_base_model()
        states = states_of(base, input_ids=repeated(tokens or random_tokens(base, length), length).to(base.device))
        peft.prompt_encoder[peft.active_adapter].load_prompt_embeddings(join_states(states))

    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that were trained."""
        from .prompt_model import split_states  # noqa: PLC0415 - torch only when exporting

        return split_states(saved, base.config)


class TokenMethod(PromptMethod[P]):
    """A method whose positions are soft tokens: vectors where a token's embedding would be."""

    def behind(self, peft: PeftModel) -> PrefixedModel:
        """Behind the soft tokens."""
        from .prompt_model import TokenPrefixedModel  # noqa: PLC0415 - torch only when training

        return TokenPrefixedModel(peft)

    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that the soft tokens produce in the base."""
        from .prompt_model import states_of  # noqa: PLC0415 - torch only when exporting

        return states_of(base, inputs_embeds=saved[None].to(base.dtype))


def _unscaled(checkpoint: Checkpoint) -> PeftModel:
    """PEFT's model of the checkpoint; IncompatibleError when that is to count more or less than once."""
    if checkpoint.scale != 1.0:
        message = f"{checkpoint.name} has the scale {checkpoint.scale}, but a prefix is there or not"
        raise IncompatibleError(message, "leave scale out")
    return load_peft(checkpoint)

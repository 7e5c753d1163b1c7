"""Base classes of the methods that train virtual tokens through PEFT: trained on packed rows, folded to a prefix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgetune_export.adapters.shapes import Folded, Prefix
from edgetune_runtime.errors import IncompatibleError
from pydantic import Field, NonNegativeInt, PositiveInt

from .base import Checkpoint, Method, MethodOptions, TrainedModules
from .peft import array, load_peft, no_grad, peft_config, save_peft

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from edgetune_runtime.engines.base import Tokenizer
    from peft import PeftModel
    from transformers import PreTrainedModel

    from edgetune.objectives.example import Example

    from .prompt_model import PrefixedModel


class PromptOptions(MethodOptions):
    """Options of all methods that train virtual tokens, named as in PEFT."""

    num_virtual_tokens: PositiveInt = Field(20, description="Number of virtual tokens, which use up context.")


class InitializedOptions(PromptOptions):
    """Options of the methods that are initialized from a text."""

    token_options = ("init_tokens",)

    init_text: str | None = Field(
        None, description="Text that initializes the virtual tokens. null: the first training rows."
    )
    init_tokens: tuple[NonNegativeInt, ...] = Field(
        (), description="Token ids that initialize the virtual tokens, repeated as needed. Empty: those of the text."
    )


P = TypeVar("P", bound=PromptOptions)


class PromptMethod(Method[P]):
    """A method that puts trained virtual tokens before every sequence; the base's weights do not change."""

    takes_cache = False
    takes_recurrent_layers = False

    def shapes(self, options: P) -> tuple[str, ...]:
        """A prefix, which is exact."""
        return ("prefix",)

    def prefix_tokens(self, options: P) -> int:
        """The number of virtual tokens."""
        return options.num_virtual_tokens

    def peft_settings(self, options: P) -> Mapping[str, Any]:
        """PEFT's settings that are not options with the same name."""
        return {}

    @abstractmethod
    def prefixed(self, peft: PeftModel) -> PrefixedModel:
        """The base with the virtual tokens, for packed rows."""

    @abstractmethod
    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, key/value heads, tokens, head size] from what PEFT saved [tokens, width]."""

    def prepared(self, options: P, tokenizer: Tokenizer, rows: Sequence[Example]) -> P:
        """The options with the tokens for the initialization."""
        if not isinstance(options, InitializedOptions) or options.init_tokens:
            return options
        of_rows = chain.from_iterable(row.tokens for row in rows)
        tokens = tokenizer.tokenize(options.init_text) if options.init_text else of_rows
        return options.model_copy(update={"init_tokens": tuple(islice(tokens, options.num_virtual_tokens))})

    def initialize(self, peft: PeftModel, options: P) -> None:
        """Set initial values other than PEFT's."""

    def attach(self, base: PreTrainedModel, options: P, steps: int) -> PrefixedModel:
        """The base with trainable virtual tokens in float32."""
        from peft import get_peft_model

        peft = get_peft_model(base, peft_config(self.peft_type, base, options, self.peft_settings(options)))
        self.initialize(peft, options)
        return self.prefixed(peft)

    def save(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - PEFT carries no types
        """Write PEFT's folder; if a network generates the virtual tokens, only its output is saved."""
        model.eval()
        save_peft(model.peft, folder)

    def detach(self, model: torch.nn.Module) -> None:
        """Does nothing, because PEFT wraps the base and does not change it."""

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[torch.nn.Module]:
        """PEFT's model of the checkpoint on the base."""
        from .prompt_model import GivenTokensModel

        yield GivenTokensModel(_unscaled(checkpoint))

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The keys and values of the virtual tokens."""
        peft = _unscaled(checkpoint)
        with no_grad():
            keys, values = self.states(checkpoint.base, peft.prompt_encoder[peft.active_adapter].embedding.weight)
        return Prefix(checkpoint.name, self.name, array(keys), array(values))


class CacheMethod(PromptMethod[P]):
    """A method that trains the keys and values of every layer."""

    def trained_parameters(self, trained: TrainedModules, options: P) -> int:
        """The keys and values of each virtual token."""
        return options.num_virtual_tokens * trained.base.kv_values_per_token

    def prefixed(self, peft: PeftModel) -> PrefixedModel:
        """The base with these keys and values as its cache."""
        from .prompt_model import CachePrefixedModel

        return CachePrefixedModel(peft)

    def initialize_from(self, peft: PeftModel, tokens: Sequence[int], length: int) -> None:
        """Initialize from the base's KV cache of `tokens`, repeated as needed; of random tokens if empty."""
        from .prompt_model import join_states, random_tokens, repeated, states_of

        base = peft.get_base_model()
        states = states_of(base, input_ids=repeated(tokens or random_tokens(base, length), length).to(base.device))
        peft.prompt_encoder[peft.active_adapter].load_prompt_embeddings(join_states(states))

    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The trained keys and values."""
        from .prompt_model import split_states

        return split_states(saved, base.config)


class TokenMethod(PromptMethod[P]):
    """A method that trains the embeddings of the virtual tokens."""

    def trained_parameters(self, trained: TrainedModules, options: P) -> int:
        """An embedding per virtual token."""
        return options.num_virtual_tokens * trained.base.hidden

    def prefixed(self, peft: PeftModel) -> PrefixedModel:
        """The base with these embeddings before the sequence."""
        from .prompt_model import TokenPrefixedModel

        return TokenPrefixedModel(peft)

    def states(self, base: PreTrainedModel, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that the base computes from the embeddings."""
        from .prompt_model import states_of

        return states_of(base, inputs_embeds=saved[None].to(base.dtype))


def _unscaled(checkpoint: Checkpoint) -> PeftModel:
    """PEFT's model of the checkpoint. Raises IncompatibleError for a scale other than 1."""
    if checkpoint.scale != 1.0:
        message = f"{checkpoint.name} has scale {checkpoint.scale}, but a prefix cannot be scaled"
        raise IncompatibleError(message, "remove scale")
    return load_peft(checkpoint)

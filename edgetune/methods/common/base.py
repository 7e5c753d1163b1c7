"""The interface of a method: its options, its shapes, how it changes a base for training, and how it is folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from pydantic import ConfigDict, Field, create_model

from edgetune.common.section import Section

if TYPE_CHECKING:
    import torch
    from edgetune_export.adapters.shapes import Folded
    from edgetune_export.architectures.shape import BaseShape, SizedModule
    from edgetune_runtime.engines.base import Tokenizer
    from transformers import PreTrainedModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example


P = TypeVar("P", bound="MethodOptions")


def rate_factor(default: float, note: str = "") -> Any:  # noqa: ANN401 - as pydantic types a field
    """The field `learning_rate_factor` with a method's default."""
    text = f"The method's learning rate as a multiple of training.learning_rate{note}."
    return Field(default=default, gt=0, description=text)


class MethodOptions(Section):
    """Base class of all method options; fields are accepted by name or alias."""

    model_config = ConfigDict(populate_by_name=True)

    learning_rate_factor: float = rate_factor(1.0)
    token_options: ClassVar[tuple[str, ...]] = ()
    """Options with token ids, which are other texts on a base with another tokenizer."""

    def without_tokens(self) -> Self:
        """The options without token ids, which a build then finds for its base."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.token_options})


def with_defaults(options: type[P], **defaults: object) -> type[P]:
    """The options with other defaults."""
    fields = {name: copy(options.model_fields[name]) for name in defaults}
    for name, default in defaults.items():
        fields[name].default = default
    types: dict[str, Any] = {name: (field.annotation, field) for name, field in fields.items()}
    return create_model(options.__name__, __base__=options, __doc__=options.__doc__, **types)


O = TypeVar("O", bound=MethodOptions)  # noqa: E741 - the options of one method


@dataclass(frozen=True)
class Checkpoint:
    """A trained checkpoint in `folder` and its base, in float32; `scale` is the scale of the adapter."""

    name: str
    folder: Path
    base: PreTrainedModel
    options: MethodOptions
    scale: float = 1.0


@dataclass(frozen=True)
class TrainedModules:
    """The linear modules of `base` that keep their inputs in training, each with the highest rank that it ships."""

    base: BaseShape
    modules: Sequence[SizedModule]
    ranks: Sequence[int]

    @property
    def rank_by_module(self) -> list[tuple[SizedModule, int]]:
        """Each module with its rank."""
        return [*zip(self.modules, self.ranks, strict=True)]

    @property
    def low_rank_values(self) -> int:
        """Numbers in the low-rank factors of all modules."""
        return sum(rank * module.values_per_rank for module, rank in self.rank_by_module)


class Method(ABC, Generic[O]):
    """A tuning method. The first line of a subclass's docstring says what it does and when to use it, and is printed by
    `edgetune methods`. The module cites the paper.

    `peft_type`: the type that PEFT writes into adapter_config.json; folders from elsewhere with this type belong to the
    class that sets it, and not to its subclasses. `trains_base`: training changes the base's own
    weights, which are float32 then, so the base cannot be used again. `takes_scale`: the adapter can be scaled.
    `trains_on_grid`: merged models can be trained through the rounding to the base's grid (`training.rounding`).
    `takes_start`: training can start from a saved adapter.
    `takes_encoders`: the method can tune encoders. `takes_recurrent_layers`: it can tune bases in which layers have a
    recurrent state in place of attention. `takes_cache`: the model of `loaded` takes transformers' KV cache.
    `adds_parameters`: what it trains is not part of the base.
    `variant`: the name of a method that is another one with other defaults, in the file of that one.
    """

    options: ClassVar[type[MethodOptions]]
    trains_base: ClassVar[bool] = False
    peft_type: ClassVar[str] = ""
    takes_scale: ClassVar[bool] = False
    trains_on_grid: ClassVar[bool] = False
    takes_start: ClassVar[bool] = False
    takes_encoders: ClassVar[bool] = False
    takes_recurrent_layers: ClassVar[bool] = True
    takes_cache: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = True
    variant: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The method's name, which is the name of its file unless it is a variant."""
        return self.variant or type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def shapes(self, options: O) -> tuple[str, ...]:
        """The shapes it can be folded into, best first."""

    @abstractmethod
    def trained_parameters(self, trained: TrainedModules, options: O) -> int:
        """How many parameters training changes, exactly; with modules still to be chosen, the most."""

    def check(self, options: O, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Check the options against the linear modules of a base and the shapes to fold to, before any training.

        Raises UsageError or IncompatibleError if they do not fit, for example if the base lacks target modules.
        """

    @abstractmethod
    def attach(self, base: PreTrainedModel, options: O, steps: int) -> torch.nn.Module:
        """Add the method's trainable parts to `base`, in place, for a training of `steps` steps, and freeze the rest.

        The result is called with packed sequences (see `objectives.NextToken.loss`). Expects options that `check`
        accepts.
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the trained parameters into `folder`."""

    @abstractmethod
    def detach(self, model: torch.nn.Module) -> None:
        """Restore the base, unless the method trains the base itself."""

    @abstractmethod
    def loaded(self, checkpoint: Checkpoint) -> AbstractContextManager[torch.nn.Module]:
        """A context with the trained model in torch, at its scale; `model(input_ids=…).logits` [1, tokens, vocabulary]
        are the logits of the given tokens. The base is restored afterwards."""

    @abstractmethod
    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The trained adapter in one of its shapes. The scale is applied to merged models only."""

    def prepared(self, options: O, tokenizer: Tokenizer, rows: Sequence[Example]) -> O:
        """The options, completed with what depends on the tokenizer or the rows, such as initial tokens.

        `rows` are the training rows, then the validation rows. Raises UsageError if the method cannot learn from them.
        """
        return options

    def check_files(self, options: O) -> None:
        """Raise NotFoundError or UsageError for a file of the options that cannot be read."""

    def check_texts(self, options: O, texts: Sequence[str]) -> None:
        """Raise UsageError if the method cannot learn from rows of plain text; `texts` is where these are."""

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """Whether this method loads a folder with this adapter_config.json, which may come from elsewhere."""
        return "peft_type" in vars(type(self)) and config.get("peft_type") == self.peft_type

    def objective(self, options: O) -> Objective[Any]:
        """The objective of training."""
        from edgetune.objectives.next_token import NEXT_TOKEN

        return NEXT_TOKEN

    def prefix_tokens(self, options: O) -> int:
        """Number of context positions that the adapter uses."""
        return 0

    def trained_modules(self, base: BaseShape, options: O) -> list[SizedModule]:
        """The linear modules that keep their inputs in training, because what is trained reads them."""
        return []

    def trained(self, base: BaseShape, options: O) -> TrainedModules:
        """The trained modules with their ranks."""
        modules = self.trained_modules(base, options)
        return TrainedModules(base, modules, self.shipped_ranks(modules, options))

    def trained_layers(self, base: BaseShape, options: O) -> int:
        """Number of last layers that gradients reach; the layers before them keep nothing in training."""
        return base.layers

    def shipped_ranks(self, modules: Sequence[SizedModule], options: O) -> list[int]:
        """The highest rank that each module can have after folding to low_rank."""
        return [self.shipped_rank(options)] * len(modules)

    def shipped_rank(self, options: O) -> int:
        """The highest rank after folding; 0 for shapes other than low_rank."""
        return 0

    def guesses_rank(self, options: O) -> bool:
        """Whether the rank after folding depends on the trained change."""
        return False

    def parameter_groups(self, model: torch.nn.Module, options: O, learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups with their learning rates."""
        rate = learning_rate * options.learning_rate_factor
        return [{"params": [p for _, p in trainable(model)], "lr": rate}]

    def check_start(self, folder: Path, options: O) -> None:
        """Raise IncompatibleError if the adapter in a folder saved by PEFT has other options, NotFoundError if there is
        none, and VerificationError if its file is damaged."""
        raise NotImplementedError

    def start_from(self, model: torch.nn.Module, folder: Path, options: O) -> None:
        """Give an attached model the weights in a folder saved by PEFT, if the method takes a start.

        Raises what `check_start`, `check_peft_folder` and `fold_peft` raise, and IncompatibleError for other modules or
        sizes.
        """
        raise NotImplementedError

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | float:
        """A term added to a step's mean loss."""
        return 0.0

    def settled_step(self, options: O, steps: int) -> int:
        """The number of steps, of `steps` in all, after which the method's own schedule, if any, has ended."""
        return 0

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Called after each optimizer `step` (from 0), before the gradients are cleared."""

    def state(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """State that resuming needs besides the trainable parameters; tensors and plain values."""
        return {}

    def restore(self, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


def dense_parameters(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with a bias."""
    return (inputs + 1) * outputs


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The trainable parameters with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

"""What a method is: its options, the shapes it can take, how it changes a base to be trained, and how it is folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from edgetune_export.adapters.shapes import Folded
    from edgetune_runtime.engines.base import Tokenizer
    from transformers import PreTrainedModel

    from edgetune.objectives.base import Objective
    from edgetune.objectives.example import Example


def rate_factor(default: float, note: str = "") -> Any:  # noqa: ANN401 - as pydantic types a field
    """The field `learning_rate_factor` of a method's options."""
    text = f"The method's learning rate as a multiple of training.learning_rate{note}."
    return Field(default=default, gt=0, description=text)


class MethodOptions(BaseModel):
    """Base of all options of methods: frozen, unknown keys refused, a field's name or its alias accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    learning_rate_factor: float = rate_factor(1.0)


O = TypeVar("O", bound=MethodOptions)  # noqa: E741 - the options of one method


@dataclass(frozen=True)
class Checkpoint:
    """What a training left in `folder`, and the base that it belongs to, in float32; `scale` is the adapter's."""

    name: str
    folder: Path
    base: PreTrainedModel
    options: MethodOptions
    scale: float = 1.0


class Method(ABC, Generic[O]):
    """One way of tuning. The class's docstring says in its first line what it does; the module cites the paper.

    `peft_type` is what PEFT calls it in the folders that it saves. `trains_base` says that training changes the base's
    own weights, which are then float32 and of no use afterwards; `takes_scale` that a factor on what was trained means
    something, and `takes_encoders` that it tunes encoders too.
    """

    options: ClassVar[type[MethodOptions]]
    trains_base: ClassVar[bool] = False
    peft_type: ClassVar[str] = ""
    takes_scale: ClassVar[bool] = False
    takes_encoders: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The method's name, which is that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def shapes(self, options: O) -> tuple[str, ...]:
        """What it can be folded into, the best first."""

    @abstractmethod
    def attach(self, base: PreTrainedModel, options: O, steps: int) -> torch.nn.Module:
        """The base with the method's trainable parts, in place, for a training of so many steps; all else is frozen.

        It is called as a packed sequence asks for (see `objectives.NextToken.loss`). Raises UsageError when the options
        do not fit the base, such as target modules that it lacks.
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write what was trained into `folder`."""

    @abstractmethod
    def detach(self, model: torch.nn.Module) -> None:
        """Give the base back as it was, unless the method trains the base itself."""

    @abstractmethod
    def loaded(self, checkpoint: Checkpoint) -> AbstractContextManager[torch.nn.Module]:
        """What was trained as torch runs it, times its scale; `model(input_ids=…).logits` [1, tokens, vocabulary] are
        those of the given tokens. The base is as it was afterwards."""

    @abstractmethod
    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """What was trained in the given one of its shapes. A scale goes into a merged model; else it stays outside."""

    def prepared(self, options: O, tokenizer: Tokenizer, rows: Sequence[Example]) -> O:
        """The options with what a training takes from texts or its rows, in tokens of the base, filled in.

        `rows` are those of training, then of validation. UsageError when the method cannot learn from them.
        """
        return options

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this adapter_config.json, which may be foreign, is to be loaded by the method."""
        return config.get("peft_type") == self.peft_type and self.peft_type != ""

    def objective(self, options: O) -> Objective[Any]:
        """What a training learns from its rows."""
        from edgetune.objectives.next_token import NEXT_TOKEN  # noqa: PLC0415 - torch only when training

        return NEXT_TOKEN

    def prefix_tokens(self, options: O) -> int:
        """Positions of the context that the adapter takes."""
        return 0

    def shipped_rank(self, options: O) -> int:
        """The highest rank of the product that it is folded into, to predict sizes by; 0 for other shapes."""
        return 0

    def parameter_groups(self, model: torch.nn.Module, options: O, learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups of trainable parameters with their learning rates."""
        rate = learning_rate * options.learning_rate_factor
        return [{"params": [p for _, p in trainable(model)], "lr": rate}]

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | float:
        """What is added to a step's mean loss."""
        return 0.0

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Called after the optimizer's `step` (from 0), while the gradients are still there."""

    def state(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """What a killed training needs besides the trainable parameters to go on; tensors and plain values."""
        return {}

    def restore(self, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that training changes."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

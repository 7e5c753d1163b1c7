"""What a method is: its options, the shapes it folds into, and how it turns a base into a trainable model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Options(BaseModel):
    """Base of all options of methods: frozen, unknown keys refused, a field's name or its alias accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Method(Protocol):
    """One way of tuning. `shapes` lists what it can be folded into at export, the best first."""

    options: type[Options]
    shapes: Sequence[str]

    def attach(self, base: PreTrainedModel, options: Any) -> PeftModel:  # noqa: ANN401 - its own class
        """Add the method's trainable parts to `base`, in place; all other parameters are frozen.

        Raises UsageError when the options do not fit the base, such as target modules that it lacks.
        """
        ...

    def parameter_groups(
        self,
        model: PeftModel,
        options: Any,  # noqa: ANN401 - its own class
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """The optimizer's groups of trainable parameters with their learning rates."""
        ...


def trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that training changes."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

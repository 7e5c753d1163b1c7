"""Fine-tuning of the last layers only, through transformers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgetune_runtime.errors import UsageError
from pydantic import Field, PositiveInt

from .common.base import MethodOptions, TrainedModules, rate_factor
from .full import OwnWeights

if TYPE_CHECKING:
    from edgetune_export.architectures.shape import BaseShape
    from transformers import PreTrainedModel

_LAYER = re.compile(r"layers\.(\d+)\.")
_LAST_NORMS = ("model.norm.weight", "model.embedding_norm.weight")


class LastLayersOptions(MethodOptions):
    """Options of fine-tuning the last layers."""

    layers: PositiveInt = Field(4, description="Number of last layers to train; the final norm is trained too.")
    learning_rate_factor: float = rate_factor(0.1)


class LastLayers(OwnWeights[LastLayersOptions]):
    """The last layers are trained: use it instead of full fine-tuning when training memory is short."""

    options = LastLayersOptions

    def trained_layers(self, base: BaseShape, options: LastLayersOptions) -> int:
        """The last layers; UsageError if the base has fewer."""
        return _checked(options, base.layers)

    def trained_parameters(self, trained: TrainedModules, options: LastLayersOptions) -> int:
        """Those of the last layers and the final norm."""
        base = trained.base
        return sum(base.parameters_by_layer[-self.trained_layers(base, options) :]) + base.hidden

    def chosen(self, base: PreTrainedModel, options: LastLayersOptions) -> set[str]:
        """The parameters of the last layers and of the final norm."""
        count = base.config.num_hidden_layers
        first = count - _checked(options, count)
        names = {name for name, _ in base.named_parameters()}
        layers = {name for name in names if (match := _LAYER.search(name)) and int(match[1]) >= first}
        return layers | {name for name in names if name.endswith(_LAST_NORMS)}


def _checked(options: LastLayersOptions, count: int) -> int:
    if options.layers > count:
        raise UsageError(f"layers is {options.layers}, but the base has {count}", f"set layers to {count} or fewer")
    return options.layers


METHOD = LastLayers()

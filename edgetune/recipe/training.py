"""The options of training: those of the recipe, and those of one adapter or the domain that override them.

The text under a field describes its key. The JSON schema and docs/recipe.md are generated from these texts.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from .output import AUTO
from .part import RecipePart
from .problems import shown

# After few rows, the loss of answers rises while more of them become right, as the learning rate falls to 0.
TO_THE_END = {"patience": None, "checkpoint": "last"}
"""What `auto` chooses for answers, unless the recipe sets it."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?|mps")


def _check_device(key: str) -> str:
    if not _DEVICE.fullmatch(key):
        raise ValueError(f"{key!r} is not a device; use auto, cpu, cuda, cuda:N (N from 0) or mps")
    return key


DeviceKey = Annotated[
    str, AfterValidator(_check_device), Field(json_schema_extra={"pattern": f"^({_DEVICE.pattern})$"})
]


class TrainingSpec(RecipePart):
    """Training options. At the top of a recipe they apply to all adapters, under an adapter to that one.

    `training: auto` is short for `training: {auto: true}`.
    """

    auto: bool = False
    """Choose the options that the recipe does not set by the number of training rows and the width of the base
    (docs/how-to/few-rows.md)."""
    epochs: float = Field(default=3.0, gt=0, le=100_000)
    """Passes over the training rows; may be a fraction."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps, even before the last epoch ends."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate, reached at the end of the warmup."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed for the held-out split, the order of the rows and the adapter's initial weights."""
    evals: PositiveInt = 8
    """Validation passes per training run; there is at least one per epoch."""
    patience: PositiveInt | None = 3
    """Early stopping: stop after this many validation passes without a lower loss. null: train to the end."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint that ships. best: that with the lowest validation loss. last: that of the last step, whose answers
    are more often right after many passes over few rows, although the loss may have risen."""
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    """Number format of the base's weights in training. auto: bf16 if the hardware computes it fast, otherwise fp32.
    int8: 1.2 to 1.6 times as fast as fp32 on x86 CPUs without bf16 arithmetic, but with a higher loss, because products
    with frozen weights are rounded; it uses 6 bytes per weight instead of 4, and validation stays in fp32."""
    device: DeviceKey = "auto"
    """Device for training (docs/how-to/gpu.md): auto (the first GPU that torch finds, otherwise the CPU), cpu, cuda (an
    NVIDIA or AMD GPU), cuda:1 (the second one), or mps (Apple silicon). One for all trainings of a build."""
    memory_mb: PositiveInt | None = None
    """Memory limit of the training process in MB; on a GPU, the limit of GPU memory. null: all free memory. Forward
    passes are made small enough for the limit, with activation checkpointing if a single row does not fit; the result
    is the same."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str) and value != AUTO:
            raise ValueError(f"{shown(value)} is not a mapping of options; write one, or auto")
        return {"auto": True} if value == AUTO else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": AUTO}, handler(core)]}

    @model_serializer(mode="wrap")
    def _values(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """All values; as JSON for keys and manifests, without those that depend on the machine: another can resume."""
        values: dict[str, Any] = dump(self)
        if info.mode == "json":
            for key in ("device", "memory_mb"):
                values.pop(key, None)
            if not self.auto:
                values.pop("auto", None)
        return values

    @property
    def ignores_validation(self) -> bool:
        """Whether validation rows choose nothing: all steps are taken, and the last checkpoint ships."""
        left = {key: value for key, value in TO_THE_END.items() if self.auto and key not in self.model_fields_set}
        return {key: left.get(key, getattr(self, key)) for key in TO_THE_END} == TO_THE_END

    def under(self, overrides: TrainingSpec) -> TrainingSpec:
        """These options, overridden by those that are set in `overrides`."""
        return self.model_copy(update={name: getattr(overrides, name) for name in overrides.model_fields_set})


def _set_values(training: TrainingSpec, info: SerializationInfo) -> dict[str, Any]:
    # A plan sets all options of an adapter if it chooses some; only the recipe can have the device.
    return training.model_dump(mode=info.mode, exclude_unset=True, exclude={"device"})


def _without_device(training: TrainingSpec) -> TrainingSpec:
    if "device" in training.model_fields_set:
        raise ValueError("device is one for all trainings of a build; set it under training at the top of the recipe")
    return training


OwnTraining = Annotated[TrainingSpec, AfterValidator(_without_device), PlainSerializer(_set_values)]
"""Training options that override those of the recipe; unset ones stay unset."""

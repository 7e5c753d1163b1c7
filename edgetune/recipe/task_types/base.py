"""The facts of a task: what its recipes can contain, and which commands do not support it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgetune_runtime.errors import UsageError

Feature = Literal["compare", "fit", "imatrix", "label_estimate", "trial"]
"""Commands that not all tasks support: those of the same names, `devices fit`, `data check --minutes` and `plan
--trial`."""


@dataclass(frozen=True)
class Refusal:
    """Why a command does not work, as the end of a sentence, and the remedy."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class TaskType:
    """A task's facts.

    `base` is what errors call its bases; `has_encoders`: they are encoders. `metric` is the metric of all its adapters;
    None: chosen by the rows. `refused_keys` maps recipe keys that do not work to the error, `refused_weights` does so
    for values of `onnx.weights`, and `refused_adapter_keys` for keys of an adapter; `{value}` in an error is the value.
    `not_offered` maps commands that do not work to the error. `runtime_extras` are the extras of edgetune-runtime that
    its bundles need besides those of the engine and the server. `added_tokens` is a high estimate of what the tokenizer
    or a chat template adds to the texts of a row.
    """

    base: str = "a decoder"
    has_encoders: bool = False
    metric: Literal["label"] | None = None
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    refused_weights: Mapping[str, str] = field(default_factory=dict)
    refused_adapter_keys: Mapping[str, str] = field(default_factory=dict)
    not_offered: Mapping[Feature, Refusal] = field(default_factory=dict)
    runtime_extras: tuple[str, ...] = ()
    added_tokens: int = 32

    def offers(self, feature: Feature) -> bool:
        """Whether the task supports a command."""
        return feature not in self.not_offered

    def check_offers(self, feature: Feature, subject: object) -> None:
        """Raise UsageError, whose message starts with `subject`, if the task does not support a command."""
        if feature in self.not_offered:
            refusal = self.not_offered[feature]
            raise UsageError(f"{subject} {refusal.reason}", refusal.remedy)

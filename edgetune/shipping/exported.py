"""The types of an export: what is wanted, was trained and was written, and the parity found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgetune_export import backends
from edgetune_export.backends.base import OnnxOptions
from edgetune_runtime.decoding.drafts import DraftTable
from edgetune_runtime.decoding.output import OutputSpec

from edgetune import methods
from edgetune.data import TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Figures = Mapping[str, float]
"""Parity by figure, such as `kl` and `top1`, as in the manifest."""


class BuildBase(Protocol):
    """What all bases of builds have in common."""

    @property
    def name(self) -> str:
        """Its name in the recipe."""

    @property
    def path(self) -> Path:
        """The file with its weights."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of that file."""


@dataclass(frozen=True)
class BundleSpec:
    """The bundle to write: its name, its defaults, its formats, and the recipe that it stores."""

    name: str
    context_length: int
    threads: int | None = None
    targets: tuple[str, ...] = (backends.DEFAULT,)
    onnx: OnnxOptions = field(default_factory=OnnxOptions)
    merged_quantization: str | None = None
    ships_states: bool = False
    warms: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter to export.

    `folder` is what `method` wrote. `probes` are token rows for the parity check; the first of them, up to their
    `prompt_lengths`, are also answered. `texts` are texts of the task for comparing tokenizers. `output` constrains the
    adapter's answers, and `draft` is its draft table. The golden answer is to one of `golden_rows`.
    """

    name: str
    folder: Path
    method: str
    options: methods.MethodOptions
    probes: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int] = ()
    scale: float = 1.0
    system: str | None = None
    metric: str = "exact"
    labels: tuple[str, ...] = ()
    merged: bool = False
    dtypes: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[str] = ()
    output: OutputSpec | None = None
    draft: DraftTable | None = None
    golden_rows: Sequence[TaskRow] = ()

    def dtype_in(self, target: str) -> str:
        """The data type of the adapter's file in a format, by default the format's default."""
        return self.dtypes.get(target, backends.format_of(target).adapter_dtypes[0])

    def checkpoint(self, base: PreTrainedModel) -> methods.Checkpoint:
        """The trained checkpoint with its base in float32."""
        return methods.Checkpoint(self.name, self.folder, base, self.options, self.scale)


@dataclass(frozen=True)
class WrittenAdapter:
    """The file of an adapter, its shape, and its number of values in each type.

    `error` is the share of the trained change that the file leaves out, `invocation` the tokens that activate it, and
    `prefix_tokens` the number of positions that it occupies. A merged model has the `quantization` that was requested
    for it, and its own `weight_type` (see `ExportedFormat`).
    """

    file: Path
    shape: str
    values_by_type: Mapping[str, int]
    error: float = 0.0
    invocation: tuple[int, ...] = ()
    prefix_tokens: int = 0
    quantization: str | None = None
    weight_type: str = ""


@dataclass(frozen=True)
class ExportedFormat:
    """The files of one format: the base, its number of values in each type, and the adapters by name.

    `weight_type` is the type that determines the tolerance of the parity check (see `Backend.weight_type`).
    """

    backend: str
    base: Path
    values_by_type: Mapping[str, int]
    adapters: Mapping[str, WrittenAdapter]
    weight_type: str


@dataclass(frozen=True)
class Checked:
    """Parity of the base by format, and of the adapters by format and name."""

    base: Mapping[str, Figures]
    adapters: Mapping[str, Mapping[str, Figures]]

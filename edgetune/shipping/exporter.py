"""The steps of an export that depend on the task: the base, its entry in the manifest, and the parity check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from edgetune.progress import Progress

from .exported import BuildBase, BundleSpec, Checked, ExportedFormat, Figures, TrainedAdapter

if TYPE_CHECKING:
    from edgetune_export.adapters.shapes import Folded
    from edgetune_export.backends.base import OnnxOptions, Source
    from edgetune_runtime.bundle import BaseEntry
    from transformers import PreTrainedModel

B = TypeVar("B", bound=BuildBase)


class Exporter(ABC, Generic[B]):
    """The steps of `ship` for one task. The manifest records `packages` besides those of the formats."""

    task: str
    packages: tuple[str, ...] = ()

    @abstractmethod
    def load_for_export(self, base: B, wanted: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32. If memory is short, its weights may be mapped from a file in `folder`."""

    @abstractmethod
    def source(self, base: B, model: PreTrainedModel, work: Path, onnx: OnnxOptions) -> Source:
        """The base for backends; `model` is the base in float32."""

    @abstractmethod
    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter into a shape; `model` is the base in float32."""

    @abstractmethod
    def base_entry(self, base: B, source: Source, files: Mapping[str, str]) -> BaseEntry:
        """The base's entry in the manifest, without types and parity; `files` are its files by format."""

    @abstractmethod
    def verify(
        self,
        base: B,
        model: PreTrainedModel,
        adapters: Sequence[TrainedAdapter],
        exports: Sequence[ExportedFormat],
        progress: Progress,
    ) -> Checked:
        """Compare every format with torch; VerificationError names the adapter, or the base, that differs too much."""

    def compare_formats(
        self, adapters: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
    ) -> Mapping[str, Figures]:
        """Parity of the first format's base with that of each other format, by pair, such as `gguf/onnx`."""
        return {}

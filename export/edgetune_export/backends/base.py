"""The interface of backends: writing a base and folded adapters in one format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header

from edgetune_export.adapters.shapes import Adapter, Floats, Merged

from .format import OptionsByFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"f32": np.float32, "f16": np.float16}
"""The NumPy types of the number formats that an adapter's file has as they are."""
_F16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Source:
    """The base of a build: its GGUF file with its sha256, its weights in torch, and a folder for intermediate files.

    `options` are those of the formats, and `calibration` token rows of the tasks to quantize with, none if only the
    speed matters. `quantization` is what the file was quantized to, None if it is used unchanged.
    """

    path: Path
    fingerprint: str
    model: PreTrainedModel | None = None
    work: Path = Path()
    options: OptionsByFormat = field(default_factory=dict)
    calibration: Sequence[Sequence[int]] = ()
    quantization: str | None = None

    @cached_property
    def header(self) -> GgufHeader:
        """The header of the GGUF file, read once; errors as in `read_header`."""
        return read_header(self.path)


@dataclass(frozen=True)
class EncoderSource(Source):
    """The encoder of a build: `path` is its weights file, in the folder of its tokenizer; `model` is in float32.

    `trained_context_length` is its longest text in tokens.
    """

    trained_context_length: int = field(kw_only=True)


class Backend(Protocol):
    """A module in the folder of a format; the folder and the runtime's engine have the format's name.

    `SHAPES` are the adapter shapes that it can write, `ADAPTER_FILE` and `MODEL_FILE` the names of an adapter and a
    merged model in the adapter's folder, `PACKAGES` the packages whose versions a manifest records. If the
    weights of one of these files, or of the base, are in a file beside it, that one has its name and `.data`.
    """

    SHAPES: tuple[str, ...]
    ADAPTER_FILE: str
    MODEL_FILE: str
    PACKAGES: tuple[str, ...]

    def write_base(self, source: Source, folder: Path, adapters: Sequence[Adapter]) -> Path:
        """Write the base into `folder`, with what these adapters need; returns the file that an engine opens."""

    def write_adapter(
        self, adapter: Adapter, base: Path, out: Path, *, dtype: str = ..., base_fingerprint: str
    ) -> None:
        """Write the adapter for the base file `base` to `out`; IncompatibleError lists what does not fit."""

    def write_merged(self, merged: Merged, source: Source, out: Path) -> None:
        """Write the base to `out` with the merged model's parameters instead of its own."""

    def weight_type(self, source: Source) -> str:
        """The type whose tolerance the parity check applies: the one with the most bytes in the base's GGUF file.

        If this format stores it otherwise, what it becomes: another tensor type, or one of `Format.requantized_kl`.
        """

    def values_by_type(self, file: Path) -> dict[str, int]:
        """The number of values in each type of a base, adapter or merged model of this backend, for the manifest."""


def check_f16_range(name: str, values: Floats, remedy: str) -> None:
    """VerificationError, with this remedy, if f16 cannot hold one of the values of `name`."""
    largest = float(np.abs(values).max())
    if not largest <= _F16_MAX:
        raise VerificationError(f"{name} reaches {largest:.3g}, f16 ends at {_F16_MAX:.0f}", remedy)

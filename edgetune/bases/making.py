"""Makes the GGUF file that ships: a folder is converted, and either is quantized if the recipe says so."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune_export.base_file.convert import convert_folder, llama_cpp_version, part_of
from edgetune_export.base_file.importance import Importance
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_runtime import __version__
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.bundle.files import bundle_path
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.quantization import DEFAULT, FLOATS

from edgetune.common.digests import key_of
from edgetune.common.progress import Progress

from .locating import ALIASES
from .source import BaseSource, source_of

# The quantization in a file name; replaced in the name of a requantized base.
_QUANTIZATION = re.compile(r"[.-](q\d\w*|iq\d\w*|f16|f32|bf16)$", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """The base of a build: its name in the recipe, the GGUF file that ships, and that file's sha256 and header.

    `quantization` is what the file was quantized to, None for a GGUF file that ships unchanged. `domain` has the
    figures of continued pretraining, if there was any.
    """

    name: str
    path: Path
    fingerprint: str
    header: GgufHeader
    quantization: str | None = None
    domain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportanceSource:
    """Computes the importance matrix of a base's GGUF file before it is quantized; `key` identifies its rows."""

    key: str
    collect: Callable[[Path], Importance]


def resolve(
    name: str, *, folder: Path, quantization: str | None, work: Path, progress: Progress, converter: Path | None
) -> Base:
    """Find and make the base `name`; relative paths start at `folder`. See `make`.

    Raises NotFoundError if there is no such base, IncompatibleError, before any work, if its architecture is not
    supported, VerificationError if a file is damaged.
    """
    return make(source_of(name, folder), quantization, work=work, progress=progress, converter=converter)


def make(
    source: BaseSource,
    quantization: str | None,
    *,
    work: Path,
    progress: Progress,
    converter: Path | None,
    importance: ImportanceSource | None = None,
) -> Base:
    """The GGUF file that ships; converted and quantized bases are in `work`.

    `quantization` None leaves a GGUF file unchanged and quantizes other bases to `DEFAULT`. Raises UsageError, before
    any work, if no bundle can have a file of that name.
    """
    name, path = source.name, source.path
    if importance is not None:
        work /= importance.key[:12]
    if source.is_folder:
        quantization = quantization or DEFAULT
        out = work / f"{path.name}-{_key_of_folder(path)}-{quantization}.gguf"
    else:
        fingerprint = sha256_of(path)
        if name in ALIASES and fingerprint != ALIASES[name].sha256:
            message = f"{path} is not the file that base {name!r} refers to: its sha256 is {fingerprint}"
            raise VerificationError(message, f"reinstall {ALIASES[name].package}, or use the path of a .gguf file")
        if quantization is None:
            assert source.header is not None
            _check_name(path)
            return Base(name, path, fingerprint, source.header)
        out = work / fingerprint[:12] / f"{_QUANTIZATION.sub('', path.stem)}.{quantization}.gguf"
    _check_name(out)
    if not out.is_file():
        _write(source, out, quantization, progress=progress, converter=converter, importance=importance)
    return Base(name, out, sha256_of(out), read_header(out), quantization)


def _check_name(file: Path) -> None:
    try:
        bundle_path(f"base/{file.name}")
    except ValueError as error:
        message = f"a bundle cannot have a file {file.name[:80]!r}, whose name is too long or has special characters"
        raise UsageError(message, "rename the base") from error


def _write(
    source: BaseSource,
    out: Path,
    quantization: str,
    *,
    progress: Progress,
    converter: Path | None,
    importance: ImportanceSource | None,
) -> None:
    """Convert and quantize a base to the file `out`, which appears complete or not."""
    part = out.with_name(f".{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_folder and quantization in FLOATS:
            before_quantization(source, part, progress, converter, dtype=quantization).replace(out)
            return
        file = before_quantization(source, part, progress, converter)
        matrix = None if importance is None else importance.collect(file)
        progress.say(f"quantizing {source.path.name} to {quantization}")
        quantize_gguf(file, out, quantization, again=not source.is_folder, importance=matrix)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def before_quantization(
    source: BaseSource, folder: Path, progress: Progress, converter: Path | None, *, dtype: str = "auto"
) -> Path:
    """The GGUF file that the base is quantized from: that of the source, or one of `dtype` converted into `folder`."""
    if not source.is_folder:
        return source.path
    progress.say(f"converting {part_of(source.path)} to GGUF" + (f" {dtype}" if dtype in FLOATS else ""))
    out = folder / f"{source.path.name}.gguf"
    convert_folder(source.path, out, dtype=dtype, converter=converter)
    return out


def key_of_source(source: BaseSource) -> str:
    """A digest that changes if the base's file does, or its folder or what converts it."""
    return _key_of_folder(source.path) if source.is_folder else sha256_of(source.path)


def _key_of_folder(folder: Path) -> str:
    """A short digest of the folder's file names, sizes and modification times, and of the versions that convert it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return key_of([state, __version__, llama_cpp_version()])[:12]

"""Architectures of decoders: one file with an ARCHITECTURE for each; shared code is in `base`, `layout` and `shape`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.registry import Registry

from .base import Architecture

__all__ = ["Architecture", "known", "names", "of", "of_model_type", "title_of"]

_ARCHITECTURES = Registry(__name__, "architecture", shared=("base", "layout", "shape"))


def names() -> list[str]:
    """The names of all architectures, from the files of this package."""
    return _ARCHITECTURES.names()


@cache
def known() -> Mapping[str, Architecture]:
    """All architectures by their names."""
    return {name: _ARCHITECTURES.load(name).ARCHITECTURE for name in names()}


def title_of(name: str) -> str:
    """What people call the bases of an architecture: the beginning of its file, up to a colon."""
    return (_ARCHITECTURES.load(name).__doc__ or name).partition(":")[0]


def of(header: GgufHeader, base: str = "") -> Architecture:
    """The architecture of a GGUF file; IncompatibleError, which also names the `base`, if it is not supported.

    If several architectures share a GGUF name, it is the one with that file name.
    """
    architecture = known().get(header.architecture.replace("-", "_"))
    if architecture is None or architecture.gguf != header.architecture:
        raise _unsupported(header.architecture, base)
    return architecture


def of_model_type(model_type: str, base: str = "") -> Architecture:
    """The architecture of a config.json with this `model_type`; errors as in `of`."""
    for architecture in known().values():
        if model_type in (*architecture.model_types, architecture.multimodal[0]):
            return architecture
    raise _unsupported(model_type, base)


def _unsupported(name: str, base: str) -> IncompatibleError:
    whose = f" of base {base!r}" if base else ""
    message = f"architecture {name!r}{whose} is not supported"
    return IncompatibleError(message, f"use a base with one of: {', '.join(names())}")

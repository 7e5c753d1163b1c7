"""The adapters of a call with their scales, and the prefix among them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines.base import check_prefix_fits, prefix_among
from edgetune_runtime.errors import IncompatibleError, UsageError

Adapters = str | Mapping[str, float] | None
"""An adapter by name, `auto` for the one that the router chooses, adapters with their scales, or None for the base."""

_LARGEST_SCALE = 1000
"""Engines compute in float32, and far larger scales would give no numbers."""


def names_of(adapter: Adapters) -> Collection[str]:
    """The names of the chosen adapters; none of an invalid choice, which `scales_of` refuses."""
    if isinstance(adapter, str):
        return (adapter,)
    return adapter if isinstance(adapter, Mapping) else ()


def scales_of(adapter: Adapters, manifest: Manifest, engine: str) -> dict[str, float]:
    """The scale of each chosen adapter; NotFoundError for an unknown one, UsageError for an invalid choice."""
    if adapter is None:
        return {}
    if isinstance(adapter, str):
        entry = manifest.adapter(adapter)
        # The weights of a merged model include its scale.
        return {adapter: 1.0 if entry.is_merged(engine) else entry.scale}
    if not isinstance(adapter, Mapping):
        raise UsageError(f"adapter is {adapter!r}", "give a name, {name: scale}, or None for the base")
    for name, scale in adapter.items():
        manifest.adapter(name)
        if not isinstance(scale, int | float) or not abs(scale) <= _LARGEST_SCALE:
            remedy = f"give a number from -{_LARGEST_SCALE} to {_LARGEST_SCALE}"
            raise UsageError(f"adapter {name!r} has scale {scale!r}", remedy)
    return {name: float(scale) for name, scale in adapter.items()}


def capacity_of(context_length: int, adapters: Mapping[str, float], manifest: Manifest, engine: str) -> int:
    """The tokens that fit in a context beside a prefix among the adapters.

    UsageError for two prefixes, or a scaled one, IncompatibleError for one that leaves too little room.
    """
    prefix = _prefix_of(adapters, manifest, engine)
    tokens = 0 if prefix is None else manifest.adapter(prefix).prefix_tokens
    if prefix is not None:
        check_prefix_fits(prefix, tokens, context_length)
    return context_length - tokens


def _prefix_of(adapters: Mapping[str, float], manifest: Manifest, engine: str) -> str | None:
    prefixes = [name for name in adapters if manifest.adapter(name).shapes.get(engine) == "prefix"]
    return prefix_among(adapters, prefixes)


def require_one_prefix(spans: Iterable[Mapping[str, float]], manifest: Manifest, engine: str) -> None:
    """Raise IncompatibleError if not all adapters of a sequence's spans have the same prefix, or none."""
    names = {_prefix_of(adapters, manifest, engine) for adapters in spans}
    if len(names) > 1:
        prefixes = " and ".join(sorted("none" if name is None else repr(name) for name in names))
        message = f"a state cannot be carried over between adapters with different prefixes ({prefixes})"
        raise IncompatibleError(message, 'use carry="recompute"')

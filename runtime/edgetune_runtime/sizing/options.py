"""The needs of a bundle that is opened with other options than the default, and which keys and values it can have."""

from __future__ import annotations

from dataclasses import replace

from edgetune_runtime import engines
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.quantization import TENSOR_TYPES


def with_options(
    needs: Needs,
    *,
    kv: str | None = None,
    cache_mb: float | None = None,
    adapters_mb: float | None = None,
    serves: bool = False,
) -> Needs:
    """The needs when a bundle is opened with these options, and served; None is the default of `Runtime.open`.

    Raises what `with_kv` raises.
    """
    changed = replace(
        needs,
        cache_mb=needs.cache_mb if cache_mb is None else cache_mb,
        adapters_mb=needs.adapters_mb if adapters_mb is None else adapters_mb,
        serves=serves,
    )
    return changed if kv is None else with_kv(changed, kv)


def with_kv(needs: Needs, kv: str) -> Needs:
    """The needs with keys and values of the data type `kv`.

    UsageError if the engine does not have it, IncompatibleError if the base or one of its adapters cannot have it.
    """
    engines.check_kv(needs.engine, kv)
    reason = _obstacle(needs, kv)
    if reason is not None:
        raise IncompatibleError(f"keys and values cannot be {kv}: {reason}", f"use {needs.cost.kv_types[0]}")
    return replace(needs, kv=kv)


def kv_types(needs: Needs) -> list[str]:
    """The data types that keys and values of the base with its adapters can have, the default first."""
    return [kv for kv in needs.cost.kv_types if _obstacle(needs, kv) is None]


def _obstacle(needs: Needs, kv: str) -> str | None:
    """Why the base with its adapters cannot have keys and values of this type of the engine; None if it can."""
    block = TENSOR_TYPES[kv].block
    wrong = next((length for length in needs.head_lengths if length % block), None)
    if wrong is not None:
        return f"the base's heads have {wrong} numbers, not a multiple of {block}"
    prefix = next((name for name, size in needs.adapters.items() if size.is_prefix), None)
    if prefix is not None and kv != needs.cost.kv_types[0]:
        return f"adapter {prefix} is a prefix"
    return None

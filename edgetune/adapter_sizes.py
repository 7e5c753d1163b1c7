"""The size of an adapter before it is trained: its numbers, and its memory in an engine; `Format` has that of files."""

from __future__ import annotations

from edgetune_devices.fit import AdapterSize
from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime.engines import gguf
from edgetune_runtime.sizing.needs import COSTS

from . import methods
from .recipe.parts import MethodSpec


def shipped_values(spec: MethodSpec, shape: str, base: BaseShape) -> int:
    """Numbers in the adapter's file, folded into `shape`; a full model has those of the base."""
    method, options = methods.load(spec.name), spec.options
    if shape == "merged":
        return base.parameters
    if shape == "prefix":
        return method.prefix_tokens(options) * base.kv_values_per_token
    if shape == "tensors":
        return method.trained_parameters(base, options)
    modules = method.trained_modules(base, options)
    ranks = method.shipped_ranks(modules, options)
    return sum(rank * module.values_per_rank for rank, module in zip(ranks, modules, strict=True))


def size_in_memory(spec: MethodSpec, shape: str, base: BaseShape, engine: str, *, dtype: str) -> AdapterSize | None:
    """The memory of an adapter beside the base in `engine`, from a file of `dtype`; None if it is a full model."""
    if shape == "merged":
        return None
    values = shipped_values(spec, shape, base)
    if shape == "prefix":
        return AdapterSize(values * COSTS[engine].kv_bytes, 0, is_prefix=True)
    # In other engines than llama.cpp, the factors are f32 in memory, whatever their file has.
    file_bytes = backends.format_of(engine).adapter_bytes(values, dtype if engine == gguf.NAME else "f32", shape)
    modules = methods.load(spec.name).trained_modules(base, spec.options)
    return AdapterSize(int(file_bytes), len(modules) if shape == "low_rank" else 0)

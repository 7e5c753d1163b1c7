"""Plans the adapters of a recipe: their modules, parameters and files, from the base's header alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune_devices import fit
from edgetune_export import backends
from edgetune_runtime.engines import gguf
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.sizing.needs import COSTS

from edgetune import methods
from edgetune.methods import Method, MethodOptions
from edgetune.methods.common.peft import ALL_LINEAR, TargetOptions
from edgetune.methods.lora import AUTO
from edgetune.recipe.parts import AdapterSpec

from .records import AdapterPlan

_FLOAT = 4


def plan_adapter(
    name: str, spec: AdapterSpec, shapes: Mapping[str, str], header: GgufHeader | None, weights: str
) -> AdapterPlan:
    """The plan of one adapter without its data; `weights` are those of the recipe's `onnx`."""
    method, options = methods.load(spec.method.name), spec.method.options
    dtypes = {target: spec.dtype_in(target) for target in shapes}
    planned = AdapterPlan(
        name=name,
        method=method.name,
        options=options,
        shapes=shapes,
        dtypes=dtypes,
        target_modules=_modules_of(options),
        rank=method.shipped_rank(options),
        scale=spec.scale,
        system=spec.system,
        merged=spec.merged,
        metric=spec.metric,
        labels=spec.labels or (),
        output=None if spec.output is None else spec.output.spec,
        drafts=spec.draft,
        golden=spec.golden,
    )
    return planned if header is None else _with_sizes(planned, method, header, weights)


def with_options(planned: AdapterPlan, options: MethodOptions, header: GgufHeader, weights: str) -> AdapterPlan:
    """The plan with other options, such as chosen modules, and the sizes that follow from them."""
    method = methods.load(planned.method)
    planned = replace(planned, options=options, target_modules=_modules_of(options), rank=method.shipped_rank(options))
    return _with_sizes(planned, method, header, weights)


def _modules_of(options: MethodOptions) -> str | tuple[str, ...] | None:
    return options.target_modules if isinstance(options, TargetOptions) else None


def _with_sizes(planned: AdapterPlan, method: Method[Any], header: GgufHeader, weights: str) -> AdapterPlan:
    """The plan with the numbers of modules, values and trained parameters, and the approximate size of each file."""
    # Of modules that are still to be chosen, the most.
    targets = ALL_LINEAR if planned.target_modules in (None, AUTO) else planned.target_modules
    low_rank = fit.lora_size(header, planned.rank, targets or ALL_LINEAR, dtype="f32")
    # Keys and values of a token in f16 have two bytes each.
    prefix = method.prefix_tokens(planned.options) * fit.kv_bytes_per_token(header) // 2
    values = prefix or low_rank.file_bytes // _FLOAT
    sizes = {}
    for target, shape in planned.shapes.items():
        found = backends.format_of(target)
        if shape == "merged":
            sizes[target] = int(found.merged_bytes(header.parameters, weights))
        elif shape != "tensors":
            sizes[target] = int(found.adapter_bytes(values, planned.dtypes[target]))
    return replace(
        planned,
        modules=low_rank.modules if planned.rank else 0,
        values=values,
        trainable_parameters=_trained_share(method, planned.options, header) or values,
        bytes_by_format=sizes,
    )


def _trained_share(method: Method[Any], options: MethodOptions, header: GgufHeader) -> int:
    """Number of the base's own parameters that the method trains."""
    if not method.trains_base:
        return 0
    layers = int(header.metadata[f"{header.architecture}.block_count"])
    return header.parameters * min(layers, getattr(options, "layers", layers)) // layers


def memory_size(planned: AdapterPlan, engine: str, shape: str) -> fit.AdapterSize | None:
    """Memory of an adapter in an engine in addition to the base; None if it is merged."""
    if shape == "merged":
        return None
    if shape == "tensors":
        # A few vectors or small networks: negligible compared to the base.
        return fit.AdapterSize(0, 0)
    if shape == "prefix":
        return fit.AdapterSize(planned.values * COSTS[engine].kv_bytes, 0, is_prefix=True)
    # In other engines than llama.cpp, the factors are f32 in memory, whatever their file has.
    dtype = planned.dtype_in(engine) if engine == gguf.NAME else "f32"
    size = math.ceil(planned.values * TENSOR_TYPES[dtype].bytes_per_value)
    return fit.AdapterSize(int(size * backends.format_of(engine).adapter_factor), planned.modules)

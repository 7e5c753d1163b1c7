"""Plans the adapters of a recipe: their modules, parameters and files, from the base's header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune_devices import fit
from edgetune_export import backends
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune import methods
from edgetune.methods import Method, MethodOptions
from edgetune.methods.common.peft import ALL_LINEAR, TargetOptions
from edgetune.methods.lora import AUTO
from edgetune.recipe.model import Recipe

from .records import AdapterPlan

_FLOAT = 4


def plan_adapter(recipe: Recipe, name: str, shapes: Mapping[str, str], header: GgufHeader | None) -> AdapterPlan:
    """The plan of one adapter of the recipe, without its data."""
    spec = recipe.adapters[name]
    method = methods.load(spec.method.name)
    dtypes = {target: getattr(spec, backends.format_of(target).dtype_key) for target in backends.names()}
    planned = AdapterPlan(
        name=name,
        method=spec.method.name,
        options=spec.method.options,
        shapes=shapes,
        dtypes=dtypes,
        scale=spec.scale,
        system=spec.system,
        merged=spec.merged,
        metric=spec.metric,
        labels=spec.labels or (),
        drafts=spec.draft,
        golden=spec.golden,
    )
    return _with_options(planned, spec.method.options, method, header, recipe.onnx.weights)


def with_options(planned: AdapterPlan, options: MethodOptions, header: GgufHeader, weights: str) -> AdapterPlan:
    """The plan with other options, such as chosen modules, and the sizes that follow from them.

    `weights` are those of the recipe's `onnx`.
    """
    return _with_options(planned, options, methods.load(planned.method), header, weights)


def _with_options(
    planned: AdapterPlan, options: MethodOptions, method: Method[Any], header: GgufHeader | None, weights: str
) -> AdapterPlan:
    targets = options.target_modules if isinstance(options, TargetOptions) else None
    planned = replace(planned, options=options, target_modules=targets, rank=method.shipped_rank(options))
    if header is None:
        return planned
    # Of modules that are still to be chosen, the most.
    most = ALL_LINEAR if targets is None or targets == AUTO else targets
    low_rank = fit.lora_size(header, planned.rank, most, dtype="f32")
    # Keys and values of a token in f16 have two bytes each.
    prefix = method.prefix_tokens(options) * fit.kv_bytes_per_token(header) // 2
    values = prefix or low_rank.file_bytes // _FLOAT
    sizes = {}
    for target, shape in planned.shapes.items():
        written = backends.format_of(target)
        if shape == "merged":
            sizes[target] = int(written.merged_bytes(header.parameters, weights))
        elif shape != "tensors":
            sizes[target] = int(written.adapter_bytes(values, planned.dtypes[target]))
    return replace(
        planned,
        modules=low_rank.modules if planned.rank else 0,
        values=values,
        trainable_parameters=_trained_share(method, options, header) or values or None,
        bytes_by_format=sizes,
    )


def _trained_share(method: Method[Any], options: MethodOptions, header: GgufHeader) -> int:
    """Number of the base's own parameters that the method trains."""
    if not method.trains_base:
        return 0
    layers = int(header.metadata[f"{header.architecture}.block_count"])
    return header.parameters * min(layers, getattr(options, "layers", layers)) // layers

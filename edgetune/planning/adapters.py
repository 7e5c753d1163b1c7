"""Plans the adapters of a recipe: their modules, parameters and files, from the base's header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune import methods
from edgetune.methods import Method, MethodOptions
from edgetune.methods.common.peft import TargetOptions
from edgetune.recipe.model import Recipe

from .records import AdapterPlan


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
    base, values, sizes = BaseShape.of_header(header), {}, {}
    for target, shape in planned.shapes.items():
        values[target] = shipped_values(method, options, shape, base)
        written = backends.format_of(target)
        if shape == "merged":
            sizes[target] = int(written.merged_bytes(header.parameters, weights))
        else:
            sizes[target] = int(written.adapter_bytes(values[target], planned.dtypes[target], shape))
    return replace(
        planned,
        modules=len(method.trained_modules(base, options)),
        values_by_format=values,
        trainable_parameters=method.trained_parameters(base, options),
        bytes_by_format=sizes,
    )


def shipped_values(method: Method[Any], options: MethodOptions, shape: str, base: BaseShape) -> int:
    """Numbers in the adapter's file, folded into `shape`; a full model has those of the base.

    Of modules that are still to be chosen, those of the most.
    """
    if shape == "merged":
        return base.parameters
    if shape == "prefix":
        return method.prefix_tokens(options) * base.kv_values_per_token
    if shape == "tensors":
        return method.trained_parameters(base, options)
    modules = method.trained_modules(base, options)
    ranks = method.shipped_ranks(modules, options)
    return sum(rank * module.values_per_rank for rank, module in zip(ranks, modules, strict=True))

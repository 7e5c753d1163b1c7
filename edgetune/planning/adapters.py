"""Plans the adapters of a recipe: their modules, parameters, files and memory, from the base's shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime.engines import gguf
from edgetune_runtime.sizing.needs import COSTS

from edgetune import methods
from edgetune.adapter_sizes import shipped_values, size_in_memory
from edgetune.methods import MethodOptions
from edgetune.methods.common.peft import TargetOptions
from edgetune.recipe.model import Recipe

from .records import AdapterPlan


def plan_adapter(recipe: Recipe, name: str, shapes: Mapping[str, str], base: BaseShape | None) -> AdapterPlan:
    """The plan of one adapter of the recipe, without its data."""
    spec = recipe.adapters[name]
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
    return with_options(planned, spec.method.options, base, recipe.onnx.weights)


def with_options(planned: AdapterPlan, options: MethodOptions, base: BaseShape | None, weights: str) -> AdapterPlan:
    """The plan with other options, such as chosen modules, and the sizes that follow from them.

    `weights` are those of the recipe's `onnx`.
    """
    method = methods.load(planned.method)
    targets = options.target_modules if isinstance(options, TargetOptions) else None
    planned = replace(planned, options=options, target_modules=targets, rank=getattr(options, "r", 0))
    if base is None:
        return planned
    sizes = {}
    for target, shape in planned.shapes.items():
        written = backends.format_of(target)
        if shape == "merged":
            sizes[target] = int(written.merged_bytes(base.parameters, weights))
        else:
            values = shipped_values(method, options, shape, base)
            sizes[target] = int(written.adapter_bytes(values, planned.dtypes[target], shape))
    first = next(iter(planned.shapes.values()))
    memory = {
        engine: size_in_memory(
            method, options, planned.shapes.get(engine, first), base, engine, dtype=planned.dtypes[gguf.NAME]
        )
        for engine in COSTS
    }
    modules = method.trained_modules(base, options)
    return replace(
        planned,
        modules=len(modules),
        rank=max(method.shipped_ranks(modules, options), default=0),
        trainable_parameters=method.trained_parameters(base, options),
        bytes_by_format=sizes,
        memory=memory,
    )

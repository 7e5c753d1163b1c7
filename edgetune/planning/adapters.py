"""Plans the adapters of a recipe: their modules, parameters, files and memory, from the base's shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.format import Format
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import AdapterSize
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError, naming

from edgetune import methods
from edgetune.bases import BaseSource
from edgetune.methods import MethodOptions
from edgetune.methods.common.base import TrainedModules
from edgetune.methods.common.peft import TargetOptions
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, MethodSpec
from edgetune.recipe.targets import misfit

from .records import AdapterPlan


def plan_adapters(
    recipe: Recipe, shapes: Mapping[str, Mapping[str, str]], source: BaseSource | None
) -> dict[str, AdapterPlan]:
    """The plans of all adapters without their data.

    Raises one error for all adapters with options that do not fit the base, of the type of the first.
    """
    plans, problems = {}, list[EdgetuneError]()
    for name, spec in recipe.adapters.items():
        try:
            with naming(f"adapter {name!r}"):
                planned = plan_export(name, spec, shapes[name])
                if source is not None:
                    check_method(spec.method, shapes[name], source)
                _check_dtypes(planned)
                plans[name] = with_options(planned, planned.options, None if source is None else source.shape)
        except EdgetuneError as error:
            problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else type(problems[0])("\n".join(map(str, problems)))
    return plans


def _check_dtypes(planned: AdapterPlan) -> None:
    """UsageError for a number format that is only for low-rank adapters."""
    for target, shape in planned.shapes.items():
        dtype, file_format = planned.dtypes[target], backends.format_of(target)
        if shape not in ("low_rank", "merged") and dtype in file_format.low_rank_dtypes:
            key = file_format.dtype_key
            message = f"{key} is {dtype}, which {target} has for low-rank adapters only, not for the shape {shape}"
            raise UsageError(message, f"set {key} to f16 or f32, or leave it out")


def check_method(method: MethodSpec, shapes: Mapping[str, str], source: BaseSource) -> None:
    """Raise UsageError or IncompatibleError if the method cannot tune the base, or not into one of these shapes."""
    base = source.shape
    if base is not None and (reason := misfit(method.name, shapes, base.architecture)):
        raise IncompatibleError(f"{method.name} {reason}", "train it with lora")
    methods.load(method.name).check(method.options, source.linear_modules, {*shapes.values()})
    if base is not None:
        _check_tokens(method.options, base.vocabulary)
        if base.ties_output:
            _check_output_layer(method, shapes, base)


def _check_tokens(options: MethodOptions, vocabulary: int) -> None:
    """UsageError for the id of a token that a base with so many tokens does not have."""
    for key in options.token_options:
        for token in getattr(options, key) or ():
            if token >= vocabulary:
                message = f"{key} has {token}, and the base has {vocabulary} tokens"
                raise UsageError(message, f"use ids below {vocabulary}")


def _check_output_layer(method: MethodSpec, shapes: Mapping[str, str], base: BaseShape) -> None:
    """UsageError if the output layer is adapted where the base's file has none of its own.

    ONNX graphs have one even if it is tied.
    """
    trained = methods.load(method.name).trained_modules(base, method.options)
    unable = [name for name, shape in shapes.items() if shape == "merged" or backends.format_of(name).links_base]
    if unable and base.output_layer in trained:
        layer = base.output_layer.name
        message = f"{', '.join(unable)} cannot change {layer}, which is the token embedding of this base"
        raise UsageError(message, f"leave {layer} out of target_modules")


def plan_export(name: str, spec: AdapterSpec, shapes: Mapping[str, str]) -> AdapterPlan:
    """The plan of an adapter without its sizes, which an adapter that is only exported needs no plan of."""
    return AdapterPlan(name, spec, shapes, {target: _dtype_in(target, spec) for target in backends.names()})


def _dtype_in(target: str, spec: AdapterSpec) -> str:
    """The number format of the adapter's file: what the recipe says, or the format's default where it lacks that."""
    file_format = backends.format_of(target)
    dtype: str = getattr(spec, file_format.dtype_key)
    return dtype if dtype in file_format.adapter_dtypes else file_format.adapter_dtypes[0]


def with_options(planned: AdapterPlan, options: MethodOptions, base: BaseShape | None) -> AdapterPlan:
    """The plan with other options of the method, such as chosen modules, and the sizes that follow from them.

    Merged models keep their sizes, which `board.choose_settings` sets.
    """
    method = methods.load(planned.method)
    targets = options.target_modules if isinstance(options, TargetOptions) else None
    spec = planned.spec.model_copy(update={"method": planned.spec.method.model_copy(update={"options": options})})
    planned = replace(planned, spec=spec, target_modules=targets, rank=getattr(options, "r", 0))
    if base is None:
        return planned
    trained, shapes = method.trained(base, options), planned.shapes
    parameters = method.trained_parameters(trained, options)
    values = {"tensors": parameters, "prefix": method.prefix_tokens(options) * base.kv_values_per_token}
    sizes = {
        target: planned.bytes_by_format.get(target, 0)
        if shape == "merged"
        else _bytes(backends.format_of(target), planned.dtypes[target], shape, trained, values)
        for target, shape in shapes.items()
    }
    # In an engine whose format is not exported, the shape of the first one counts.
    in_engine = {engine: shapes.get(engine, next(iter(shapes.values()))) for engine in engines.names_with_needs()}
    return replace(
        planned,
        trained=trained,
        rank=max(trained.ranks, default=0),
        trainable_parameters=parameters,
        bytes_by_format=sizes,
        memory={
            engine: size_in_memory(engine, planned.dtypes[gguf.NAME], shape, trained, values)
            for engine, shape in in_engine.items()
            if shape != "merged"
        },
    )


def size_in_memory(
    engine: str, dtype: str, shape: str, trained: TrainedModules, values: Mapping[str, int]
) -> AdapterSize:
    """The memory of an adapter beside the base in `engine`, from a GGUF file of `dtype`.

    `values` has the numbers in shapes other than low_rank.
    """
    cost = engines.load_needs(engine).COST
    if shape == "prefix":
        return AdapterSize(values[shape] * cost.kv_bytes, 0, is_prefix=True)
    size = _bytes(backends.format_of(engine), "f32" if cost.f32_adapters else dtype, shape, trained, values)
    return AdapterSize(size, len(trained.modules) if shape == "low_rank" else 0)


def _bytes(file_format: Format, dtype: str, shape: str, trained: TrainedModules, values: Mapping[str, int]) -> int:
    """The size of an adapter's file, of any shape but merged."""
    if shape == "low_rank":
        return int(file_format.low_rank_bytes(trained.base, trained.rank_by_module, dtype))
    return int(file_format.adapter_bytes(values[shape], dtype))

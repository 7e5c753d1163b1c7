"""What a bundle, a recipe or a GGUF file needs on a board: the targets of `edgetune devices fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgetune_devices import fit
from edgetune_devices.needs import needs_of_header
from edgetune_export import architectures
from edgetune_runtime import engines
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest, resolve
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError
from edgetune_runtime.formats.gguf_base import read_base
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.inference.opening_options import check_context_length
from edgetune_runtime.sizing.needs import needs_of_bundle

from edgetune import bases
from edgetune.planning.build import plan_bundle
from edgetune.planning.on_device import bundle_needs
from edgetune.recipe import task_types
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of


@dataclass(frozen=True)
class FitTarget:
    """The needs in an engine and, if there is one, in another; and the header of the base if it has a GGUF file."""

    needs: Needs
    other: Needs | None = None
    header: GgufHeader | None = None


def read_target(path: Path, context_length: int | None, engine: str | None) -> FitTarget:
    """The needs of the target at `path`, for a context length and an engine, by default its own.

    NotFoundError if there is no such file, or if the size of a recipe's base is not known; UsageError for another kind
    of file, for a task without a prediction, and for a context that the base was not trained for; IncompatibleError if
    the target has no such engine, or cannot have it; and what `read_base` raises.
    """
    if not path.exists():
        raise NotFoundError(f"no bundle, recipe or GGUF file {path}", "check the path")
    if path.is_dir() or path.name == MANIFEST_NAME:
        return _of_bundle(path if path.is_dir() else path.parent, context_length, engine)
    if path.suffix.lower() == ".gguf":
        header = read_base(path)
        architectures.of(header).check_header(header, [engine or gguf.NAME])
        trained = bases.trained_context_length(header)
        check_context_length(context_length, trained)
        length = context_length or min(fit.CONTEXT_LENGTHS[0], trained)
        return FitTarget(needs_of_header(header, context_length=length, engine=engine or gguf.NAME), None, header)
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path, context_length, engine)
    raise UsageError(f"{path} is not a bundle, recipe or GGUF file", "give a bundle's folder, a .yaml or a .gguf file")


def _of_bundle(bundle: Path, context_length: int | None, engine: str | None) -> FitTarget:
    manifest = read_manifest(bundle)
    task_types.load(manifest.task).check_offers("fit", bundle)
    check_context_length(context_length, manifest.base.trained_context_length)
    file = manifest.base.files.get(gguf.NAME)
    header = None if file is None else read_base(resolve(bundle, file))

    def needs_in(name: str | None) -> Needs:
        return needs_of_bundle(bundle, context_length=context_length, engine=name)

    return _in_both(manifest.base.files, engine, needs_in, header)


def _of_recipe(path: Path, context_length: int | None, engine: str | None) -> FitTarget:
    settings = {} if context_length is None else {"context_length": context_length}
    recipe = Recipe.from_file(path, settings, dict.fromkeys(settings, "--context-length"))
    recipe.task_type.check_offers("fit", path)
    # The settings for the recipe's own board may be others.
    plan = plan_bundle(recipe.model_copy(update={"device": None}), bases.find(recipe), shapes_of(recipe))
    header = None if plan.source is None else plan.source.header
    if header is None:
        message = f"the size of base {recipe.base!r} is not known before it is downloaded"
        raise NotFoundError(message, "build the recipe, or give a .gguf file or a local folder as the base")
    if engine is not None and engine not in recipe.targets:
        message = f"recipe {path} has no target {engine}"
        raise IncompatibleError(message, f"choose one of: {', '.join(recipe.targets)}; or add it to targets")
    needs_in = partial(bundle_needs, plan.recipe, plan.adapters, header, plan.base.quantization)
    return _in_both(recipe.targets, engine, needs_in, header)


def _in_both(
    formats: Iterable[str], engine: str | None, needs_in: Callable[[str | None], Needs], header: GgufHeader | None
) -> FitTarget:
    needs = needs_in(engine)
    other = next((name for name in formats if name in engines.names_with_needs() and name != needs.engine), None)
    return FitTarget(needs, None if other is None else needs_in(other), header)

"""Fits a recipe to the bundle that its adapters are added to: the bundle's settings, and checks before any work."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from edgetune_export import backends
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import ROUTER_WORDS, Manifest, sha256_of
from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.wording import first_of
from pydantic import ValidationError

from edgetune import bases
from edgetune.planning.records import AdapterPlan, BuildPlan, PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.recipe.training import TrainingSpec
from edgetune.shipping.existing import ExistingBundle

from .plan import plan_build

# Settings of a recipe that a bundle has once for all its adapters, besides those that its manifest has elsewhere.
_SETTINGS = ("merged_quantization", "states", "onnx", "device")


def check_one_bundle(out: str | Path | None, into: str | Path | None) -> None:
    """UsageError if both name the bundle."""
    if into is not None and out is not None:
        raise UsageError("out and into are both given, and name the bundle", "keep one")


def plan_for(recipe: Recipe, out: Path | None, into: Path | None) -> PlannedBuild:
    """The plan of a build of the bundle `out`, by default `recipe.default_out`, or one into the bundle `into`.

    Raises what `check_one_bundle`, `check_destination`, `plan_build` and `plan_into` raise.
    """
    check_one_bundle(out, into)
    if into is not None:
        return plan_into(recipe, into)[0]
    if out is not None:
        check_destination(out)
    return plan_build(recipe, out)


def plan_into(recipe: Recipe, folder: Path) -> tuple[PlannedBuild, ExistingBundle]:
    """The plan of a build that adds the recipe's adapters to the bundle `folder`, and that bundle.

    Raises what `ExistingBundle.read`, `with_settings`, `plan_build` and `check_slots` raise.
    """
    existing = ExistingBundle.read(folder, recipe.adapters, replaces_router=recipe.route is not None)
    fitted = with_settings(recipe, existing)
    planned = plan_build(fitted, folder, others_of(existing), existing.manifest.adapters)
    check_slots(planned.plan, existing)
    return planned, existing


def with_settings(recipe: Recipe, existing: ExistingBundle) -> Recipe:
    """The recipe with the settings of the bundle; its adapters keep their training options.

    UsageError for each setting of the recipe that is another one, for a domain, for a router without the rows of all
    its adapters, and for a name that has another meaning for a router.
    """
    if recipe.quantization_spec is not None:
        # The bundle has the one that was chosen.
        recipe = recipe.model_copy(update={"quantization": None})
    settings, own = _settings_of(existing.manifest), recipe.model_dump(mode="json")
    problems = [
        f"{key} is {_shown(own[key])}, but {existing.folder} has {_shown(value)}; remove it from the recipe"
        for key, value in settings.items()
        if key in recipe.model_fields_set and own[key] is not None and _ordered(own[key]) != _ordered(value)
    ]
    if recipe.domain is not None:
        remedy = f"{existing.base_remedy}leave out domain"
        problems.append(f"domain would train the base of {existing.folder} again; {remedy}")
    problems += _router_problems(recipe, existing)
    is_shipped = _is_shipped(recipe, existing.manifest)
    if recipe.imatrix is not None and not is_shipped:
        remedy = f"{existing.base_remedy}remove it"
        problems.append(f"imatrix of these rows would make another base than that of {existing.folder}; {remedy}")
    if problems:
        raise UsageError("\n".join(problems))
    if is_shipped:
        settings["quantization"] = settings["imatrix"] = None
    specs = {}
    for name, spec in recipe.adapters.items():
        training = recipe.training.under(spec.training)
        if not training.auto:
            # The bundle's recipe has other options for all adapters. The plan sets all of them if it chooses some.
            training = TrainingSpec.model_validate(training.model_dump())
        specs[name] = spec.model_copy(update={"training": training})
    onnx = type(recipe.onnx).model_validate(settings.get("onnx", recipe.onnx))
    typed = {"targets": tuple(settings["targets"]), "onnx": onnx, "adapters": specs}
    return recipe.model_copy(update=settings | typed)


def router_change(recipe: Recipe, existing: ExistingBundle) -> str | None:
    """Which adapters the bundle's router does not choose after the build, as a sentence; None if it misses none."""
    router, route = existing.manifest.router, recipe.route
    if router is None:
        return None
    if route is None:
        new = [name for name in recipe.adapters if name not in existing.manifest.adapters]
        remedy = "to train it again, give the recipe route and all adapters"
        return f"router: stays as it is, and never chooses {first_of(new, 20, ', ')}; {remedy}" if new else None
    before = dict.fromkeys(name for call in router.calls.values() for name in call.adapters)
    left_out = [name for name in before if name not in (route.adapters or recipe.adapters)]
    return f"router: no longer chooses {first_of(left_out, 20, ', ')}, not in route.adapters" if left_out else None


def others_of(existing: ExistingBundle) -> dict[str, AdapterSpec]:
    """What the bundle's recipe has of the adapters that stay; adapters trained elsewhere are not in it."""
    stored = existing.manifest.recipe.get("adapters", {})
    try:
        return {
            name: AdapterSpec.model_validate(stored[name])
            for name in existing.manifest.adapters
            if name in stored and name not in existing.added
        }
    except ValidationError as error:
        message = f"{existing.folder} has a recipe that this version cannot read: {error.errors()[0]['msg']}"
        raise VerificationError(message, "build all adapters again") from error


def check_slots(plan: BuildPlan, existing: ExistingBundle) -> None:
    """IncompatibleError for a low-rank adapter that a base in the bundle has no place for, found before its training.

    A graph has inputs only for the modules of the adapters that it was written for.
    """
    with TemporaryDirectory() as folder:
        for name in existing.added:
            adapter = plan.adapters[name]
            if adapter.trained is None or plan.recipe.adapters[name].method.is_auto:
                continue
            for target, shape in adapter.shapes.items():
                if shape == LowRank.shape:
                    _write_empty(adapter, target, existing, Path(folder))


def _write_empty(adapter: AdapterPlan, target: str, existing: ExistingBundle, folder: Path) -> None:
    """Write an adapter of the planned modules that changes nothing."""
    assert adapter.trained is not None
    modules = {
        module.name: Delta(np.zeros((1, module.columns), np.float32), np.zeros((module.rows, 1), np.float32))
        for module in adapter.trained.modules
    }
    manifest = existing.manifest
    backend = backends.load(target, manifest.task)
    base = existing.folder / manifest.base.files[target]
    out, dtype = folder / backend.ADAPTER_FILE, adapter.dtypes[target]
    empty = LowRank(adapter.name, adapter.method, modules)
    try:
        backend.write_adapter(empty, base, out, dtype=dtype, base_fingerprint=manifest.base.fingerprint)
    except IncompatibleError as error:
        remedy = "choose target_modules of the bundle's adapters, or build all adapters together in another bundle"
        raise IncompatibleError(f"{existing.folder}: {error.message}", remedy) from error


def _router_problems(recipe: Recipe, existing: ExistingBundle) -> list[str]:
    """Why the recipe's router, or the bundle's own, does not fit all adapters together."""
    manifest, route = existing.manifest, recipe.route
    if route is None:
        return [
            f"{name!r} cannot be a name in {existing.folder}, whose router has another meaning for it; choose another"
            for name in ROUTER_WORDS
            if manifest.router is not None and name in recipe.adapters
        ]
    together = {**manifest.adapters, **recipe.adapters}
    problems = [
        f"route: {each}" for each in route.problems(manifest.name, together, generates=manifest.base.is_decoder)
    ]
    lacking = [name for name in manifest.adapters if name not in recipe.adapters]
    if route.adapters is None and lacking:
        problems.append(
            f"route would train a router without {first_of(lacking, 20, ', ')}, of which the recipe has no rows; "
            f"add what {existing.folder} has to its adapters, name those to choose from in route.adapters, or leave "
            "out route"
        )
    return problems


def _settings_of(manifest: Manifest) -> dict[str, Any]:
    """What the bundle has of a recipe's settings, as JSON values."""
    base = manifest.base
    return {
        "task": manifest.task,
        "targets": list(base.files),
        "quantization": base.quantization if base.is_decoder else None,
        "context_length": manifest.context_length,
        "threads": manifest.threads,
        **{key: manifest.recipe[key] for key in _SETTINGS if key in manifest.recipe},
    }


def _is_shipped(recipe: Recipe, manifest: Manifest) -> bool:
    """Whether the recipe's base is the file that the bundle was made from, quantized already."""
    if not bases.is_gguf(recipe.base, recipe.folder):
        return False
    return sha256_of(bases.locate(recipe.base, recipe.folder)) == manifest.base.fingerprint


def _ordered(value: Any) -> Any:  # noqa: ANN401 - JSON values
    return sorted(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:  # noqa: ANN401 - JSON values
    return f"[{', '.join(value)}]" if isinstance(value, list) else "none" if value is None else str(value)

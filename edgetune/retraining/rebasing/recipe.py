"""The recipe of a bundle for another base: without what depends on the old one, and with its rows at hand."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import MARK, Manifest
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.wording import first_of

from edgetune import bases
from edgetune.common.files import expanded
from edgetune.recipe.data import is_hub_id
from edgetune.recipe.model import Recipe, gains_from_matrix
from edgetune.recipe.parts import AdapterSpec
from edgetune.retraining.learning.kept import load_recipe, recipe_beside


@dataclass(frozen=True)
class RecipeSource:
    """Where the recipe of a bundle comes from, and what changes in it.

    Without `recipe`, it is the one beside the bundle, or the one in its manifest, whose paths start in `folder`.
    `base` None: the recipe's own, in another `quantization`. `settings` are those of `Recipe.from_file`.
    """

    base: str | None = None
    quantization: str | None = None
    recipe: Path | Recipe | None = None
    folder: Path = Path()
    settings: Mapping[str, Any] | None = None


def recipe_for(bundle: Path, manifest: Manifest, source: RecipeSource) -> Recipe:
    """The recipe that trains the adapters of the bundle again, and its router if it has one.

    Raises NotFoundError if there is no recipe, if it lacks an adapter, or for rows that are gone, all in one line;
    UsageError without a change of the base, and for a wrong recipe.
    """
    if source.base is None and source.quantization is None:
        raise UsageError("there is nothing to change: no base and no quantization", "give one of them")
    loaded = _loaded(bundle, manifest, source)
    lacking = [name for name in manifest.adapters if name not in loaded.adapters]
    if lacking:
        message = f"the recipe of {bundle} does not have its adapter {first_of([*map(repr, lacking)])}"
        raise NotFoundError(message, "give the recipe that trained all of them")
    removed = loaded.adapters.keys() - manifest.adapters.keys()
    specs = {name: _for_bundle(loaded.adapters[name], removed) for name in manifest.adapters}
    # A bundle from which an adapter was removed may have lost its router too.
    route = None if manifest.router is None else loaded.route
    recipe = loaded.model_copy(update={"adapters": specs, "route": route})
    gone = list(_missing(recipe))
    if gone:
        message = f"{bundle} was trained on files that are not here: {first_of(gone, 20)}"
        raise NotFoundError(message, "copy them there, or give the folder where they start, or another recipe")
    return recipe


def _loaded(bundle: Path, manifest: Manifest, source: RecipeSource) -> Recipe:
    own, settings = _changes(source), source.settings or {}
    changes, flags = {**own, **settings}, {key: key for key in own.keys() - settings.keys()}
    if source.recipe is not None:
        return load_recipe(source.recipe, manifest, changes, flags)
    beside = recipe_beside(bundle, manifest.adapters, changes, flags)
    if beside is not None:
        return beside
    if not manifest.recipe:
        message = f"{bundle} has no recipe, because its adapters were trained elsewhere"
        raise NotFoundError(message, "write one with their rows and give it")
    return Recipe.from_dict(manifest.recipe, source.folder, changes, flags)


def _changes(source: RecipeSource) -> dict[str, Any]:
    """The base and its quantization as settings. A .gguf file ships as it is, unless a quantization is given."""
    changes: dict[str, Any] = {}
    if source.base is not None:
        path = expanded(source.base)
        # Quoted, because texts are parsed as YAML.
        changes["base"] = json.dumps(str(path.absolute()) if path.exists() else source.base)
    if source.quantization is not None or (source.base and bases.is_gguf(source.base, Path())):
        changes["quantization"] = source.quantization
        if not gains_from_matrix(source.quantization):
            changes["imatrix"] = None
    return changes


def _for_bundle(spec: AdapterSpec, removed: Collection[str]) -> AdapterSpec:
    """The adapter's section without a start and without token ids, which are of the old base.

    Unsure answers that a `removed` adapter was to replace are marked, as in the bundle.
    """
    method = spec.method.model_copy(update={"options": spec.method.options.without_tokens()})
    unsure = MARK if spec.unsure in removed else spec.unsure
    return spec.model_copy(update={"method": method, "start_from": None, "unsure": unsure})


def _missing(recipe: Recipe) -> Iterator[str]:
    """The files of the recipe that are gone, each with what it is for."""
    for (*_, part, _, _), source in recipe.sources():
        if isinstance(source, str) and not Path(source).exists() and not is_hub_id(source):
            yield f"{source} ({part})"

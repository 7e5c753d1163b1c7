"""The recipe and the trained adapters that are kept beside a bundle, in `BUNDLE.learn`, for the next training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from edgetune_runtime.bundle import Manifest, digest_of_model, read_manifest
from edgetune_runtime.bundle.lock import locked
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.atomic import raising_out_of_space, swap_in
from edgetune_runtime.wording import shortened

from edgetune.common.files import write_file
from edgetune.common.work_folder import beside, work_folder
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.recipe.saved import RECIPE, recipe_values, save_recipe
from edgetune.recipe.training import TrainingSpec
from edgetune.report.answers import split_of
from edgetune.tasks.task import Task
from edgetune.training.job import finished

_KEPT = "kept-"
"""Beginning of the name of a folder with what was kept for one bundle; several are there after a kill."""
_DIGESTS = "digests.json"
"""The digests of the bundle's adapters that the recipe has the rows of, written when all else is."""
_ADAPTERS = "adapters"
"""Folder with the adapters of the packed bundle as they were trained: the next training starts from them."""


def kept_folder(bundle: Path) -> Path:
    """The folder with what is kept for the bundle."""
    return beside(bundle, ".learn")


def recipe_beside(
    bundle: Path,
    names: Collection[str],
    settings: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Recipe | None:
    """The recipe with the rows of these adapters of the bundle: the kept one, or the one that a build of data made.

    All adapters have the rows that were kept for them, in whichever recipe that is. What was kept for an adapter that
    was replaced since, as by another build, counts no more. `settings` and `flags` are those of `load_recipe`.
    """
    manifest, settings = read_manifest(bundle), settings or {}
    kept = {folder / RECIPE: own for folder, own in _kept(bundle, manifest)}
    whole = [path for path, own in kept.items() if own >= {*names}]
    first = next((path for path in (*whole, beside(bundle, ".yaml")) if path.is_file()), None)
    if first is None:
        return None
    sources = dict.fromkeys(manifest.adapters, first)
    for path, own in reversed([*kept.items()]):
        sources |= dict.fromkeys(own - kept.get(first, set()), path)

    def loaded(path: Path) -> Recipe:
        others = tuple(f"adapters.{name}." for name, source in sources.items() if source != path)
        own = {key: value for key, value in settings.items() if not key.startswith(others)}
        return load_recipe(path, manifest, own, flags)

    recipe, specs = loaded(first), dict[str, AdapterSpec]()
    for path in {*sources.values()} - {first}:
        other = loaded(path)
        specs |= {name: _alone(other, name) for name, source in sources.items() if source == path}
    return recipe.model_copy(update={"adapters": {**recipe.adapters, **specs}})


def _alone(recipe: Recipe, name: str) -> AdapterSpec:
    """The section of an adapter with the options of training that it has from its recipe."""
    training = recipe.training.under(recipe.adapters[name].training)
    own = TrainingSpec(**training.model_dump(exclude_unset=True, exclude={"device"}))
    return recipe.adapters[name].model_copy(update={"training": own})


def load_recipe(
    source: Path | Recipe, manifest: Manifest, settings: Mapping[str, Any], flags: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe, or that of a file, whose adapters hold out the rows that the build of the bundle did.

    `settings` and `flags` are those of `Recipe.from_file`.
    """
    loaded = source if isinstance(source, Recipe) else Recipe.from_file(source)
    changes = {**split_of(manifest, [name for name in loaded.adapters if name in manifest.adapters]), **settings}
    if isinstance(source, Recipe):
        return Recipe.from_dict(recipe_values(source), source.folder.absolute(), changes, flags)
    return Recipe.from_file(source, changes, flags)


def system_doubt(manifest: Manifest, task: Task) -> str | None:
    """That the recipe has another system prompt than the bundle's adapter, as after a build with --set."""
    own, other = manifest.adapters[task.name].system or "", task.spec.system or ""
    if own == other:
        return None
    prompts = f"the recipe's system prompt is {shortened(other, 60)!r}, not the bundle's, {shortened(own, 60)!r}"
    return f"{prompts}; to keep that, write it as adapters.{task.name}.system"


def adapter_folders(bundle: Path, name: str) -> list[Path]:
    """Where the bundle's adapter is as it was trained: of the last training that was kept, or of the build."""
    manifest, trained = read_manifest(bundle), _trained(bundle, name)
    kept = [folder / _ADAPTERS / name for folder, names in _kept(bundle, manifest) if name in names]
    # A later build may have trained another one, and packed none.
    result = finished(trained.parent)
    is_packed = result is not None and manifest.adapters[name].training.items() >= result.figures().items()
    return [folder for folder in (*kept, *([trained] if is_packed else [])) if folder.is_dir()]


@contextmanager
def unchanged(bundle: Path, manifest: Manifest, out: Path) -> Iterator[None]:
    """Keep other processes from changing `out` in the block.

    UsageError if `out` is the bundle, and one changed it since its manifest was read.
    """
    with locked(out):
        if out.resolve() == bundle.resolve() and read_manifest(bundle) != manifest:
            message = f"{bundle} was changed while its adapters were trained again"
            raise UsageError(message, "run the same command again")
        yield


def swap_in_and_keep(recipe: Recipe, names: Collection[str], staged: Path, out: Path) -> None:
    """Put the bundle `staged` in the place of `out`, and keep its recipe and its adapters `names`, which were trained.

    At any moment what is kept for the bundle at `out` is complete. OutOfSpaceError leaves both as they were.
    """
    manifest = read_manifest(staged)
    before = _kept(out, manifest)
    folder = Path(mkdtemp(prefix=_KEPT, dir=kept_folder(out)))
    try:
        with raising_out_of_space(folder):
            # Another call deletes the folders that its rows are from.
            parents = {Path(str(source)).parent for _, source in recipe.sources()}
            save_recipe(recipe, folder, copied_from=[*filter(_is_kept, parents)])
            for name in names:
                shutil.copytree(_trained(staged, name), folder / _ADAPTERS / name)
            for other, kept in before:
                for name in kept.difference(names):
                    if (other / _ADAPTERS / name).is_dir():
                        shutil.copytree(other / _ADAPTERS / name, folder / _ADAPTERS / name, dirs_exist_ok=True)
        now = {name: digests for name, digests in _digests(manifest).items() if name in recipe.adapters}
        # What another folder has the rows of, it keeps.
        elsewhere = {name for _, kept in before for name in kept}
        digests = {name: own for name, own in now.items() if name not in elsewhere}
        digests |= _read_digests(recipe.folder) if _is_kept(recipe.folder) else {}
        digests |= {name: now[name] for name in names}
        write_file(folder / _DIGESTS, json.dumps(digests))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    swap_in(staged, out)
    still = {name for name, own in now.items() if digests.get(name) == own}
    # Another folder may have the rows of adapters that are not in this recipe.
    needed = {folder, *(other for other, kept in before if not kept <= still)}
    for other in kept_folder(out).glob(f"{_KEPT}*"):
        if other not in needed:
            shutil.rmtree(other, ignore_errors=True)


def _kept(bundle: Path, manifest: Manifest) -> list[tuple[Path, set[str]]]:
    """The folders kept beside a bundle, each with the adapters that are as in the manifest; those with most first."""
    now = _digests(manifest).items()
    folders = [path.parent for path in kept_folder(bundle).glob(f"{_KEPT}*/{_DIGESTS}")]
    found = [(folder, {name for name, digests in _read_digests(folder).items() if (name, digests) in now})
             for folder in folders]  # fmt: skip
    return sorted(found, key=lambda each: -len(each[1]))


def _is_kept(folder: Path) -> bool:
    return folder.name.startswith(_KEPT) and (folder / _DIGESTS).is_file()


def _read_digests(folder: Path) -> dict[str, list[str]]:
    digests: dict[str, list[str]] = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
    return digests


def _digests(manifest: Manifest) -> dict[str, list[str]]:
    """The digests of the files of each adapter."""
    return {
        name: sorted(digest_of_model(manifest.files, file) for file in entry.files.values())
        for name, entry in manifest.adapters.items()
    }


def _trained(bundle: Path, name: str) -> Path:
    return work_folder(bundle) / "train" / name / "adapter"

"""The recipe and the trained adapters that are kept beside a bundle, in `BUNDLE.learn`, for the next training."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from edgetune.common.work_folder import work_folder
from edgetune.recipe.model import Recipe
from edgetune.recipe.saved import RECIPE, save_recipe

_ADAPTERS = "adapters"
"""Folder with the adapters of the packed bundle as they were trained: the next training starts from them."""


def kept_folder(bundle: Path) -> Path:
    """The folder with what is kept for the bundle."""
    return bundle.with_name(f"{bundle.name}.learn")


def recipe_beside(bundle: Path) -> Path | None:
    """The recipe with the rows of the bundle: the one that was kept, or the one that a build of data files made."""
    candidates = (kept_folder(bundle) / RECIPE, bundle.with_name(f"{bundle.name}.yaml"))
    return next((path for path in candidates if path.is_file()), None)


def adapter_folders(bundle: Path, name: str) -> list[Path]:
    """Where the adapter may be as it was trained: of the last training that was kept, or of the build."""
    folders = (kept_folder(bundle) / _ADAPTERS / name, _trained(bundle, name))
    return [folder for folder in folders if folder.is_dir()]


def keep(recipe: Recipe, names: Iterable[str], staged: Path, out: Path) -> None:
    """Keep the recipe of the bundle `out`, and those of its adapters that were trained for the bundle `staged`."""
    folder = kept_folder(out)
    save_recipe(recipe, folder)
    for name in names:
        target = folder / _ADAPTERS / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(_trained(staged, name), target)


def forget_adapters(bundle: Path) -> None:
    """Delete the adapters that were kept, because the bundle gets another base."""
    shutil.rmtree(kept_folder(bundle) / _ADAPTERS, ignore_errors=True)


def _trained(bundle: Path, name: str) -> Path:
    return work_folder(bundle) / "train" / name / "adapter"

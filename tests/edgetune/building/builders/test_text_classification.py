from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime.errors import IncompatibleError
from recipes import adapter_of, make_recipe

from edgetune.building import builders
from edgetune.recipe.model import Recipe


def recipe_of(folder: Path, method: str) -> Recipe:
    return make_recipe(folder, "encoder", {"lights": adapter_of(method)}, task="text-classification")


def test_an_encoder_is_tuned_by_low_rank_methods_alone(tmp_path: Path) -> None:
    builder = builders.load("text-classification")
    assert builder.shapes(recipe_of(tmp_path, "lora")) == {"lights": {"onnx": "low_rank"}}
    with pytest.raises(IncompatibleError, match="adapter 'lights': prefix does not work with encoders"):
        builder.shapes(recipe_of(tmp_path, "prefix"))

from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime.errors import IncompatibleError

from edgetune.building import builders
from edgetune.recipe.model import Recipe


def recipe_of(folder: Path, method: str) -> Recipe:
    """A recipe for an encoder whose one adapter is tuned by `method`."""
    adapter = {"data": {"train": "rows.jsonl"}, "method": method}
    values = {"name": "tiny", "task": "text-classification", "base": "encoder", "adapters": {"lights": adapter}}
    return Recipe.model_validate(values, context={"folder": folder})


def test_an_encoder_is_tuned_by_low_rank_methods_alone(tmp_path: Path) -> None:
    builder = builders.load("text-classification")
    assert builder.shapes(recipe_of(tmp_path, "lora")) == {"lights": {"onnx": "low_rank"}}
    with pytest.raises(IncompatibleError, match="adapter 'lights': prefix does not work with encoders"):
        builder.shapes(recipe_of(tmp_path, "prefix"))

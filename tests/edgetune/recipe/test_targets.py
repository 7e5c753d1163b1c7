from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from edgetune_runtime.errors import IncompatibleError
from recipes import adapter_of, make_recipe

from edgetune import methods
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_in, shapes_of


def recipe_of(folder: Path, method: str, targets: Sequence[str] = ("gguf",), **adapter: object) -> Recipe:
    return make_recipe(folder, "base.gguf", {"lights": adapter_of(method, **adapter)}, targets=targets)


def shapes(method: str, *, merged: bool = False) -> dict[str, str]:
    options = methods.load(method).options()
    return shapes_in(["gguf", "onnx"], method, options, merged=merged)


@pytest.mark.parametrize(
    ("method", "gguf", "onnx"),
    [
        ("lora", "low_rank", "low_rank"),
        ("full", "merged", "merged"),
        ("ia3", "merged", "tensors"),
        ("prefix", "prefix", "prefix"),
    ],
)
def test_a_method_has_a_shape_in_each_format(method: str, gguf: str, onnx: str) -> None:
    assert shapes(method) == {"gguf": gguf, "onnx": onnx}


def test_a_merged_adapter_is_a_whole_model_in_each_format() -> None:
    assert shapes("lora", merged=True) == {"gguf": "merged", "onnx": "merged"}


def test_a_method_that_a_target_does_not_support_is_refused_with_the_adapter_and_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="adapter 'lights': ") as refused:
        shapes_of(recipe_of(tmp_path, "bottleneck"))
    assert "gguf" in refused.value.message
    assert refused.value.remedy
    shapes_of(recipe_of(tmp_path, "bottleneck", targets=["onnx"]))


def test_a_scale_is_refused_where_there_is_nothing_to_scale(tmp_path: Path) -> None:
    shapes_of(recipe_of(tmp_path, "lora", scale=0.5))
    with pytest.raises(IncompatibleError, match="what full trains has no scale"):
        shapes_of(recipe_of(tmp_path, "full", scale=0.5))


def test_an_encoder_is_tuned_by_low_rank_methods_alone(tmp_path: Path) -> None:
    def recipe_for(method: str) -> Recipe:
        return make_recipe(tmp_path, "encoder", {"lights": adapter_of(method)}, task="text-classification")

    assert shapes_of(recipe_for("lora")) == {"lights": {"onnx": "low_rank"}}
    with pytest.raises(IncompatibleError, match="adapter 'lights': prefix does not work with encoders"):
        shapes_of(recipe_for("prefix"))

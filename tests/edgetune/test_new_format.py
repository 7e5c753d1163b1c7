"""A format and its engine are two folders: nothing else changes for a build to write, check and run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_export import backends
from edgetune_runtime import Runtime, engines
from edgetune_runtime.bundle import read_manifest
from recipes import adapter_of, make_recipe
from trainings import QUIET

from edgetune.building.pipeline import build

FORMAT = """
from edgetune_export.backends.format import Format

FORMAT = Format(adapter_dtypes=("f32",))
"""
# Whole copies of GGUF files under another name.
BACKEND = """
import shutil

from edgetune_export.backends.gguf import backend as gguf

SHAPES = ("low_rank", "merged")
ADAPTER_FILE = "adapter.toy"
MODEL_FILE = "model.toy"
PACKAGES = ("numpy",)
write_adapter = gguf.write_adapter
write_merged = gguf.write_merged
weight_type = gguf.weight_type
values_by_type = gguf.values_by_type


def write_base(source, folder, adapters):
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(source.path, folder / "base.toy")
"""
ENGINES = """
from edgetune_runtime.bundle import GENERATION

ENGINES = {GENERATION: "engine"}
KV_TYPES = ("f16",)
"""
ENGINE = """
from edgetune_runtime.engines.gguf.engine import GgufEngine


class ToyEngine(GgufEngine):
    pass


ENGINE = ToyEngine
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a format whose backend and engine are in a temporary folder."""
    for package, files in (
        (backends, {"__init__.py": FORMAT, "backend.py": BACKEND}),
        (engines, {"__init__.py": ENGINES, "engine.py": ENGINE}),
    ):
        folder = tmp_path / package.__name__ / "toy"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder.parent)])
    return "toy"


def test_a_format_in_a_folder_of_its_own_is_built_checked_and_run(
    toy: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"plain": adapter_of(), "whole": adapter_of(merged=True)}
    keys = {"targets": ["gguf", toy], "training": {"max_steps": 2}}
    build(make_recipe(tmp_path, tiny_gguf("llama"), adapters, **keys), tmp_path / "home", progress=QUIET)

    manifest = read_manifest(tmp_path / "home")
    assert manifest.base.files[toy] == "base/base.toy"
    assert manifest.adapters["plain"].files[toy] == "adapters/plain/adapter.toy"
    assert set(manifest.adapters["plain"].parity) == set(manifest.adapters["whole"].parity) == {"gguf", toy}
    assert "numpy" in manifest.versions
    for name in (None, "plain", "whole"):
        answers = set()
        for engine in ("gguf", toy):
            with Runtime.open(tmp_path / "home", engine=engine) as runtime:
                answers.add(runtime.generate("turn on the light 1", adapter=name, max_tokens=8).text)
        assert len(answers) == 1

"""The worked examples of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgetune_devices import boards
from edgetune_export import backends
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime import engines
from edgetune_runtime.errors import NotFoundError
from trainings import job, learn

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.recipe import targets

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", PAGE, re.DOTALL))


def written(name: str, folder: Path) -> Path:
    """The example file whose path ends with `name`, in `folder`, under the last parts of that path."""
    (text,) = (text for path, text in FILES.items() if path.endswith(name))
    path = folder.joinpath(*Path(name).parts[-2:])
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_method_is_found_trains_and_folds(
    tiny_base: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written("lora_fa.py", tmp_path)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "lora_fa" in methods.names()
    base = bases.load_torch(tiny_base("llama"), torch.float32)
    work = job("lora_fa", {"r": 4})
    result = learn(base, work, tmp_path / "out")
    assert result.val_loss < result.history[0].val_loss
    checkpoint = methods.Checkpoint("reply", tmp_path / "out/adapter", base, work.options)
    assert work.method.fold(checkpoint, "low_rank").shape == "low_rank"
    trained = work.method.attach(base, work.options, 1)
    assert all("lora_B" in name for name, p in trained.named_parameters() if p.requires_grad)
    shape = BaseShape.of_header(tiny_base("llama").header)
    assert (
        work.method.trained_parameters(work.method.trained(shape, work.options), work.options)
        == result.trainable_parameters
    )


def test_the_format_is_found_and_writes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("npz/backend.py", tmp_path)
    written("backends/npz/__init__.py", tmp_path)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    assert "npz" in backends.names()
    assert backends.format_of("npz").adapter_dtypes == ("f32",)
    npz = backends.load("npz")
    assert targets.shapes_in(["npz"], "lora", methods.load("lora").options()) == {"npz": "low_rank"}
    delta = Delta(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    adapter = LowRank("reply", "lora", {"model.layers.0.self_attn.q_proj": delta})
    npz.write_adapter(adapter, tmp_path, tmp_path / npz.ADAPTER_FILE, base_fingerprint="ab")
    with np.load(tmp_path / npz.ADAPTER_FILE) as arrays:
        assert str(arrays["base"]) == "ab"
        assert arrays["model.layers.0.self_attn.q_proj.b"].shape == (4, 2)
    assert npz.values_by_type(tmp_path / npz.ADAPTER_FILE) == {"f32": 14}


def test_the_engine_is_found_and_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("npz/engine.py", tmp_path)
    written("engines/npz/__init__.py", tmp_path)
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    engine = engines.load("npz")(tmp_path, context_length=16)
    engine.load_adapter("reply", tmp_path / "adapter.npz")
    engine.activate({"reply": 1.0})
    with pytest.raises(NotFoundError, match="is not loaded"):
        engine.activate({"other": 1.0})


def test_the_board_has_all_figures_and_sources(tmp_path: Path) -> None:
    assert boards.read(written("bpi-m7.toml", tmp_path)).cores == 4


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_python_blocks_compile(code: str) -> None:
    compile(code, "CONTRIBUTING.md", "exec")

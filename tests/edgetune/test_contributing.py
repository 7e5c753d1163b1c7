"""The worked examples of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgetune_devices import boards
from trainings import job, learn

from edgetune import bases, methods
from edgetune.bases import Base

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", PAGE, re.DOTALL))


def written(name: str, folder: Path) -> Path:
    """The example file whose path ends with `name`, in `folder`."""
    (text,) = (text for path, text in FILES.items() if path.endswith(name))
    path = folder / name
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


def test_the_board_has_all_figures_and_sources(tmp_path: Path) -> None:
    assert boards.read(written("orange-pi-5.toml", tmp_path)).cores == 4


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_python_blocks_compile(code: str) -> None:
    compile(code, "CONTRIBUTING.md", "exec")

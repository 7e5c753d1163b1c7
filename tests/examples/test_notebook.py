"""The notebook has the cells of its script and runs; the README shows examples/runtime.py word for word."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from edgetune_runtime.bundle import read_manifest
from examples.conftest import EXAMPLES
from nbclient import NotebookClient

NOTEBOOK = EXAMPLES / "notebook.ipynb"


def test_the_readme_shows_the_file_word_for_word() -> None:
    text = (EXAMPLES / "runtime.py").read_text(encoding="utf-8")
    assert f"```python\n{text}```\n" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20


def test_the_notebook_has_the_cells_of_the_script_and_no_outputs() -> None:
    script = NOTEBOOK.with_suffix(".py").read_text(encoding="utf-8")
    notebook_of = runpy.run_path(str(EXAMPLES.parent / "tools" / "notebook.py"))["notebook_of"]
    assert json.loads(NOTEBOOK.read_text(encoding="utf-8")) == notebook_of(script), "run python tools/notebook.py"
    assert len([line for line in script.splitlines() if line and not line.startswith("#")]) <= 30


def test_the_notebook_runs(tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    notebook.cells[1].source = notebook.cells[1].source.replace('"smollm2-135m"', repr(str(tiny_gguf("llama"))))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert read_manifest(tmp_path / "build/notebook").name == "notebook"
    _, _, build, score, answer = notebook.cells
    shown = "".join(str(output.get("data", {}).get("text/plain", "")) for output in build.outputs)
    assert "loading the base" in shown and "Point(step=" in shown
    assert score.outputs[-1].data["text/plain"].startswith("Evaluation(score=")
    assert answer.outputs[-1].text.startswith("{")

"""Writes examples/notebook.ipynb from examples/notebook.py, without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "examples" / "notebook.py"
MARK, MARKDOWN = "# %%", "# %% [markdown]\n"


def notebook_of(text: str) -> dict[str, Any]:
    """The notebook of a script: `# %%` begins a cell, and `# %% [markdown]` one of text in comments."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [_cell(f"cell-{number}", MARK + part) for number, part in enumerate(text.split(MARK)[1:], 1)]
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(name: str, text: str) -> dict[str, Any]:
    lines = text.rstrip().split("\n", 1)[1].splitlines(keepends=True)
    if text.startswith(MARKDOWN):
        source = [line.removeprefix("#").removeprefix(" ") for line in lines]
        return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}
    empty: dict[str, Any] = {"execution_count": None, "metadata": {}, "outputs": []}
    return {"cell_type": "code", "id": name, **empty, "source": lines}


if __name__ == "__main__":
    notebook = json.dumps(notebook_of(SOURCE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    SOURCE.with_suffix(".ipynb").write_text(f"{notebook}\n", encoding="utf-8")

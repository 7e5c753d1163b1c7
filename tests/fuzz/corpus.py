"""The corpus: files that once ended a process, hung or raised, or might, as edits of a valid file, a JSON line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .forms.raw import Edit

FOLDER = Path(__file__).parents[1] / "corpus"


@dataclass(frozen=True)
class Entry:
    """One file of a kind: what it did, and its edits."""

    kind: str
    cause: str
    edits: Sequence[Edit]


def kinds() -> list[str]:
    """The kinds that the corpus has files of."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def entries(kind: str) -> list[Entry]:
    """The files of a kind."""
    path = FOLDER / f"{kind}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Entry(kind, raw["cause"], raw["edits"]) for raw in map(json.loads, lines)]


def add(kind: str, cause: str, edits: Sequence[Edit]) -> None:
    """Add a file, unless there is one with this cause."""
    if all(entry.cause != cause for entry in entries(kind)):
        FOLDER.mkdir(exist_ok=True)
        with (FOLDER / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cause": cause, "edits": edits}) + "\n")

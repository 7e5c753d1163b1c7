"""Groups data files into tasks by their names, and reads a bounded sample of each."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError

from edgetune.recipe.parts import NAME_LENGTH
from edgetune.tasks.row_files import DELIMITERS, JSONL_SUFFIXES, entries

SUFFIXES = (*JSONL_SUFFIXES, *DELIMITERS)
SAMPLE_BYTES = 8_000_000
"""Only this part of a larger file is read."""
# intent-train.jsonl, intent_validation.csv, test.csv
_ROLE = re.compile(r"(?:(?P<name>.+)[-_. ])?(?P<role>train|training|validation|valid|val|dev|test)", re.IGNORECASE)
_ROLES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}


@dataclass
class TaskFiles:
    """The files of one task."""

    name: str
    train: Path
    validation: Path | None = None
    test: Path | None = None


@dataclass(frozen=True)
class Sample:
    """The first entries of a data file, as `row_files.entries` gives them, and about how many the whole file has."""

    entries: Sequence[tuple[str, Any]]
    rows: int
    is_whole: bool

    @property
    def values(self) -> list[Mapping[str, Any]]:
        """The entries that are objects."""
        return [values for _, values in self.entries if isinstance(values, dict)]

    def __str__(self) -> str:
        if self.is_whole:
            return f"{self.rows:,} rows"
        return f"the first {len(self.entries):,} of about {self.rows:,} rows ({SAMPLE_BYTES // 10**6} MB were read)"


def is_data(path: Path) -> bool:
    """Whether a path names a data file, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def tasks_of(files: Sequence[Path]) -> list[TaskFiles]:
    """One task per file, in order; NAME-validation and NAME-test belong to the task of NAME-train or NAME.

    UsageError for two files that would give the same name.
    """
    tasks: dict[str, TaskFiles] = {}
    # The same file may be named twice, as by two overlapping patterns.
    parsed = [(path, *_name_and_role(path)) for path in dict.fromkeys(map(Path, files))]
    names = {name for _, name, role in parsed if role == "train"}
    others = []
    for path, name, role in parsed:
        if role != "train" and name in names:
            others.append((path, name, role))
            continue
        task = TaskFiles(name if role == "train" else slug(path.stem), path)
        if task.name in tasks:
            message = f"{tasks[task.name].train} and {path} would both make the adapter {task.name!r}"
            raise UsageError(message, "rename one of them")
        tasks[task.name] = task
    for path, name, role in others:
        first = getattr(tasks[name], role)
        if first is not None:
            raise UsageError(f"{first} and {path} are both the {role} rows of {name!r}", "leave one of them out")
        setattr(tasks[name], role, path)
    return list(tasks.values())


def read_sample(path: Path) -> Sample:
    """Entries in the first `SAMPLE_BYTES` of a file; errors of `row_files.entries`, and UsageError without any."""
    if not path.is_file() and not path.is_dir():
        raise NotFoundError(f"no data file {path}", "check the path")
    sampled: list[tuple[str, Any]] = []
    size = path.stat().st_size
    is_whole = size <= SAMPLE_BYTES
    try:
        for entry in entries(str(path), SAMPLE_BYTES):
            sampled.append(entry)
    except UsageError:
        # A quoted field of a table may go on after the sample; the rows before it are whole.
        if is_whole or not sampled:
            raise
    if not sampled and not is_whole:
        message = f"no row of {path} ends within its first {SAMPLE_BYTES // 10**6} MB"
        raise UsageError(message, "shorten its first row, or put another one first")
    if not sampled:
        raise UsageError(f"{path} has no rows", "add at least two rows")
    return Sample(sampled, len(sampled) if is_whole else round(len(sampled) * size / SAMPLE_BYTES), is_whole)


def test_file_of(train: Path) -> Path | None:
    """The file with the test rows of a task, beside that with its training rows; None if there is none."""
    name, _ = _name_and_role(train)
    beside = sorted(path for path in train.parent.iterdir() if is_data(path) and path != train)
    return next((path for path in beside if _name_and_role(path) == (name, "test")), None)


def _name_and_role(path: Path) -> tuple[str, str]:
    match = _ROLE.fullmatch(path.stem)
    if match is None:
        return slug(path.stem), "train"
    role = match["role"].lower()
    return slug(match["name"] or path.resolve().parent.name), _ROLES.get(role, role)


def slug(text: str) -> str:
    """A name that recipes allow."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).lstrip("-")[:NAME_LENGTH].rstrip("-") or "task"

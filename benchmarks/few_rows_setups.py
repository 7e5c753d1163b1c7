"""The tasks and the ways to train that `few_rows.py` compares."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
DEVICES = "devices"


@dataclass(frozen=True)
class FewRowsTask:
    """A task: files of its training and test rows, and the keys of its adapter besides data and training.

    `folder` is below `--data`, or an absolute path.
    """

    folder: str | Path
    train: str
    test: str
    keys: Mapping[str, Any]
    columns: Mapping[str, Any] | None = None
    has_choices: bool = False


TASKS = {
    "snips": FewRowsTask(
        "snips",
        "train.jsonl",
        "validation.jsonl",
        {"system": "Sentence to JSON.", "output": "auto", "metric": "json"},
        {"prompt": "text", "completion": ["intent", "slots"]},
    ),
    "viggo": FewRowsTask(
        "viggo",
        "train.jsonl",
        "test.jsonl",
        {"system": "Sentence to meaning.", "metric": "exact"},
        {"prompt": "ref", "completion": "mr"},
    ),
    # A choice of 77 labels that is decoded: as fast as the other tasks.
    "banking77": FewRowsTask(
        "banking77",
        "train.jsonl",
        "test.jsonl",
        {"system": "Name the intent.", "metric": "exact"},
        {"prompt": "text", "completion": "label"},
        has_choices=True,
    ),
    "smart-home": FewRowsTask(
        EXAMPLES / "smart-home" / "data",
        "command-train.jsonl",
        "command-test.jsonl",
        {"system": "Home command to JSON.", "output": "auto", "metric": "json"},
    ),
    DEVICES: FewRowsTask(
        DEVICES, "calls-train.jsonl", "calls-test.jsonl", {"system": "Home calls.", "output": "auto", "metric": "json"}
    ),
}


def make_devices(work: Path, tasks: Path) -> Path:
    """The folder of rows of the example home-assistant, which say nothing that the rows of `tasks` say."""
    folder = work / DEVICES
    if not (folder / TASKS[DEVICES].train).exists():
        script = EXAMPLES / "home-assistant" / "generate.py"
        command: list[str | Path] = [sys.executable, script, "--rows", "2000", "--exclude", tasks, "--out", folder]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


@cache
def rows_of(file: Path) -> tuple[str, ...]:
    """The rows of a file, as JSON."""
    return tuple(file.read_text(encoding="utf-8").splitlines())


def adapter_of(task: FewRowsTask, folder: Path, count: int, seed: int, work: Path) -> dict[str, Any]:
    """The keys of an adapter trained on `count` random rows; the seed decides which."""
    lines = rows_of(folder / task.train)
    train = work / f"train-{count}-{seed}.jsonl"
    train.parent.mkdir(parents=True, exist_ok=True)
    train.write_text("\n".join(random.Random(seed).sample(lines, count)) + "\n", encoding="utf-8")
    # A tenth of few rows shows little.
    data: dict[str, Any] = {"train": str(train.resolve()), "held_out": 0.2 if count < 200 else 0.1}
    if task.columns is not None:
        data["columns"] = dict(task.columns)
    keys = dict(task.keys)
    if task.has_choices:
        completion = (task.columns or {})["completion"]
        keys["output"] = {"choices": sorted({json.loads(line)[completion] for line in lines})}
    return {"data": data, **keys}


def _auto(method: Mapping[str, Any] | None = None, **training: object) -> dict[str, Any]:
    """`training: auto`, with these options in place of what it chooses."""
    own = {} if method is None else {"method": {"name": "lora", **method}}
    return {"training": {"auto": True, **training}, **own}


WAYS: Mapping[str, dict[str, Any]] = {
    "defaults": {},
    "lowest-loss": _auto(patience=3, checkpoint="best"),
    "auto": _auto(),
    "augment": {**_auto(), "data": {"augment": True}},
    "rate-5e-4": _auto(learning_rate=5e-4),
    "rate-2e-3": _auto(learning_rate=2e-3),
    "rank-8": _auto({"r": 8, "lora_alpha": 16}),
    "rank-32": _auto({"r": 32, "lora_alpha": 64}),
    "dropout": _auto({"lora_dropout": 0.1}),
}
"""The ways to train, as keys of an adapter; the first ones are what `few_rows.py` runs."""
DEFAULT_WAYS = tuple(WAYS)[:4]

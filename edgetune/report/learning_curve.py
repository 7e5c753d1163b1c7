"""Reads the learning curve of a comparison (`edgetune compare --rows`), for the report of a bundle."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import UsageError


@dataclass(frozen=True)
class LearningCurve:
    """The scores of a task over the number of training rows: a PNG file in base64, and what more rows would give.

    `base` is that of the comparison, which need not be the bundle's.
    """

    task: str
    base: str
    picture: str
    sentences: Sequence[str]


def learning_curve_of(folder: Path) -> LearningCurve:
    """The curve in the folder that `edgetune compare --out` wrote; UsageError if there is none."""
    try:
        compared = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        task, base = str(compared["task"]), str(compared["base"])
        sentences = [str(sentence) for sentence in compared["more_rows"]]
        picture = base64.b64encode((folder / "rows.png").read_bytes()).decode("ascii") if sentences else ""
    except OSError as error:
        raise _no_curve(folder, f": {error.filename}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise _no_curve(folder, f": {error}") from error
    if not sentences:
        raise _no_curve(folder, ", as it has scores for one number of rows")
    return LearningCurve(task, base, picture, sentences)


def _no_curve(folder: Path, reason: str) -> UsageError:
    remedy = "make one with: edgetune compare RECIPE --task NAME --methods lora --rows 30,100,300 --out DIR"
    return UsageError(f"{folder} has no learning curve{reason}", remedy)

"""Finished trainings in a file, so that an interrupted benchmark resumes, and tables of their scores over the seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .tables import markdown

Run = dict[str, Any]


class Runs:
    """Runs in a file of JSON lines, which may not be there yet: what was trained and how, and a `score` from 0 to 1."""

    def __init__(self, file: Path) -> None:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._file, self._runs = file, [json.loads(line) for line in lines]

    def of(self, place: Mapping[str, Any]) -> list[Run]:
        """The runs that have these values."""
        return [run for run in self._runs if run.items() >= place.items()]

    def add(self, runs: Iterable[Run]) -> None:
        """Append runs to the file."""
        added = list(runs)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(run)}\n" for run in added)
        self._runs += added


def summary(runs: Iterable[Run], keys: Sequence[str]) -> list[Run]:
    """Mean and standard deviation of the scores in percent, over the runs with the same values of `keys`."""
    scores_by_place: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        scores = scores_by_place.setdefault(tuple(run[key] for key in keys), [])
        scores += [100 * run["score"]] if "score" in run else []
    return [
        {
            **dict(zip(keys, place, strict=True)),
            "mean": round(fmean(scores), 2) if scores else None,
            "sd": round(stdev(scores), 2) if len(scores) > 1 else None,
            "seeds": len(scores),
        }
        for place, scores in scores_by_place.items()
    ]


def score_table(lines: Iterable[Run], keys: Sequence[str], ways: Sequence[str]) -> str:
    """The lines of a summary as a Markdown table: a column per way, and "refused" where no run has a score."""
    rows: dict[tuple[Any, ...], Run] = {}
    for line in lines:
        spread = "" if line["sd"] is None else f" ± {line['sd']:.1f}"
        cell = "refused" if line["mean"] is None else f"{line['mean']:.1f}{spread} ({line['seeds']})"
        place = {key: line[key] for key in keys}
        rows.setdefault(tuple(place.values()), place)[line["way"]] = cell
    about = "Score in percent of the test rows: mean ± standard deviation (seeds)."
    return f"{about}\n\n{markdown(rows.values(), {name: f'{{{name}}}' for name in (*keys, *ways)})}"

"""Measure the scores of adapters trained on few rows, by the way to train, and draw learning curves.

    python benchmarks/few_rows.py --data DIR --work build/few-rows --out benchmarks/results
    python benchmarks/few_rows.py --data DIR --work build/few-rows --only snips --rows 30 --ways defaults auto

A build per task, number of rows and seed trains one adapter per way on the same rows; llama.cpp then answers the same
test rows with each. Finished runs are lines of WORK/runs.jsonl and are not repeated, so that an interrupted benchmark
resumes; `--finished` reports them. With DIR/snips, viggo, banking77 and ha_assist/tasks.jsonl.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.plots import subplots
from benchmarks.harness.runs import Run, Runs, score_table, summary
from benchmarks.harness.tables import progress

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import edgetune
from benchmarks.few_rows_setups import DEFAULT_WAYS, DEVICES, TASKS, WAYS, adapter_of, make_devices, rows_of

ROWS = (30, 100, 300, 1000)
_FIGURES = ("steps", "shipped_step", "train_loss", "val_loss", "tokens")
KEYS = ("task", "rows", "way")


@dataclass(frozen=True)
class Draw:
    """A random choice of training rows of a task."""

    task: str
    rows: int
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.rows} rows, seed {self.seed}"


def main() -> None:
    """Train and score what is not finished, and report."""
    parser = BENCHMARK.parser(only=tuple(TASKS), works=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the tasks (default: %(default)s)")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows, with those held out")
    parser.add_argument("--seeds", type=int, default=3, help="choices of the rows (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=DEFAULT_WAYS, metavar="WAY")
    parser.add_argument("--test-rows", type=int, default=150, help="most rows to score (default: %(default)s)")
    parser.add_argument("--finished", action="store_true", help="report the finished runs, train nothing")
    options = BENCHMARK.options(parser, rows=[12], seeds=1, test_rows=4)
    with work_folder(options) as work:
        runs = Runs(work / "runs.jsonl")
        if not options.finished:
            for draw in _draws(options, work):
                done = {run["way"] for run in _finished(runs, options, **asdict(draw))}
                if ways := [way for way in options.ways if way not in done]:
                    runs.add(_measured(draw, ways, options, work))
        chosen = [run for run in _finished(runs, options) if _is_chosen(run, options)]
    lines = summary(sorted(chosen, key=itemgetter(*KEYS)), KEYS)
    BENCHMARK.report(options, {"summary": lines, "runs": chosen})


def _is_chosen(run: Run, options: argparse.Namespace) -> bool:
    is_asked = run["task"] in options.only and run["way"] in options.ways
    return is_asked and run["rows"] in options.rows and run["seed"] < options.seeds


def _draws(options: argparse.Namespace, work: Path) -> Iterator[Draw]:
    """Few rows first, and one seed of everything before the next."""
    for seed in range(options.seeds):
        for rows in sorted(options.rows):
            for task in options.only:
                if rows <= len(rows_of(_folder(task, options, work) / TASKS[task].train)):
                    yield Draw(task, rows, seed)


def _folder(task: str, options: argparse.Namespace, work: Path) -> Path:
    if task == DEVICES:
        return make_devices(work, options.data / "ha_assist" / "tasks.jsonl")
    return Path(options.data / TASKS[task].folder)


def _finished(runs: Runs, options: argparse.Namespace, **draw: object) -> list[Run]:
    """The finished runs on this base that were scored on as many rows, or more."""
    return [run for run in runs.of({"base": options.base, **draw}) if run["limit"] >= options.test_rows]


def _measured(draw: Draw, ways: Sequence[str], options: argparse.Namespace, work: Path) -> Iterator[Run]:
    """Build a bundle with an adapter per way and score them."""
    progress(f"{draw}: {', '.join(ways)}")
    task, folder, out = TASKS[draw.task], _folder(draw.task, options, work), work / draw.task / "bundle"
    common = adapter_of(task, folder, draw.rows, draw.seed, out.parent)
    values = {
        "name": "few-rows",
        "base": options.base,
        "context_length": 512,
        "training": {"seed": draw.seed},
        "adapters": {way: _with_way(common, WAYS[way]) for way in ways},
    }
    built = edgetune.build(values, out)
    for way in ways:
        scored = edgetune.evaluate(out, folder / task.test, way, limit=options.test_rows)
        figures = {key: built.figures[way][key] for key in _FIGURES}
        place = {**asdict(draw), "way": way, "base": options.base, "limit": options.test_rows}
        yield {**place, "score": scored.score, "metric": scored.metric, "test_rows": scored.rows, **figures}


def _with_way(common: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    return {**common, **keys, "data": {**common["data"], **keys.get("data", {})}}


def table(result: Result) -> str:
    """A line per task and number of rows, a column per way."""
    return score_table(result["summary"], KEYS[:-1], _in_order(line["way"] for line in result["summary"]))


def plot(result: Result, out: Path) -> None:
    """A learning curve per way with a band of one standard deviation, a panel per task."""
    lines = result["summary"]
    tasks = sorted({line["task"] for line in lines})
    with subplots(out, 1, max(1, len(tasks)), dpi=120, figsize=(4.2 * max(1, len(tasks)), 3.6), squeeze=False) as axes:
        for task, axis in zip(tasks, axes.flat, strict=True):
            for way in _in_order(line["way"] for line in lines):
                own = [line for line in lines if (line["task"], line["way"]) == (task, way)]
                rows, means = [line["rows"] for line in own], [line["mean"] for line in own]
                spread = [line["sd"] or 0 for line in own]
                low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                axis.plot(rows, means, "o-", label=way)
                axis.fill_between(rows, low, high, alpha=0.15)
            axis.set(xscale="log", xlabel="rows", ylabel="score, %", title=task)
            axis.set_xticks(ROWS, [str(count) for count in ROWS])
            axis.minorticks_off()
        axes.flat[0].legend(fontsize=8)


def _in_order(ways: Iterable[str]) -> list[str]:
    present = set(ways)
    return [way for way in WAYS if way in present]


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

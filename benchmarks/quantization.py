"""Compare adapters beside a quantized base with ways to merge them into it, by score.

    python benchmarks/quantization.py --data DIR --work build/quantization --out benchmarks/results
    python benchmarks/quantization.py --data DIR --work build/quantization --only snips --types q4_0 --seeds 1

The ways, each trained on the same rows of the dequantized base:

- `separate`: the adapter is a file beside the base.
- `q8_0`: the same adapter, merged into the base in q8_0.
- `nearest`: the same with a scale of .999, with which it counts as not trained on the grid, merged in the base's own
  type and rounded to nearest. The parity check of a build may refuse it.
- `on-grid`: trained through the rounding to the base's grid, and merged in its type.

Finished runs are lines of WORK/runs.jsonl and are not repeated. With DIR/snips, viggo and banking77.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result, work_folder
from benchmarks.harness.plots import subplots
from benchmarks.harness.runs import Run, Runs, score_table, summary
from benchmarks.harness.tables import progress

import argparse
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, VerificationError

import edgetune
from benchmarks.few_rows_setups import DEVICES, TASKS, adapter_of

TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl", "q3_k_m")
WAYS = ("separate", "q8_0", "nearest", "on-grid")
KEYS = ("base", "task", "type", "engine")
TARGET = "adapter"
PANELS = 3
"""Panels in a row of the plot."""


def keys_of(way: str, quantization: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a way in the recipe, and in its adapter. The first three resume the same training."""
    requested = {"q8_0": "q8_0", "nearest": quantization}.get(way)
    return {"merged_quantization": requested}, {"merged": way != "separate", "scale": 0.999 if way == "nearest" else 1}


def main() -> None:
    """Train and score what is not finished, and report."""
    tasks = tuple(name for name in TASKS if name != DEVICES)
    parser = BENCHMARK.parser(only=tasks, works=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the tasks (default: %(default)s)")
    parser.add_argument("--base", nargs="+", default=["smollm2-135m"], help="names or .gguf files")
    parser.add_argument("--types", nargs="+", default=TYPES, help="quantizations of the base")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rows", type=int, default=1000, help="training rows, with those held out")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="choices of the rows (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=300, help="most rows to score (default: %(default)s)")
    options = BENCHMARK.options(parser, rows=12, seeds=1, test_rows=4, epochs=1)
    with work_folder(options) as work:
        runs = list(_runs(options, work))
    BENCHMARK.report(options, {"summary": summary(runs, (*KEYS, "way")), "runs": runs})


def _runs(options: argparse.Namespace, work: Path) -> Iterator[Run]:
    """All runs, of which those that are not in the file are added to it."""
    runs = Runs(work / "runs.jsonl")
    for seed, base, task, quantization, way in product(
        range(options.seeds), options.base, options.only, options.types, options.ways
    ):
        name = Path(base).stem if base.endswith(".gguf") else base
        place = {"base": name, "task": task, "type": quantization, "way": way, "seed": seed}
        place |= {key: getattr(options, key) for key in ("rows", "epochs", "test_rows")}
        if not runs.of(place):
            progress(f"{name}, {task}, {quantization}, {way}, seed {seed}")
            runs.add({**place, **run} for run in _measured(place, base, options, work))
        yield from runs.of(place)


def _measured(place: Run, base: str, options: argparse.Namespace, work: Path) -> list[Run]:
    """Build a bundle in one way and score it in each engine; one run without a score if the build refuses it."""
    task, out = TASKS[place["task"]], work / "bundle"
    folder = Path(options.data / task.folder)
    in_recipe, in_adapter = keys_of(place["way"], place["type"])
    spec = adapter_of(task, folder, options.rows, place["seed"], work)
    values = {
        "name": "quantization",
        "base": base,
        "quantization": place["type"],
        "context_length": 512,
        "targets": list(options.engines),
        "training": {"seed": place["seed"], "epochs": options.epochs, "batch_size": 8, "learning_rate": 1e-3},
        "adapters": {TARGET: {**spec, **in_adapter, "confidence": False}},
        **in_recipe,
    }
    try:
        built = edgetune.build(values, out)
    except (VerificationError, IncompatibleError) as error:
        return [{"engine": engine, "refused": error.message} for engine in options.engines]
    runs = []
    for engine in options.engines:
        scored = edgetune.evaluate(out, folder / task.test, TARGET, limit=options.test_rows, engine=engine)
        figures = built.figures[TARGET]
        runs.append(
            {
                "engine": engine,
                "score": scored.score,
                "val_loss": figures["val_loss"],
                "kl": figures["parity_by_target"][engine]["kl"],
                "seconds": figures["seconds"],
                "bytes": figures["bytes"],
            }
        )
    return runs


def table(result: Result) -> str:
    """A line per base, task, type and engine, a column per way."""
    return score_table(result["summary"], KEYS, WAYS) + "\nA build refuses what parity refuses.\n"


def plot(result: Result, out: Path) -> None:
    """Scores by type with error bars, a panel per base and task; the first engine."""
    first = [line for line in result["summary"] if line["engine"] == result["summary"][0]["engine"]]
    panels = list(dict.fromkeys((line["base"], line["task"]) for line in first))
    rows, columns = math.ceil(len(panels) / PANELS), min(len(panels), PANELS)
    with subplots(out, rows, columns, dpi=120, figsize=(4.2 * columns, 3.6 * rows), squeeze=False) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for (base, task), axis in zip(panels, axes.flat, strict=False):
            lines = [line for line in first if (line["base"], line["task"]) == (base, task)]
            kinds = list(dict.fromkeys(line["type"] for line in lines))
            for number, way in enumerate(WAYS):
                own = [line for line in lines if line["way"] == way and line["seeds"]]
                # Beside each other, since ways often have the same score.
                places = [kinds.index(line["type"]) + 0.12 * (number - 1.5) for line in own]
                spread = [line["sd"] or 0 for line in own]
                axis.errorbar(places, [line["mean"] for line in own], spread, fmt="o", capsize=4, label=way)
            axis.set_xticks(range(len(kinds)), kinds)
            axis.set(xlim=(-0.5, len(kinds) - 0.5), ylim=(0, 105), ylabel="score, %", title=f"{task}, {base}")
        axes.flat[0].legend(fontsize=8)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

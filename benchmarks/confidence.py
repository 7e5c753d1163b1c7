"""Measure how well confidence is calibrated: trains weak, good and few-row adapters, and asks each engine test rows.

    python benchmarks/confidence.py                    # the tasks of examples/smart-home
    python benchmarks/confidence.py --data DIR         # also DIR/snips, DIR/nlu_home and DIR/banking77

A line has the calibration error of the confidence, what it would be if the confidence were exactly right, and
what it would be without the curve; then the share of wrong answers in all and in the surest 90 %. The curves are
fitted on other rows than the adapters and the test; with few rows on answers of adapters without a fold of these.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result, work_folder
from benchmarks.harness.ranking import auroc
from benchmarks.harness.tables import markdown

import json
import random
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from edgetune_runtime import Runtime
from edgetune_runtime.inference.confidence import log_chance

import edgetune
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks.confidence import bins_of, calibration_error, error_if_exact
from edgetune.tasks.data import read_rows
from edgetune.tasks.evaluation import ScoredRow, score
from edgetune.tasks.plain_prompts import plain

EXAMPLE = Path(__file__).parents[1] / "examples/smart-home/data"
COLUMNS = {"prompt": "text", "completion": ["intent", "slots"]}
JSON_SLOTS: dict[str, Any] = {"columns": COLUMNS, "system": "Sentence to JSON.", "output": "auto"}
TASKS: dict[str, dict[str, Any]] = {
    "command": {"train": "command-train", "test": "command-test", "system": "Home command to JSON.", "output": "auto"},
    "intent": {"train": "intent-train", "test": "intent-test", "system": "Name the intent.", "metric": "label"},
    "snips": {"train": "train", "test": "validation", **JSON_SLOTS},
    "nlu_home": {"train": "train", "test": "test", **JSON_SLOTS},
    "banking77": {"train": "train", "test": "test", "system": "Name the intent.", "metric": "label"},
}
EXAMPLES = ("command", "intent")
STRENGTHS = ("weak", "good", "few")
_REPEATS = 200


def main() -> None:
    parser = BENCHMARK.parser(only=tuple(TASKS), works=True)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with a folder of each other task")
    parser.add_argument("--base", default="smollm2-135m", help="the base (default: %(default)s)")
    parser.add_argument("--train-rows", type=int, default=1000, help="of each adapter (default: %(default)s)")
    parser.add_argument("--fit-rows", type=int, default=150, help="on which curves are fitted (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=300, help="at most (default: %(default)s)")
    parser.add_argument("--weak-epochs", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--few-rows", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--folds", type=int, default=5, help="of these (default: %(default)s)")
    parser.add_argument("--training", nargs="+", choices=STRENGTHS, default=STRENGTHS, help="default: all")
    small = {"few_rows": 24, "folds": 2, "training": ("weak", "few")}
    options = BENCHMARK.options(parser, train_rows=40, fit_rows=24, test_rows=10, weak_epochs=0.1, **small)
    lines = []
    with work_folder(options) as work:
        for task in options.only:
            if task in EXAMPLES or options.data is not None:
                for strength in options.training:
                    lines += measured(task, strength, options, work / f"{task}-{strength}")
    BENCHMARK.report(options, {"tasks": lines})


def measured(task: str, strength: str, options: Namespace, out: Path) -> list[Result]:
    """Build a bundle of one adapter, and ask each of its engines the test rows."""
    folder = EXAMPLE if task in EXAMPLES else options.data / task
    recipe = recipe_of(task, folder, strength, options, out)
    if not out.exists():
        edgetune.build(recipe, out)
    spec, lines = recipe.adapters[task], []
    rows = read_rows(str(out.with_name(f"{out.name}-test.jsonl")), spec.data.columns)
    for engine in ENGINES:
        with Runtime.open(out, engine=engine, disk_mb=0) as runtime:
            details = score(runtime, task, rows, Progress()).details
            share = cost_share(runtime, task, rows[0].messages or ())
        line = {"task": task, "training": strength, "engine": engine, **figures(details), "cost": share}
        # With few rows, the curve is fitted on answers to the folds of these.
        lines.append(line if strength == "few" else {**line, "fit_rows": options.fit_rows})
    return lines


def recipe_of(task: str, folder: Path, strength: str, options: Namespace, out: Path) -> Recipe:
    """The recipe of one adapter, with its rows beside the bundle."""
    values = {key: value for key, value in TASKS[task].items() if key not in ("train", "test", "columns")}
    # A build refuses rows for the curves whose prompt is also one of the training rows.
    by_prompt = {plain(prompt_of(line)): line for line in lines_of(folder / f"{TASKS[task]['train']}.jsonl")}
    lines = [*by_prompt.values()]
    data: dict[str, Any] = {"columns": TASKS[task].get("columns")}
    adapter = {**values, "data": data, "golden": False, "draft": False}
    training: dict[str, Any]
    if strength == "few":
        parts = {"train": lines[: options.few_rows]}
        data["held_out"], adapter["confidence_folds"], training = 0.1, options.folds, {"auto": True}
    else:
        # Of the other rows, half are for validation, and half are for the curves.
        others, rest = lines[: 2 * options.fit_rows], lines[2 * options.fit_rows :]
        parts = {"train": rest[: options.train_rows], "validation": others[::2], "confidence": others[1::2]}
        weak = {"epochs": options.weak_epochs, "learning_rate": 2e-3, "evals": 3}
        training = weak if strength == "weak" else {"auto": True}
    adapter["method"] = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    out.parent.mkdir(parents=True, exist_ok=True)
    used = {line for part in parts.values() for line in part}
    for name, part in {**parts, "test": test_lines(task, folder, lines, used, options.test_rows)}.items():
        file = out.with_name(f"{out.name}-{name}.jsonl")
        file.write_text("\n".join(part) + "\n", encoding="utf-8")
        if name != "test":
            data[name] = file.name
    recipe = {"name": task, "base": options.base, "quantization": "q4_0", "targets": [*ENGINES], "context_length": 512}
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump({**recipe, "training": training, "adapters": {task: adapter}}), encoding="utf-8")
    return Recipe.from_file(path)


def lines_of(path: Path) -> list[str]:
    """The rows of a file, in an order that is always the same."""
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    return lines


def prompt_of(line: str) -> str:
    """The prompt of a row in JSON."""
    row = json.loads(line)
    return str(row.get("text", row.get("prompt")))


def test_lines(task: str, folder: Path, lines: Sequence[str], used: set[str], count: int) -> list[str]:
    """At most `count` test rows; if a public data set has fewer, also training rows that were not used."""
    tests = lines_of(folder / f"{TASKS[task]['test']}.jsonl")
    spare = [] if task in EXAMPLES else [line for line in lines if line not in used]
    return [*tests, *spare][:count]


def figures(details: Sequence[ScoredRow]) -> Result:
    """The calibration of these answers, and what leaving out the least sure tenth brings."""
    rated = [row for row in details if row.confidence is not None and row.log_odds is not None]
    right = [row.score >= 1 for row in rated]
    confidences = [row.confidence or 0.0 for row in rated]
    plain = [1 / (1 + float(np.exp(-(row.log_odds or 0.0)))) for row in rated]
    surest = np.argsort(confidences, kind="stable")[len(rated) // 10 :]
    return {
        "rows": len(details),
        "without": len(details) - len(rated),
        "wrong": 1 - float(np.mean(right)),
        "wrong_of_surest_90": 1 - float(np.mean(np.asarray(right)[surest])),
        "error": calibration_error(bins_of(confidences, right)),
        "error_if_exact": error_if_exact(confidences),
        "error_without_curve": calibration_error(bins_of(plain, right)),
        "auroc": auroc(confidences, right),
        "kinds": sorted({str(row.kind) for row in rated}),
    }


def cost_share(runtime: Runtime, task: str, prompt: Any) -> float:  # noqa: ANN401 - messages
    """The time of what confidence computes per token, as a share of the time per token."""
    timings = runtime.generate(prompt, adapter=task, max_tokens=32, unconstrained=True).timings
    row = np.random.default_rng(0).normal(0, 1, 49152).astype(np.float32)
    begin = time.perf_counter()
    for token in range(_REPEATS):
        log_chance(row, token)
    return (time.perf_counter() - begin) / _REPEATS * timings.tokens_per_s


def table(result: Result) -> str:
    """A line per task, training and engine."""
    return markdown(
        result["tasks"],
        {
            "task": "{task}",
            "training": "{training}",
            "engine": "{engine}",
            "rows of the curve": "{fit_rows}",
            "rows": "{rows}",
            "wrong": "{wrong:.1%}",
            "of surest 90 %": "{wrong_of_surest_90:.1%}",
            "calibration error": "{error:.3f}",
            "if exact": "{error_if_exact:.3f}",
            "without the curve": "{error_without_curve:.3f}",
            "AUROC": "{auroc:.3f}",
            "time": "{cost:.2%}",
        },
    )


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

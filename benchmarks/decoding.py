"""Measure ways of decoding on the rows of bundles' tasks; writes a table and a plot.

    pip install -e '.[demo]' xllamacpp onnxruntime-genai
    python benchmarks/decoding.py build/smart-home=examples/smart-home/quick.yaml --out benchmarks/results

Both engines answer the same validation rows of each adapter greedily: as the plain base, with the adapter token by
token, with its output constraint, with drafts, and with both. The other libraries of `decoding_setups.py` answer them
with the same files. Each setup runs in its own process, several rounds in turn, so that no two share the processor's
caches; the figures are over all rounds. Without `output` in the recipe, the constraint is inferred from the training
rows.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.plots import subplots
from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import in_turns
from benchmarks.harness.worker import in_own_process

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.decoding.output import OutputSpec

from benchmarks.decoding_setups import MARGINS, PLAIN, SETUPS, Place, Prompt, Timed, prompt_of
from edgetune.building.outputs.infer import infer
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import Task, read_task

NAMES = [name for name in SETUPS if name != MARGINS]


def figures(answers: Sequence[Timed]) -> dict[str, Any]:
    """Medians and rates as JSON values."""
    decoded = sum(answer.tokens - 1 for answer in answers)
    seconds = sum(answer.whole_s - answer.first_s for answer in answers)
    steps = [answer.tokens_per_step for answer in answers if answer.tokens_per_step]
    medians = {
        "answer_ms": round(statistics.median(answer.whole_s for answer in answers) * 1e3, 1),
        "ttft_ms": round(statistics.median(answer.first_s for answer in answers) * 1e3, 1),
        "tokens_per_s": round(decoded / seconds, 1) if decoded else 0.0,
        "tokens": round(sum(answer.tokens for answer in answers) / len(answers), 1),
    }
    return medians | ({"tokens_per_step": round(statistics.fmean(steps), 2)} if steps else {})


def compared(answers: Sequence[Timed], plain: Sequence[Timed]) -> dict[str, Any]:
    """How many texts are not those of plain decoding, and the largest margin in nats where one begins to differ."""
    margins = [_margin(one, other) for one, other in zip(answers, plain, strict=True) if one.text != other.text]
    return {"differ": len(margins)} | ({"margin_nats": round(max(margins), 3)} if margins else {})


def _margin(answer: Timed, plain: Timed) -> float:
    """By how much plain decoding preferred its token to the next best where the answer's text leaves it."""
    read = ""
    for text, margin in plain.margins:
        read += text
        if not answer.text.startswith(read):
            return margin
    return 0.0


def main() -> None:
    """Run every setup that fits, and write the results."""
    parser = BENCHMARK.parser(only=NAMES, threads=2)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE=RECIPE", help="a bundle, and the recipe with its rows")
    parser.add_argument("--rows", type=int, default=40, help="validation rows per adapter")
    parser.add_argument("--rounds", type=int, default=3, help="processes per setup")
    parser.add_argument("--engines", nargs="+", default=["gguf", "onnx"], help="of those that a bundle has files for")
    options = BENCHMARK.options(parser, rows=2, rounds=1)
    tasks = []
    for bundle, recipe in (map(Path, pair.split("=", 1)) for pair in options.bundles):
        manifest = read_manifest(bundle)
        for engine in (engine for engine in manifest.base.files if engine in options.engines):
            for adapter in manifest.adapters:
                setups = _adapter(bundle, read_task(adapter, Recipe.from_file(recipe)), engine, options)
                tasks.append({"bundle": manifest.name, "engine": engine, "adapter": adapter, "setups": setups})
    BENCHMARK.report(options, {"tasks": tasks})


def _adapter(bundle: Path, task: Task, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each setup, from `rounds` processes each."""
    spec = _constraint(bundle, task)
    place = Place(bundle, engine, task.name, spec, options.threads)
    prompts = [prompt_of(row) for row in task.validation[: options.rows + 1]]
    runs: dict[str, Callable[[], list[Timed]]] = {
        name: partial(in_own_process, measure, name, place, prompts)
        for name in options.only
        if SETUPS[name].fits(engine, spec)
    }
    margins: list[Timed] = in_own_process(measure, MARGINS, place, prompts)
    rounds = in_turns(runs, options.rounds)
    answers = {name: [*chain.from_iterable(lists)] for name, lists in rounds.items()}
    return {
        name: figures(own) | (compared(own[: len(margins)], margins) if name.startswith(PLAIN) else {})
        for name, own in answers.items()
    }


def measure(setup: str, place: Place, prompts: Sequence[Prompt]) -> list[Timed]:
    """The answers of one setup, after one to warm up."""
    answer = SETUPS[setup].open(place)
    return [answer(prompt) for prompt in prompts][1:]


def _constraint(bundle: Path, task: Task) -> OutputSpec | None:
    stored = read_manifest(bundle).adapter(task.name).output
    if stored is not None:
        return OutputSpec.from_json(stored)
    return infer([row.completion or "" for row in task.train])


def table(result: Result) -> str:
    """Markdown: a table for each engine and adapter, a row for each setup."""
    about = f"{result['rows']} validation rows per adapter, {result['rounds']} rounds, {said_of_machine(result)}."
    note = (
        "Other texts: answers that are not those of the adapter alone, and the largest margin of its token where one "
        "begins to differ. A constraint changes answers that break it."
    )
    columns = {
        "setup": "{name}",
        "answer, ms": "{answer_ms:.0f}",
        "TTFT, ms": "{ttft_ms:.0f}",
        "decode, tokens/s": "{tokens_per_s:.0f}",
        "speedup": "{speedup:.2f}",
        "tokens per step": "{tokens_per_step}",
        "other texts": "{differ}",
        "margin, nats": "{margin_nats:g}",
    }
    parts = [f"{about} {note}\n"]
    for task in result["tasks"]:
        plain = task["setups"].get(PLAIN, {}).get("tokens_per_s")
        rows = [
            {"name": name, "speedup": measured["tokens_per_s"] / plain if plain else None, **measured}
            for name, measured in task["setups"].items()
        ]
        parts.append(f"{_title(task)}\n\n{markdown(rows, columns)}")
    return "\n".join(parts)


def _title(task: dict[str, Any]) -> str:
    return f"{task['bundle']}, {task['adapter']}, {task['engine']}"


def plot(result: Result, out: Path) -> None:
    """Median time of an answer in each setup, a panel for each task and engine."""
    tasks = result["tasks"]
    rows = (len(tasks) + 1) // 2
    with subplots(out, rows, 2, dpi=120, figsize=(13, 2.6 * rows), squeeze=False) as axes:
        for task, axis in zip(tasks, axes.flat, strict=False):
            # The base does not end its answers where an adapter does.
            names = [name for name in task["setups"] if name != "base"][::-1]
            colors = ["#c8762c" if name.startswith(PLAIN) else "#4878a8" for name in names]
            bars = axis.barh(names, [task["setups"][setup]["answer_ms"] for setup in names], color=colors)
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
            axis.margins(x=0.12)
            axis.set_title(f"{_title(task)}: median ms per answer", fontsize=9, loc="left")
            axis.tick_params(labelsize=7)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

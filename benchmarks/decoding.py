"""Bundles and rows of their tasks in; how fast each way of decoding answers them out: a table and a plot.

    pip install -e '.[demo]' xllamacpp onnxruntime-genai
    python benchmarks/decoding.py build/smart-home=examples/smart-home/quick.yaml --out benchmarks/results

Both engines answer the same validation rows of each adapter greedily: as the plain base, with the adapter token by
token, with its output constraint, with drafts, and with both. The other libraries of `decoding_setups.py` answer them
with the same files. Each setup runs in its own process, several rounds in turn, so that no two share the processor's
caches; the figures are over all rounds. Without `output` in the recipe, the constraint is inferred from the training
rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.decoding.output import OutputSpec

from benchmarks.decoding_setups import MARGINS, PLAIN, SETUPS, Place, Prompt, Timed
from benchmarks.machine import this_machine
from edgetune.building.outputs.infer import infer
from edgetune.recipe.model import Recipe
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task, read_task


def figures(answers: Sequence[Timed]) -> dict[str, Any]:
    """Medians and rates as JSON values."""
    decoded = sum(answer.tokens - 1 for answer in answers)
    seconds = sum(answer.whole_s - answer.first_s for answer in answers)
    steps = [answer.tokens_per_step for answer in answers if answer.tokens_per_step]
    found = {
        "answer_ms": round(statistics.median(answer.whole_s for answer in answers) * 1e3, 1),
        "ttft_ms": round(statistics.median(answer.first_s for answer in answers) * 1e3, 1),
        "tokens_per_s": round(decoded / seconds, 1) if decoded else 0.0,
        "tokens": round(sum(answer.tokens for answer in answers) / len(answers), 1),
    }
    return found | ({"tokens_per_step": round(statistics.fmean(steps), 2)} if steps else {})


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
    parser = argparse.ArgumentParser(description="Measure ways of decoding on the rows of bundles' tasks.")
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE=RECIPE", help="a bundle, and the recipe with its rows")
    parser.add_argument("--rows", type=int, default=40, help="validation rows per adapter")
    parser.add_argument("--rounds", type=int, default=3, help="processes per setup")
    parser.add_argument("--engines", nargs="+", default=["gguf", "onnx"], help="of those that a bundle has files for")
    parser.add_argument("--threads", type=int, default=2, help="threads of all setups")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write decoding.json, decoding.md and decoding.png here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", metavar="ENGINE/ADAPTER/SETUP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        (pair,) = options.bundles
        engine, adapter, setup = options.worker.split("/")
        print(json.dumps([asdict(answer) for answer in measure(pair, engine, adapter, setup, options)]))
        return
    tasks = [found for pair in options.bundles for found in _tasks(pair, options)]
    result = {"machine": this_machine(), **{key: getattr(options, key) for key in ("rows", "rounds", "threads")}}
    result["tasks"] = tasks
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decoding.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "decoding.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "decoding.png")
    print(json.dumps(result) if options.json else table(result))


def _tasks(pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every engine and adapter of a bundle."""
    manifest = read_manifest(_split(pair)[0])
    return [
        {
            "bundle": manifest.name,
            "engine": engine,
            "adapter": adapter,
            "setups": _adapter(pair, engine, adapter, options),
        }
        for engine in manifest.base.files
        if engine in options.engines
        for adapter in manifest.adapters
    ]


def _adapter(pair: str, engine: str, adapter: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each setup, from `rounds` processes each."""
    spec = _constraint(pair, adapter)
    names = [name for name, setup in SETUPS.items() if setup.fits(engine, spec) and name != MARGINS]
    answers: dict[str, list[Timed]] = {name: [] for name in names}

    def answers_of(name: str) -> list[Timed]:
        numbers = [f"--{key}={getattr(options, key)}" for key in ("rows", "threads")]
        command = [sys.executable, sys.argv[0], pair, *numbers, "--worker", f"{engine}/{adapter}/{name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        # Libraries may print before the result.
        return [Timed(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]

    margins = answers_of(MARGINS)
    for _ in range(options.rounds):
        for name in names:
            answers[name] += answers_of(name)
    return {
        name: figures(found) | (compared(found[: len(margins)], margins) if name.startswith(PLAIN) else {})
        for name, found in answers.items()
    }


def measure(pair: str, engine: str, adapter: str, setup: str, options: argparse.Namespace) -> list[Timed]:
    """The answers of one setup, after one to warm up."""
    task = _task(pair, adapter)
    first, *rows = [_prompt_of(row) for row in task.validation[: options.rows + 1]]
    place = Place(_split(pair)[0], engine, adapter, _constraint(pair, adapter), options.threads)
    with SETUPS[setup].opened(place) as answer:
        return [answer(row) for row in (first, *rows)][1:]


def _split(pair: str) -> tuple[Path, Path]:
    bundle, _, recipe = pair.partition("=")
    return Path(bundle), Path(recipe)


def _task(pair: str, adapter: str) -> Task:
    return read_task(adapter, Recipe.from_file(_split(pair)[1]))


def _constraint(pair: str, adapter: str) -> OutputSpec | None:
    stored = read_manifest(_split(pair)[0]).adapter(adapter).output
    if stored is not None:
        return OutputSpec.from_json(stored)
    return infer([row.completion or "" for row in _task(pair, adapter).train])


def _prompt_of(row: TaskRow) -> Prompt:
    if row.messages is not None:
        return [dict(message) for message in row.messages]
    return [{"role": "user", "content": row.text or ""}]


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each engine and adapter, a row for each setup."""
    machine = result["machine"]
    about = f"{result['rows']} validation rows per adapter, {result['rounds']} rounds, {result['threads']} threads"
    note = (
        "Other texts: answers that are not those of the adapter alone, and the largest margin of its token where one "
        "begins to differ. A constraint changes answers that break it."
    )
    lines = [f"{about}, {machine['cpu']} ({machine['kind']}). {note}"]
    for task in result["tasks"]:
        plain = task["setups"][PLAIN]["tokens_per_s"]
        head = "| setup | answer, ms | TTFT, ms | decode, tokens/s | speedup | tokens per step | other texts (nats) |"
        lines += ["", f"{_title(task)}", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
        for setup, found in task["setups"].items():
            cells = [
                f"{found['answer_ms']:.0f}",
                f"{found['ttft_ms']:.0f}",
                f"{found['tokens_per_s']:.0f}",
                f"{found['tokens_per_s'] / plain:.2f}" if plain else "",
                str(found.get("tokens_per_step", "")),
                f"{found.get('differ', '')}" + (f" ({found['margin_nats']:g})" if "margin_nats" in found else ""),
            ]
            lines.append(f"| {setup} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _title(task: dict[str, Any]) -> str:
    return f"{task['bundle']}, {task['adapter']}, {task['engine']}"


def plot(result: dict[str, Any], out: Path) -> None:
    """Median time of an answer in each setup, a panel for each task and engine."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = result["tasks"]
    rows = (len(tasks) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.6 * rows), squeeze=False)
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
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

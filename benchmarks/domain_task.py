"""Measure whether continued pretraining on a task's plain text lifts the task's score at equal bytes.

    python benchmarks/domain_task.py --data DIR --work build/domain-task --out benchmarks/results

Two bundles in q8_0 have the same adapters, one per number of rows and choice of the rows of ViGGO: one on the plain
base, one on a base that was first trained on the sentences of all of ViGGO's training rows, without their meanings.
llama.cpp answers the same test rows with both.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import edgetune
from benchmarks.few_rows_setups import TASKS, adapter_of, rows_of

TASK = TASKS["viggo"]
BASES = ("plain", "continued")


def main() -> None:
    parser = BENCHMARK.parser(works=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with viggo")
    parser.add_argument("--base", default="smollm2-135m", help="the base (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 300], metavar="N", help="(100 300)")
    parser.add_argument("--seeds", type=int, default=2, help="choices of the rows (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the plain text (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=150, help="most rows to score (default: %(default)s)")
    options = BENCHMARK.options(parser, rows=[12], seeds=1, test_rows=4, epochs=0.02)
    with work_folder(options) as work:
        scores = {base: scored(base, options, work) for base in BASES}
    lines = [{"adapter": name, **{base: scores[base][name] for base in BASES}} for name in scores["plain"]]
    BENCHMARK.report(options, {"adapters": lines})


def scored(base: str, options: Namespace, work: Path) -> dict[str, float]:
    """Build the bundle on this base; the score of each of its adapters."""
    folder = options.data / TASK.folder
    adapters = {
        f"rows-{count}-{seed}": {**adapter_of(TASK, folder, count, seed, work), "training": {"auto": True}}
        for count in options.rows
        for seed in range(options.seeds)
    }
    values: dict[str, Any] = {
        "name": f"domain-task-{base}",
        "base": options.base,
        "quantization": "q8_0",
        "context_length": 512,
        "adapters": adapters,
    }
    if base == "continued":
        values["domain"] = {"data": {"train": str(text_of(folder, work))}, "training": {"epochs": options.epochs}}
    out = work / base
    if not out.exists():
        edgetune.build(values, out)
    return {name: edgetune.evaluate(out, folder / TASK.test, name, limit=options.test_rows).score for name in adapters}


def text_of(folder: Path, work: Path) -> Path:
    """The sentences of all training rows, a line each."""
    file = work / "domain.txt"
    column = str((TASK.columns or {})["prompt"])
    sentences = [json.loads(row)[column] for row in rows_of(folder / TASK.train)]
    file.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return file.resolve()


def table(result: Result) -> str:
    columns = {"rows and choice": "{adapter}", **{f"{base} base": f"{{{base}:.1%}}" for base in BASES}}
    return f"{said_of_machine(result)}\n\n{markdown(result['adapters'], columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

"""Put wrong answers into the rows of a task, and measure which of them `edgetune data check --minutes` finds.

    python benchmarks/wrong_labels.py benchmarks/recipes/snips.yaml snips --data DIR/snips/train.jsonl
    python benchmarks/wrong_labels.py examples/smart-home/recipe.yaml intent --test DIR/intent-test.jsonl

Half of the wrong answers are those of another row. The other half have one wrong value, where an answer is JSON. With
--test, bundles are also built and scored: of the right rows, of those with wrong answers, of those that the check
leaves in, and of all with the check's weights.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgetune
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.curation.checking.check import check
from edgetune.curation.checking.clean import write_clean
from edgetune.curation.checking.duplicates import answer_key
from edgetune.curation.checking.findings import WRONG
from edgetune.recipe.model import Recipe
from edgetune.tasks.augmentation.english import are_english
from edgetune.tasks.augmentation.slots import SlottedRow
from edgetune.tasks.augmentation.values import Values
from edgetune.tasks.data import TaskRow, read_rows

SCORED = ("right", "wrong", "clean", "weighted")
FIRST = 0.25
"""Share of the rows, ranked by doubt, of which the share of the wrong ones is reported."""


def main() -> None:
    parser = BENCHMARK.parser(works=True)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("--data", help="the rows, in the form of the recipe's (default: its training rows)")
    parser.add_argument("--test", help="rows to score bundles on")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--wrong", type=float, default=0.2, help="share of the rows that get a wrong answer")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = BENCHMARK.options(parser, rows=40, minutes=0.5)
    with work_folder(options) as work:
        BENCHMARK.report(options, measured(options, work))


def measured(options: Any, work: Path) -> Result:  # noqa: ANN401 - argparse's namespace
    spec = Recipe.from_file(options.recipe).adapters[options.adapter]
    source = options.data or str(spec.data.train)
    rng = random.Random(options.seed)
    rows = read_rows(source, spec.data.columns)
    rows = rng.sample(rows, min(options.rows, len(rows)))
    wrong = with_wrong_answers(rows, options.wrong, rng)
    files = {"right": rows, "wrong": [wrong.get(place, row) for place, row in enumerate(rows)]}
    for name, own in files.items():
        write(work / f"{name}.jsonl", own)
    recipe = recipe_for(options, work / "wrong.jsonl")
    (report,) = check(recipe, adapter=options.adapter, minutes=options.minutes, progress=Progress())
    assert report.estimate is not None
    ranked = [line_of(row.where) for row in report.estimate.rows]
    first = ranked[: round(FIRST * len(ranked))]
    named = [line_of(finding.where[0]) for finding in report.of_kind(WRONG)]
    result: Result = {
        "found": len(wrong.keys() & set(first)) / len(wrong),
        "named": len(named),
        "named_wrong": len(wrong.keys() & set(named)),
        "wrong_rows": len(wrong),
        "judged": report.estimate.share,
        "epochs": report.estimate.epochs,
        "seconds": round(report.estimate.seconds),
        "ranked": [[line_of(row.where), row.likelihood, row.relative] for row in report.estimate.rows],
        "wrong_lines": sorted(wrong),
    }
    if options.test:
        data = recipe.adapters[options.adapter].data
        write_clean(report, data, work / "clean.jsonl")
        write_clean(report, data, work / "weighted.jsonl", weighted=True)
        result["scores"] = {name: scored(options, work, name) for name in SCORED}
    return result


def with_wrong_answers(rows: Sequence[TaskRow], share: float, rng: random.Random) -> dict[int, TaskRow]:
    """Some of the rows with wrong answers, by their positions."""
    english = are_english(rows)
    slotted = [SlottedRow.of(row, english=english) for row in rows]
    values = Values([item for item in slotted if item is not None], {}, None)
    wrong = {}
    for number, place in enumerate(rng.sample(range(len(rows)), round(share * len(rows)))):
        item = slotted[place]
        exchanged = values.exchanged(item, rng) if item is not None and number % 2 else None
        answer = exchanged[0].row.completion if exchanged is not None else other_answer(rows, place, rng)
        wrong[place] = replace(rows[place], completion=answer)
    return wrong


def other_answer(rows: Sequence[TaskRow], place: int, rng: random.Random) -> str | None:
    """The answer of another row, which is not that of this one."""
    own = answer_key(rows[place].completion)
    return rng.choice([row.completion for row in rows if answer_key(row.completion) != own])


def write(path: Path, rows: Sequence[TaskRow]) -> None:
    """Write rows of a prompt and an answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"prompt": (row.messages or ())[-1]["content"], "completion": row.completion} for row in rows]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in values), encoding="utf-8")


def recipe_for(options: Any, rows: Path) -> Recipe:  # noqa: ANN401 - argparse's namespace
    """The recipe with these rows, a tenth of them for validation."""
    data = {"train": str(rows.resolve()), "held_out": 0.1}
    keys = {"data": json.dumps(data), "confidence": "false", "draft": "false", "golden": "false"}
    own = {f"adapters.{options.adapter}.{key}": value for key, value in keys.items()}
    return Recipe.from_file(options.recipe, {**own, "targets": "[gguf]"})


def scored(options: Any, work: Path, name: str) -> float:  # noqa: ANN401 - argparse's namespace
    """The score of a bundle of these rows."""
    recipe = recipe_for(options, work / f"{name}.jsonl")
    alone = recipe.model_copy(update={"adapters": {options.adapter: recipe.adapters[options.adapter]}, "route": None})
    edgetune.build(alone, work / name)
    test = spread(read_rows(options.test, Recipe.from_file(options.recipe).adapters[options.adapter].data.columns), 200)
    write(work / "test.jsonl", test)
    return edgetune.evaluate(work / name, work / "test.jsonl", options.adapter).score


def line_of(where: str) -> int:
    """The position of a row in the file that `write` wrote."""
    return int(where.rpartition(":")[2]) - 1


def table(result: Result) -> str:
    row = {"task": result["adapter"], **result, **result.get("scores", {})}
    columns = {
        "task": "{task}",
        "rows": "{rows}",
        "wrong": "{wrong_rows}",
        "of these among the 25 % ranked first": "{found:.0%}",
        "named": "{named}",
        "of these wrong": "{named_wrong}",
        "epochs": "{epochs:.2g}",
        "minutes": "{minutes:g}",
        "score with right answers": "{right:.3f}",
        "with wrong ones": "{wrong:.3f}",
        "without those named": "{clean:.3f}",
        "with weights": "{weighted:.3f}",
    }
    return f"{said_of_machine(result)}\n\n{markdown([row], columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

"""Build a bundle for one real task and score it through the runtime; prints JSON.

    python benchmarks/tasks.py snips    --data DIR/snips     --out build/snips
    python benchmarks/tasks.py banking77 --data DIR/banking77 --out build/banking77

`snips` trains on 3,000 rows and scores the JSON of intent and slots on 200 validation rows; `banking77` trains on all
rows and scores its 77 labels on 500 test rows.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark

import json
import random
import time
from pathlib import Path

from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks.evaluation import Evaluation, evaluate

RECIPES = Path(__file__).parent / "recipes"
TRAINING_ROWS = {"snips": 3000, "banking77": None}
TEST = {"snips": ("validation.jsonl", 200), "banking77": ("test.jsonl", 500)}


def main() -> None:
    """Build, score and print one JSON object."""
    parser = BENCHMARK.parser(writes=False)
    parser.add_argument("task", choices=sorted(TRAINING_ROWS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's train.jsonl and test file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    options = BENCHMARK.options(parser)
    from edgetune.building.pipeline import build  # after the options, as it takes seconds

    progress = Progress()
    rows = sample(options.data / "train.jsonl", TRAINING_ROWS[options.task], options.out)
    recipe = Recipe.from_file(
        RECIPES / f"{options.task}.yaml", {f"adapters.{options.task}.data.train": json.dumps(str(rows.resolve()))}
    )
    started = time.monotonic()
    built = build(recipe, options.out, progress=progress)
    assert built.figures, "run it in one process"
    build_s = time.monotonic() - started
    name, limit = TEST[options.task]
    result = evaluate(options.out, options.task, options.data / name, limit=limit, progress=progress)
    figures = {
        "task": options.task,
        "build_s": round(build_s),
        "metric": result.metric,
        "score": result.score,
        "rows": result.rows,
        "evaluate_s": round(time.monotonic() - started - build_s),
        "build": built.to_json()["adapters"][options.task],
    }
    if options.task == "snips":
        figures["intent"] = intent_accuracy(result)
    print(json.dumps(figures))


def sample(source: Path, rows: int | None, out: Path) -> Path:
    """Write `rows` random rows of `source` to a file, always the same ones; None for all rows."""
    lines = source.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    target = out.with_name(f"{out.name}-train.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
    return target


def intent_accuracy(result: Evaluation) -> float:
    """Share of rows whose answer is JSON with the correct intent."""
    right = [intent_of(row.answer) == intent_of(row.reference) for row in result.details]
    return sum(right) / len(right)


def intent_of(text: str) -> object:
    """The intent in an answer; None when it is not JSON with one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value.get("intent") if isinstance(value, dict) else None


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

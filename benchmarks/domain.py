"""Measure the perplexity of a base before and after continued pretraining on train.txt; prints JSON.

    python -m benchmarks.domain --data DIR/tinyshakespeare --steps 100

One recipe with two stages: continued pretraining of the base, then an adapter on the result. `build` has the figures of
the build, measured with the runtime's engines; `runtime` is the perplexity of test.txt with the finished bundle.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from edgetune_export import backends
from edgetune_runtime import Runtime

from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe

# The adapter of the second stage does not matter here: one step on a few rows.
ROWS = [{"prompt": f"Who wrote line {number}?", "completion": "Shakespeare"} for number in range(4)]


def main() -> None:
    """Build in a folder and print one JSON object."""
    parser = BENCHMARK.parser(writes=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt and test.txt")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", help="quantization of the base (default: unchanged)")
    parser.add_argument("--method", default="full")
    parser.add_argument("--steps", type=int, help="maximum number of steps (default: all epochs)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="times the factor of the method")
    parser.add_argument("--window", type=int, default=512, help="tokens per window, and the runtime's context length")
    parser.add_argument("--targets", default=",".join(backends.names()))
    parser.add_argument("--characters", type=int, help="use only this many characters of each file")
    parser.add_argument(
        "--out", type=Path, help="build folder, to resume after an interruption (default: a temporary folder)"
    )
    options = BENCHMARK.options(parser, characters=8000, steps=1, window=64)
    from edgetune.building.pipeline import build  # after the options, as it takes seconds

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = build(_recipe(options, folder), folder / "bundle", progress=Progress())
        built_s = time.monotonic() - started
        test = (folder / "test.txt").read_text(encoding="utf-8")
        perplexities = {target: _perplexity(folder / "bundle", target, test) for target in options.targets.split(",")}
    print(json.dumps({"build": result.domain, "build_s": round(built_s, 1), "runtime": perplexities}))


def _recipe(options: argparse.Namespace, folder: Path) -> Recipe:
    for name in ("train.txt", "test.txt"):
        text = (options.data / name).read_text(encoding="utf-8")[: options.characters]
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    training: dict[str, Any] = {
        "epochs": options.epochs,
        "max_steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    domain = {
        "data": {"train": "train.txt", "validation": "test.txt"},
        "method": options.method,
        "training": training,
    }
    values = {
        "name": "domain",
        "base": options.base,
        "quantization": options.quantization,
        "targets": options.targets.split(","),
        "context_length": options.window,
        "training": {"max_steps": 1, "evals": 1},
        "domain": domain,
        "adapters": {"answer": {"data": {"train": "rows.jsonl", "held_out": 0.5}}},
    }
    return Recipe.model_validate(values, context={"folder": folder})


def _perplexity(bundle: Path, engine: str, text: str) -> float:
    """Perplexity of the text with the bundle's plain base."""
    with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
        return runtime.perplexity(text)


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

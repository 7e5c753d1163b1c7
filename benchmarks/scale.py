"""Measure peak memory and time of each build stage, for random bases of several sizes.

    pip install -e '.[demo]'
    python benchmarks/scale.py --json --out benchmarks/results

LLaMA bases in transformers folders, with random f16 weights and SmolLM2's tokenizer, are converted and quantized to
q4_0. Each gets a rank-16 adapter on all linear layers, trained on rows of about 512 tokens and exported to both
formats. Each build runs in its own process; its stages are recognized by its progress messages. The peak of a stage is
the largest resident memory of the process and its children together. With `--limit 1.25` each build runs once more in
a memory cgroup of 1.25 times the peak of its training, without swap, which needs root.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.bundles import Shape, write_base
from benchmarks.harness.cgroup import memory_limit
from benchmarks.harness.memory import family, status_mb
from benchmarks.harness.plots import subplots
from benchmarks.harness.prompts import WORDS
from benchmarks.harness.tables import markdown
from benchmarks.harness.worker import WorkerEndedError, in_own_process

import argparse
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune_export.base_file.convert import find_converter
from edgetune_runtime.errors import EdgetuneError

from edgetune.common.progress import Progress, Step

RANK = 16
QUANTIZATION = "q4_0"
STAGES = ("convert", "quantize", "load", "step", "fold", "gguf", "onnx", "parity", "pack")
# The message of a build at the start of each stage; `step` starts with its progress bar.
_BEGINNINGS = {
    "converting base": "convert",
    "quantizing base": "quantize",
    "loading the base": "load",
    "task: validation loss": "fold",
    "writing gguf": "gguf",
    "writing onnx": "onnx",
    "comparing the exported": "parity",
    "  bases of": "pack",
}
_SAMPLE_S = 0.02
SIZES = {
    "135M": Shape(576, 30, 9, 3, 1536),
    "0.5B": Shape(1024, 30, 16, 4, 4096),
    "1B": Shape(2048, 16, 32, 8, 8192),
    "1.7B": Shape(2048, 24, 32, 32, 8192),
}


def main() -> None:
    parser = BENCHMARK.parser(only=[*SIZES], works=True)
    parser.add_argument("--row-tokens", type=int, default=512, help="context length and length of the rows")
    parser.add_argument("--steps", type=int, default=2, help="training steps, with one row each")
    parser.add_argument("--limit", type=float, metavar="FACTOR", help="build again within FACTOR times training's peak")
    options = BENCHMARK.options(parser, row_tokens=128, steps=1)
    find_converter()  # download it now, so that the download does not count as conversion
    with work_folder(options) as work:
        figures = {size: _measure(size, options, work / size) for size in options.only}
    BENCHMARK.report(options, {"rank": RANK, "quantization": QUANTIZATION, "sizes": figures})


def _measure(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    # In processes of their own, so that the memory of one is not that of the other.
    parameters = in_own_process(write_base, folder / "base", SIZES[size])
    write_rows(folder / "rows.jsonl", options.steps + 2, options.row_tokens)
    figures = {"parameters": parameters, **_run(folder, options)}
    if options.limit and "failed" not in figures:
        limit_mb = options.limit * _training_mb(figures["stages"])
        for built in folder.glob("bundle*"):
            shutil.rmtree(built)
        with memory_limit(limit_mb) as limit:
            figures["limited"] = {"limit_mb": round(limit_mb), **_run(folder, options, limit.procs)}
    return figures


def _run(folder: Path, options: argparse.Namespace, procs: Path | None = None) -> dict[str, Any]:
    try:
        return dict(in_own_process(build_one, folder, options.row_tokens, options.steps, procs=procs))
    except WorkerEndedError as error:
        return {"failed": str(error), "stages": {}}


def build_one(folder: Path, row_tokens: int, steps: int) -> dict[str, Any]:
    """Build with the base and the rows in the folder; returns the peak in MB and the seconds of each stage."""
    from edgetune.building.pipeline import build
    from edgetune.recipe.model import Recipe

    adapter = {
        "data": {"train": "rows.jsonl", "held_out": 2 / (steps + 2)},
        "method": {"name": "lora", "r": RANK, "target_modules": "all-linear"},
    }
    values = {
        "name": "scale",
        "base": "base",
        "quantization": QUANTIZATION,
        "targets": ["gguf", "onnx"],
        "context_length": row_tokens,
        "training": {"max_steps": steps, "batch_size": 1, "evals": 1},
        "adapters": {"task": adapter},
    }
    recipe = Recipe.model_validate(values, context={"folder": folder})
    stages = Stages()
    failed = {}
    with stages.sampling():
        try:
            build(recipe, folder / "bundle", progress=stages)
        except EdgetuneError as error:
            failed = {"failed": str(error)}
    return {**failed, "stages": stages.figures}


def write_rows(out: Path, count: int, tokens: int) -> None:
    """Write rows that fill a context of `tokens`: each word is one token, the chat template takes some more."""
    rng = random.Random(0)
    rows = [{"prompt": " ".join(rng.choices(WORDS.split(), k=tokens - 64)), "completion": "lamp"} for _ in range(count)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Stages(Progress):
    """Recognizes the stages of a build by its messages, and records the peak memory and the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, dict[str, float]] = {}
        self._stage, self._started, self._most = "", 0.0, 0.0
        self._ended = threading.Event()

    def say(self, text: str) -> None:
        """Print a message, and begin its stage if it starts one."""
        super().say(text)
        for beginning, stage in _BEGINNINGS.items():
            if text.startswith(beginning):
                self._begin(stage)

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        """Begin the training stage with its progress bar."""
        self._begin("step")
        with super().step(label, total) as step:
            yield step

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample the memory while the block runs; the last stage ends with the block."""
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._begin("")
            self._ended.set()
            thread.join()

    def _begin(self, stage: str) -> None:
        peak = max(self._most, status_mb(os.getpid(), "VmHWM"))
        if self._stage:
            seconds = time.monotonic() - self._started
            self.figures[self._stage] = {"peak_mb": round(peak), "seconds": round(seconds, 1)}
        with Path("/proc/self/clear_refs").open("w") as file:
            file.write("5")
        self._stage, self._started, self._most = stage, time.monotonic(), 0.0

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._most = max(self._most, sum(status_mb(process, "VmRSS") for process in family(os.getpid())))


def table(result: Result) -> str:
    """A Markdown table: a row per size with peak and time of each stage, and the build's peak over the training's."""
    about = (
        "Peak memory in MB (in parentheses: bytes per parameter) and time of each stage of a build "
        f"(rows of {result['row_tokens']} tokens, {result['steps']} steps of one row, {result['machine']['cpu']})."
    )
    rows = []
    for size, measured in result["sizes"].items():
        stages = measured["stages"]
        cells = {stage: _cell(figures, measured["parameters"]) for stage, figures in stages.items()}
        share = measured.get("failed") or f"{_peak(stages) / _training_mb(stages):.2f}"
        rows.append({"base": size, **cells, "share": share})
    columns = {"base": "{base}", **{stage: f"{{{stage}}}" for stage in STAGES}, "build / training": "{share}"}
    limited = [
        f"\n{_said_of_limit(size, measured)}\n" for size, measured in result["sizes"].items() if "limited" in measured
    ]
    return f"{about}\n\n{markdown(rows, columns)}" + "".join(limited)


def _said_of_limit(size: str, unlimited: dict[str, Any]) -> str:
    limited = unlimited["limited"]
    within = f"{size} within {limited['limit_mb']:,} MB"
    if "failed" in limited:
        return f"{within}: {limited['failed']}"
    seconds = [sum(stage["seconds"] for stage in of["stages"].values()) for of in (limited, unlimited)]
    return f"{within}: built in {seconds[0]:.0f} s, without a limit in {seconds[1]:.0f} s."


def _training_mb(stages: dict[str, dict[str, float]]) -> float:
    return max(stages[stage]["peak_mb"] for stage in ("load", "step"))


def _cell(stage: dict[str, float], parameters: int) -> str:
    return f"{stage['peak_mb']} ({stage['peak_mb'] * 1e6 / parameters:.1f}), {stage['seconds']} s"


def _peak(stages: dict[str, dict[str, float]]) -> float:
    return max(stage["peak_mb"] for stage in stages.values())


def plot(result: Result, out: Path) -> None:
    """Plot peak memory and time of each stage by the number of parameters."""
    sizes = [size for size in result["sizes"].values() if "failed" not in size]
    parameters = [size["parameters"] / 1e9 for size in sizes]
    with subplots(out, 1, 2, dpi=120, figsize=(11, 4.5)) as (memory, seconds):
        for stage in STAGES:
            stages = [size["stages"][stage] for size in sizes]
            memory.plot(parameters, [figures["peak_mb"] / 1e3 for figures in stages], marker="o", label=stage)
            seconds.plot(parameters, [figures["seconds"] for figures in stages], marker="o", label=stage)
        memory.set(xlabel="billion parameters", ylabel="peak memory in GB", ylim=(0, None))
        seconds.set(xlabel="billion parameters", ylabel="seconds", yscale="log")
        memory.legend()


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

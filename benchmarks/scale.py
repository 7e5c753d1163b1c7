"""Random bases of several sizes in; memory and seconds of each stage of their builds out: a table and a plot.

    pip install -e '.[demo]'
    python benchmarks/scale.py --json --out benchmarks/results

Llama-shaped bases with random q4_0 blocks and SmolLM2's tokenizer, a rank-16 adapter on all linear layers, rows of
about 512 tokens, both formats. Each build runs in a process of its own; its stages are told by what it says. A stage's
peak is the most that the process and those it starts hold at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python looks for modules beside the script first, where onnx.py would stand in for the package onnx.
sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).resolve().parent]

import gguf
import numpy as np
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header

from edgetune.bases import ALIASES, locate
from edgetune.progress import Progress, Step

RANK = 16
WORDS = (
    "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain only"
)
STAGES = ("load", "step", "fold", "gguf", "onnx", "parity", "pack")
# What a build says when a stage begins; `step` begins with its progress bar.
_BEGINNINGS = {
    "loading the base": "load",
    "task: validation loss": "fold",
    "writing gguf": "gguf",
    "writing onnx": "onnx",
    "checking that": "parity",
    "  bases of": "pack",
}
_SAMPLE_S = 0.02
_HEAD_SIZE = 64


@dataclass(frozen=True)
class Shape:
    """Width, layers, heads of queries and of keys, and width of the feed-forward blocks of a llama."""

    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int


SIZES = {
    "135M": Shape(576, 30, 9, 3, 1536),
    "0.5B": Shape(1024, 30, 16, 4, 4096),
    "1B": Shape(2048, 16, 32, 8, 8192),
    "1.7B": Shape(2048, 24, 32, 32, 8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and seconds of each stage of a build, by the base's size.")
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="A,B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--row-tokens", type=int, default=512, help="context length, which the rows fill")
    parser.add_argument("--steps", type=int, default=2, help="of training, with one row each")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for bases and bundles; else a folder for now")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scale.json, scale.md and scale.png")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--worker", choices=list(SIZES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(build_one(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        found = {size: _run(size, options) for size in options.sizes.split(",")}
    settings = {"row_tokens": options.row_tokens, "steps": options.steps, "rank": RANK, "quantization": "q4_0"}
    result = {"machine": _machine(), **settings, "sizes": found}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "scale.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "scale.png")
    print(json.dumps(result) if options.json else table(result))


def _run(size: str, options: argparse.Namespace) -> dict[str, Any]:
    numbers = ["--row-tokens", str(options.row_tokens), "--steps", str(options.steps)]
    command = [sys.executable, __file__, "--worker", size, "--work", str(options.work), *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"failed": f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def build_one(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, and peak in MB and seconds of each stage, of the build of one base."""
    from edgetune.pipeline import build  # noqa: PLC0415 - slow to import
    from edgetune.recipe.model import Recipe  # noqa: PLC0415

    folder = options.work / options.worker
    folder.mkdir(parents=True, exist_ok=True)
    header = read_header(locate("smollm2-135m", Path(), ALIASES))
    write_base(folder / "base.gguf", SIZES[options.worker], header)
    write_rows(folder / "rows.jsonl", options.steps + 2, options.row_tokens)
    training = {"max_steps": options.steps, "batch_size": 1, "evals": 1}
    adapter = {
        "data": {"train": "rows.jsonl", "held_out": 2 / (options.steps + 2)},
        "method": {"name": "lora", "r": RANK, "target_modules": "all-linear"},
    }
    values = {"name": "scale", "base": "base.gguf", "targets": ["gguf", "onnx"], "context_length": options.row_tokens}
    values |= {"training": training, "adapters": {"task": adapter}}
    recipe = Recipe.model_validate(values, context={"folder": folder})
    stages = Stages()
    failed = {}
    with stages.sampling():
        try:
            build(recipe, folder / "bundle", progress=stages)
        except EdgetuneError as error:
            failed = {"failed": str(error)}
    parameters = sum(int(np.prod(tensor.shape)) for tensor in read_header(folder / "base.gguf").tensors.values())
    return {"parameters": parameters, **failed, "stages": stages.found}


def write_base(out: Path, shape: Shape, like: GgufHeader) -> None:
    """Write a base of random q4_0 blocks, with the vocabulary and the metadata of `like`."""
    width, inner, keys = shape.width, shape.inner, shape.key_heads * _HEAD_SIZE
    own = {
        "llama.embedding_length": width,
        "llama.block_count": shape.layers,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.key_heads,
        "llama.feed_forward_length": inner,
        "llama.rope.dimension_count": _HEAD_SIZE,
    }
    writer = gguf.GGUFWriter(out, "llama")
    for key, value in {**like.metadata, **own}.items():
        if isinstance(value, tuple):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType(like.value_types[key]))
    rng = np.random.default_rng(0)
    matrices = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
    matrices |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
    matrices |= {"ffn_down": (width, inner)}
    _add_matrix(writer, "token_embd", (len(like.metadata["tokenizer.ggml.tokens"]), width), rng)
    for layer in range(shape.layers):
        for name, size in matrices.items():
            _add_matrix(writer, f"blk.{layer}.{name}", size, rng)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def _add_matrix(writer: gguf.GGUFWriter, name: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    blocks = rng.integers(0, 256, (size[0] * size[1] // 32, 18), np.uint8)
    # Levels from -8 to 7 in steps of this size have a standard deviation of 0.02.
    blocks[:, :2] = np.frombuffer(np.float16(0.02 / 4.6).tobytes(), np.uint8)
    writer.add_tensor(f"{name}.weight", blocks.reshape(size[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def write_rows(out: Path, count: int, tokens: int) -> None:
    """Write rows that fill a context of `tokens`: each word is one token, the chat template takes some more."""
    rng = random.Random(0)
    rows = [{"prompt": " ".join(rng.choices(WORDS.split(), k=tokens - 64)), "completion": "lamp"} for _ in range(count)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Stages(Progress):
    """Tells a build's stages by what it says, and takes the peak and the seconds of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, float]] = {}
        self._stage, self._started, self._most = "", 0.0, 0.0
        self._ended = threading.Event()

    def say(self, text: str) -> None:
        """Say it, and begin the stage that it tells of."""
        super().say(text)
        for beginning, stage in _BEGINNINGS.items():
            if text.startswith(beginning):
                self._begin(stage)

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        """Training begins with its bar."""
        self._begin("step")
        with super().step(label, total) as step:
            yield step

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Look at the memory all the time while the block runs; the last stage ends with it."""
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._begin("")
            self._ended.set()
            thread.join()

    def _begin(self, stage: str) -> None:
        peak = max(self._most, _status_mb("VmHWM"))
        if self._stage:
            seconds = time.monotonic() - self._started
            self.found[self._stage] = {"peak_mb": round(peak), "seconds": round(seconds, 1)}
        with Path("/proc/self/clear_refs").open("w") as file:
            file.write("5")
        self._stage, self._started, self._most = stage, time.monotonic(), 0.0

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._most = max(self._most, sum(_status_mb("VmRSS", process) for process in _family(os.getpid())))


def _status_mb(key: str, process: int | str = "self") -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _family(process: int) -> list[int]:
    """A process and all that it started."""
    found = [process]
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _family(int(child))
    return found


def _machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each size, peak and seconds of each stage, and what the build takes beside its training."""
    lines = [
        "Peak memory in MB (of it, bytes per parameter) and seconds of each stage of a build "
        f"(rows of {result['row_tokens']} tokens, {result['steps']} steps of one row, {result['machine']['cpu']}).",
        "",
        f"| base | {' | '.join(STAGES)} | build / training |",
        f"| --- |{' --- |' * (len(STAGES) + 1)}",
    ]
    for size, found in result["sizes"].items():
        stages = found.get("stages", {})
        cells = [_cell(stages[stage], found["parameters"]) if stage in stages else "" for stage in STAGES]
        share = found.get("failed") or f"{_peak(stages) / max(stages[s]['peak_mb'] for s in ('load', 'step')):.2f}"
        lines.append(f"| {size} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines) + "\n"


def _cell(stage: dict[str, float], parameters: int) -> str:
    return f"{stage['peak_mb']} ({stage['peak_mb'] * 1e6 / parameters:.1f}), {stage['seconds']} s"


def _peak(stages: dict[str, dict[str, float]]) -> float:
    return max(stage["peak_mb"] for stage in stages.values())


def plot(result: dict[str, Any], out: Path) -> None:
    """Peak memory and seconds of each stage by the number of parameters."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a plot is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(11, 4.5))
    sizes = [found for found in result["sizes"].values() if "failed" not in found]
    for stage in STAGES:
        parameters = [found["parameters"] / 1e9 for found in sizes]
        memory.plot(parameters, [found["stages"][stage]["peak_mb"] / 1e3 for found in sizes], marker="o", label=stage)
        seconds.plot(parameters, [found["stages"][stage]["seconds"] for found in sizes], marker="o", label=stage)
    memory.set(xlabel="billion parameters", ylabel="peak memory in GB", ylim=(0, None))
    seconds.set(xlabel="billion parameters", ylabel="seconds", yscale="log")
    memory.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

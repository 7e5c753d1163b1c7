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

import argparse
import json
import math
import os
import random
import shutil
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

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

import numpy as np
import numpy.typing as npt
from edgetune_export.backends.onnx.tokenizer import write_tokenizer
from edgetune_export.base_file.convert import find_converter
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from safetensors.numpy import save_file

from benchmarks.cgroup import memory_limit
from benchmarks.machine import this_machine
from edgetune.bases import ALIASES, locate
from edgetune.progress import Progress, Step

RANK = 16
QUANTIZATION = "q4_0"
WORDS = (
    "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain only"
)
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
_HEAD_SIZE = 64


@dataclass(frozen=True)
class Shape:
    """Hidden size, layers, query heads, key heads and intermediate size of a LLaMA model."""

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
    parser = argparse.ArgumentParser(description="Measure peak memory and time of each build stage, by base size.")
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="A,B", help=f"sizes: {', '.join(SIZES)}")
    parser.add_argument("--row-tokens", type=int, default=512, help="context length and length of the rows")
    parser.add_argument("--steps", type=int, default=2, help="training steps, with one row each")
    parser.add_argument("--limit", type=float, metavar="FACTOR", help="build again within FACTOR times training's peak")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for bases and bundles (default: a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scale.json, scale.md and scale.png here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(build_one(options)))
        return
    find_converter()  # download it now, so that the download does not count as conversion
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        found = {size: _measure(size, options) for size in options.sizes.split(",")}
    settings = {"row_tokens": options.row_tokens, "steps": options.steps, "rank": RANK, "quantization": QUANTIZATION}
    result = {"machine": this_machine(), **settings, "sizes": found}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "scale.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "scale.png")
    print(json.dumps(result) if options.json else table(result))


def _measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    found = _run(size, options)
    if options.limit and "failed" not in found:
        limit_mb = options.limit * _training_mb(found["stages"])
        with memory_limit(limit_mb) as limit:
            within = _run(size, options, limit.folder)
        found["limited"] = {"limit_mb": round(limit_mb), "stages": within.get("stages", {})}
        found["limited"] |= {"failed": within["failed"]} if "failed" in within else {}
    return found


def _run(size: str, options: argparse.Namespace, cgroup: Path | None = None) -> dict[str, Any]:
    numbers = ["--row-tokens", str(options.row_tokens), "--steps", str(options.steps)]
    command = [sys.executable, __file__, "--worker", size, "--work", str(options.work), *numbers]
    command += ["--cgroup", str(cgroup)] if cgroup else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"failed": f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def build_one(options: argparse.Namespace) -> dict[str, Any]:
    """Build with one base; returns its parameters, and the peak in MB and the seconds of each stage."""
    from edgetune.building.pipeline import build  # noqa: PLC0415 - slow to import
    from edgetune.recipe.model import Recipe  # noqa: PLC0415

    if options.cgroup:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    folder = options.work / options.worker
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    smollm = locate("smollm2-135m", Path(), ALIASES)
    parameters = write_folder(folder / "base", SIZES[options.worker], read_header(smollm), smollm)
    write_rows(folder / "rows.jsonl", options.steps + 2, options.row_tokens)
    training = {"max_steps": options.steps, "batch_size": 1, "evals": 1}
    adapter = {
        "data": {"train": "rows.jsonl", "held_out": 2 / (options.steps + 2)},
        "method": {"name": "lora", "r": RANK, "target_modules": "all-linear"},
    }
    values = {"name": "scale", "base": "base", "quantization": QUANTIZATION, "targets": ["gguf", "onnx"]}
    values |= {"context_length": options.row_tokens, "training": training, "adapters": {"task": adapter}}
    recipe = Recipe.model_validate(values, context={"folder": folder})
    stages = Stages()
    failed = {}
    with stages.sampling():
        try:
            build(recipe, folder / "bundle", progress=stages)
        except EdgetuneError as error:
            failed = {"failed": str(error)}
    return {"parameters": parameters, **failed, "stages": stages.found}


def write_folder(folder: Path, shape: Shape, like: GgufHeader, tokenizer_of: Path) -> int:
    """Write a transformers folder with random f16 weights, one shard per layer, and the tokenizer of the base `like`.

    Returns the number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer_of, folder)
    (folder / "config.json").write_text(json.dumps(_config(shape, like), indent=2), encoding="utf-8")
    rng = np.random.default_rng(0)
    vocabulary = len(like.metadata["tokenizer.ggml.tokens"])
    ends = {"model.embed_tokens.weight": (vocabulary, shape.width), "model.norm.weight": (shape.width,)}
    parts = [ends, *(_layer(number, shape) for number in range(shape.layers))]
    places: dict[str, str] = {}
    for number, sizes in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: _random(size, rng) for name, size in sizes.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(sizes, file)
    parameters = sum(math.prod(size) for sizes in parts for size in sizes.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return parameters


def _config(shape: Shape, like: GgufHeader) -> dict[str, Any]:
    metadata = like.metadata
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": _HEAD_SIZE,
        "intermediate_size": shape.inner,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def _layer(number: int, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a layer's weights."""
    width, inner, keys = shape.width, shape.inner, shape.key_heads * _HEAD_SIZE
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}


def _random(size: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Matrices with the standard deviation of trained ones; a norm's weights are ones."""
    if len(size) == 1:
        return np.ones(size, np.float16)
    values = rng.standard_normal(size, np.float32)
    values *= 0.02
    return values.astype(np.float16)


def write_rows(out: Path, count: int, tokens: int) -> None:
    """Write rows that fill a context of `tokens`: each word is one token, the chat template takes some more."""
    rng = random.Random(0)
    rows = [{"prompt": " ".join(rng.choices(WORDS.split(), k=tokens - 64)), "completion": "lamp"} for _ in range(count)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Stages(Progress):
    """Recognizes the stages of a build by its messages, and records the peak memory and the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, float]] = {}
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
    """A process and all its descendants."""
    found = [process]
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _family(int(child))
    return found


def table(result: dict[str, Any]) -> str:
    """A Markdown table: a row per size with peak and time of each stage, and the build's peak over the training's."""
    lines = [
        "Peak memory in MB (in parentheses: bytes per parameter) and time of each stage of a build "
        f"(rows of {result['row_tokens']} tokens, {result['steps']} steps of one row, {result['machine']['cpu']}).",
        "",
        f"| base | {' | '.join(STAGES)} | build / training |",
        f"| --- |{' --- |' * (len(STAGES) + 1)}",
    ]
    for size, found in result["sizes"].items():
        stages = found.get("stages", {})
        cells = [_cell(stages[stage], found["parameters"]) if stage in stages else "" for stage in STAGES]
        share = found.get("failed") or f"{_peak(stages) / _training_mb(stages):.2f}"
        lines.append(f"| {size} | {' | '.join(cells)} | {share} |")
    for size, found in result["sizes"].items():
        if "limited" in found:
            lines += ["", _said_of_limit(size, found)]
    return "\n".join(lines) + "\n"


def _said_of_limit(size: str, found: dict[str, Any]) -> str:
    limited = found["limited"]
    within = f"{size} within {limited['limit_mb']:,} MB"
    if "failed" in limited:
        return f"{within}: {limited['failed']}"
    seconds = [sum(stage["seconds"] for stage in of["stages"].values()) for of in (limited, found)]
    return f"{within}: built in {seconds[0]:.0f} s, without a limit in {seconds[1]:.0f} s."


def _training_mb(stages: dict[str, dict[str, float]]) -> float:
    return max(stages[stage]["peak_mb"] for stage in ("load", "step"))


def _cell(stage: dict[str, float], parameters: int) -> str:
    return f"{stage['peak_mb']} ({stage['peak_mb'] * 1e6 / parameters:.1f}), {stage['seconds']} s"


def _peak(stages: dict[str, dict[str, float]]) -> float:
    return max(stage["peak_mb"] for stage in stages.values())


def plot(result: dict[str, Any], out: Path) -> None:
    """Plot peak memory and time of each stage by the number of parameters."""
    import matplotlib as mpl  # noqa: PLC0415 - needed only for a plot

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

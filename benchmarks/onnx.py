"""Compare edgetune's ONNX engine with onnxruntime-genai: decode and prefill speed, and the cost of adapters.

    pip install -e '.[demo]'
    python benchmarks/onnx.py --json

Same files, same threads: SmolLM2-135M in q4_0 and a 0.5B model with random weights, each with random rank-16 adapters
on all linear layers and on q and v. The engines take turns, a few steps each, so that noise affects both equally;
medians are compared. `share` is the decode speed with an adapter relative to the plain base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

# Python imports from the script's folder first, where this file would shadow the package onnx.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

import gguf
import numpy as np
import onnxruntime_genai as og
import torch
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx import backend
from edgetune_runtime.engines.onnx.engine import OnnxEngine

from edgetune import bases
from edgetune.bases import Base
from edgetune.progress import Progress

RANK = 16
BASE = backend.MODEL_FILE
CONTEXT, PROMPT, STEPS = 512, 256, 24
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"all-linear": ALL, "q+v": ("q_proj", "v_proj")}
# The sizes of Qwen2.5-0.5B, with SmolLM2's vocabulary.
HALF = {"layers": 24, "hidden": 896, "inner": 4864, "heads": 14, "kv_heads": 2}


def main() -> None:
    """Build the two bases, run the rounds and print ratios."""
    parser = argparse.ArgumentParser(description="Compare edgetune's ONNX engine with onnxruntime-genai.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        WORKERS[options.worker](options.folder, options.threads)
        return
    figures: dict[str, Any] = {"threads": options.threads, "rank": RANK}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        smollm2 = bases.resolve(
            "smollm2-135m", folder=Path(), quantization="q4_0", work=work, progress=Progress(), converter=None
        )
        random_base(work / "half.gguf", smollm2.path)
        half = bases.resolve(
            str(work / "half.gguf"), folder=Path(), quantization=None, work=work, progress=Progress(), converter=None
        )
        for name, base in {"smollm2-135m": smollm2, "random-0.5b": half}.items():
            export(base, work / name, options.threads)
            figures[name] = measure(work / name, options.threads, options.rounds)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Median decode and prefill speed for each engine and adapter, and their ratios."""
    setups = [(engine, name) for name in ("base", *ADAPTERS) for engine in WORKERS]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {setup: [] for setup in setups}
    with ExitStack() as stack:
        # Each engine in its own process, so that the spinning threads of one do not slow down the other.
        workers = {engine: stack.enter_context(Worker(engine, folder, threads)) for engine in WORKERS}
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            for engine, name in setups:
                times_s = workers[engine].run(name)
                if number:
                    times[engine, name].append(times_s)
    prefill = {setup: PROMPT / statistics.median(first for first, _ in found) for setup, found in times.items()}
    decode = {setup: 1 / statistics.median(step for _, step in found) for setup, found in times.items()}
    names = ("base", *ADAPTERS)
    return {
        "decode_tokens_per_s": {" ".join(setup): round(speed, 1) for setup, speed in decode.items()},
        "prefill_tokens_per_s": {" ".join(setup): round(speed) for setup, speed in prefill.items()},
        "decode_ratio": {name: round(decode["edgetune", name] / decode["genai", name], 2) for name in names},
        "prefill_ratio": {name: round(prefill["edgetune", name] / prefill["genai", name], 2) for name in names},
        "share": {name: round(decode["edgetune", name] / decode["edgetune", "base"], 3) for name in ADAPTERS},
    }


class Worker:
    """A process that measures one engine on demand."""

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", engine, "--folder", str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, name: str) -> tuple[float, float]:
        """Seconds per prompt and per decode step with this adapter or the base."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        prompt_s, step_s = json.loads(self._process.stdout.readline())
        return prompt_s, step_s


def work_ours(folder: Path, threads: int) -> None:
    """Measure edgetune's engine with each adapter that is named on standard input."""
    with closing(OnnxEngine(folder / BASE, context_length=CONTEXT, threads=threads)) as engine:
        for name in ADAPTERS:
            engine.load_adapter(name, folder / f"{name}.onnx_adapter")
        for line in sys.stdin:
            name = line.strip()
            print(json.dumps(ours(engine, None if name == "base" else name)), flush=True)


def work_genai(folder: Path, _threads: int) -> None:
    """Measure onnxruntime-genai with each adapter that is named on standard input; its config file has the threads."""
    model = og.Model(str((folder / BASE).parent))
    adapters = og.Adapters(model)
    for name in ADAPTERS:
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(genai(model, adapters, None if name == "base" else name)), flush=True)


WORKERS: dict[str, Callable[[Path, int], None]] = {"edgetune": work_ours, "genai": work_genai}


def ours(engine: OnnxEngine, name: str | None) -> tuple[float, float]:
    """Seconds per prompt, and median seconds per decode step."""
    engine.activate({} if name is None else {name: 1.0})
    engine.truncate(0)
    prompt_s = timed(lambda: engine.decode(range(100, 100 + PROMPT)))
    return prompt_s, statistics.median(timed(lambda: engine.decode([7])) for _ in range(STEPS))


def genai(model: Any, adapters: Any, name: str | None) -> tuple[float, float]:  # noqa: ANN401 - the library's own
    """The same with onnxruntime-genai. It needs a new generator for each prompt, whose creation is not counted."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=CONTEXT, do_sample=False)
    generator = og.Generator(model, params)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    prompt_s = timed(lambda: generator.append_tokens(list(range(100, 100 + PROMPT))))
    generator.generate_next_token()
    return prompt_s, statistics.median(timed(generator.generate_next_token) for _ in range(STEPS))


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def export(base: Base, folder: Path, threads: int) -> None:
    """Write the base with adapter slots and the adapters; sets `threads` for genai too."""
    model = bases.load_torch(base, torch.float32)
    source = Source(base.path, base.fingerprint, model, folder / "work")
    random = np.random.default_rng(0)
    linear = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in ALL}
    adapters = []
    for name, targets in ADAPTERS.items():
        chosen = {key: module for key, module in linear.items() if key.rpartition(".")[2] in targets}
        deltas = {key: delta(random, module.in_features, module.out_features) for key, module in chosen.items()}
        adapters.append(LowRank(name, "lora", deltas))
    graph = backend.write_base(source, folder, adapters)
    for adapter in adapters:
        out = folder / f"{adapter.name}.onnx_adapter"
        backend.write_adapter(adapter, graph, out, base_fingerprint=base.fingerprint)
    shutil.rmtree(source.work)
    config = graph.with_name("genai_config.json")
    values = json.loads(config.read_text(encoding="utf-8"))
    values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config.write_text(json.dumps(values), encoding="utf-8")


def delta(random: np.random.Generator, columns: int, rows: int) -> Delta:
    """A random low-rank update, small enough to keep the activations in range."""
    a, b = random.normal(0, 0.02, (RANK, columns)), random.normal(0, 0.02, (rows, RANK))
    return Delta(a.astype(np.float32), b.astype(np.float32))


def random_base(out: Path, vocabulary: Path) -> None:
    """Write a 0.5B q4_0 base with random weights and the tokenizer of another GGUF file."""
    other, layers, hidden = gguf.GGUFReader(vocabulary), HALF["layers"], HALF["hidden"]
    head_size = hidden // HALF["heads"]
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in other.fields.items():
        if key.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    writer.add_context_length(2048)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(HALF["inner"])
    writer.add_head_count(HALF["heads"])
    writer.add_head_count_kv(HALF["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(1e5)
    vocab_size = len(other.fields["tokenizer.ggml.tokens"].data)
    kv = HALF["kv_heads"] * head_size
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (HALF["inner"], hidden), "ffn_up": (HALF["inner"], hidden)}
    shapes["ffn_down"] = (hidden, HALF["inner"])
    random = np.random.default_rng(0)
    add_blocks(writer, random, "token_embd.weight", (vocab_size, hidden))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, shape in shapes.items():
            add_blocks(writer, random, f"blk.{layer}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_blocks(writer: gguf.GGUFWriter, random: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    """Add a matrix of random q4_0 blocks; its weights have a standard deviation of about 0.02."""
    rows, columns = shape
    blocks = random.integers(0, 256, (rows, columns // 32, 18), np.uint8)
    blocks[..., :2] = np.full((rows, columns // 32, 1), 0.0045, np.float16).view(np.uint8)
    writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


if __name__ == "__main__":
    main()

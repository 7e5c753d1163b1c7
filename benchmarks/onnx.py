"""Compare edgetune's ONNX engine with onnxruntime-genai: decode and prefill speed, and the cost of adapters.

    pip install -e '.[demo]'
    python benchmarks/onnx.py --json

Same files, same threads: SmolLM2-135M in q4_0 and a 0.5B model with random weights, each with random rank-16 adapters
on all linear layers and on q and v. The engines take turns, a few steps each, so that noise affects both equally;
medians are compared. `share` is the decode speed with an adapter relative to the plain base.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.bundles import Shape, resolve_base, write_base
from benchmarks.harness.turns import in_turns
from benchmarks.harness.worker import Worker

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx import backend
from edgetune_runtime.engines.onnx.engine import OnnxEngine

from benchmarks.libraries import genai_adapters, genai_generator
from edgetune import bases
from edgetune.bases import Base

RANK = 16
BASE = backend.MODEL_FILE
CONTEXT, PROMPT, STEPS = 512, 256, 24
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"all-linear": ALL, "q+v": ("q_proj", "v_proj")}
# The sizes of Qwen2.5-0.5B, with SmolLM2's vocabulary.
HALF = Shape(896, 24, 14, 2, 4864)


def main() -> None:
    """Build the two bases, run the rounds and print ratios."""
    names = ["smollm2-135m", "random-0.5b"]
    parser = BENCHMARK.parser(only=names, threads=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = BENCHMARK.options(parser, rounds=1)
    figures: Result = {"rank": RANK}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in options.only:
            source = name
            if name == "random-0.5b":
                source = str(work / "half")
                write_base(work / "half", HALF)
            base = resolve_base(source, quantization="q4_0", work=work)
            export(base, work / name, options.threads)
            figures[name] = measure(work / name, options.threads, options.rounds)
    BENCHMARK.report(options, figures)


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Median decode and prefill speed for each engine and adapter, and their ratios."""
    names = ("base", *ADAPTERS)
    with ExitStack() as stack:
        # Each engine in its own process, so that the spinning threads of one do not slow down the other.
        workers = {name: stack.enter_context(Worker(make, folder, threads)) for name, make in ENGINES.items()}
        runs = {f"{engine} {name}": partial(workers[engine], name) for name in names for engine in ENGINES}
        times = in_turns(runs, rounds, warmups=1)
    prefill = {setup: PROMPT / statistics.median(first for first, _ in timed) for setup, timed in times.items()}
    decode = {setup: 1 / statistics.median(step for _, step in timed) for setup, timed in times.items()}
    return {
        "decode_tokens_per_s": {setup: round(speed, 1) for setup, speed in decode.items()},
        "prefill_tokens_per_s": {setup: round(speed) for setup, speed in prefill.items()},
        "decode_ratio": {name: round(decode[f"edgetune {name}"] / decode[f"genai {name}"], 2) for name in names},
        "prefill_ratio": {name: round(prefill[f"edgetune {name}"] / prefill[f"genai {name}"], 2) for name in names},
        "share": {name: round(decode[f"edgetune {name}"] / decode["edgetune base"], 3) for name in ADAPTERS},
    }


def ours(folder: Path, threads: int) -> Callable[[str], tuple[float, float]]:
    """Open edgetune's engine; returns a function that measures an adapter, or the base.

    It gives the seconds per prompt, and the median seconds per decode step.
    """
    engine = OnnxEngine(folder / BASE, context_length=CONTEXT, threads=threads)
    for name in ADAPTERS:
        engine.load_adapter(name, folder / f"{name}.onnx_adapter")

    def run(name: str) -> tuple[float, float]:
        engine.activate({} if name == "base" else {name: 1.0})
        engine.truncate(0)
        prompt_s = timed(lambda: engine.decode(range(100, 100 + PROMPT)))
        return prompt_s, statistics.median(timed(lambda: engine.decode([7])) for _ in range(STEPS))

    return run


def genai(folder: Path, _threads: int) -> Callable[[str], tuple[float, float]]:
    """The same with onnxruntime-genai; its config file has the threads.

    It needs a new generator for each prompt, whose creation is not counted.
    """
    model = og.Model(str((folder / BASE).parent))
    adapters = genai_adapters(model, {name: folder / f"{name}.onnx_adapter" for name in ADAPTERS})

    def run(name: str) -> tuple[float, float]:
        generator = genai_generator(model, CONTEXT)
        if name != "base":
            generator.set_active_adapter(adapters, name)
        prompt_s = timed(lambda: generator.append_tokens(list(range(100, 100 + PROMPT))))
        generator.generate_next_token()
        return prompt_s, statistics.median(timed(generator.generate_next_token) for _ in range(STEPS))

    return run


ENGINES = {"edgetune": ours, "genai": genai}


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


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

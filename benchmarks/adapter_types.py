"""Measure what adapters cost beside a GGUF base by their rank and the number format of their file (`dtype`).

    python benchmarks/adapter_types.py --out benchmarks/results

Random LoRAs on all linear layers of SmolLM2-135M in q4_0, in llama.cpp. Prompts of 256 tokens and single tokens after
them are computed in turn with each adapter and without; `share` is the speed with the adapter relative to the base
alone. With one thread, times are CPU times, which a busy machine changes least.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.bundles import resolve_base
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import in_turns

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.gguf import FORMAT
from edgetune_export.backends.gguf.backend import write_adapter
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.formats.gguf_file import read_header

RANKS = (8, 16, 32)
PROMPT_TOKENS, DECODED = 256, 24
BASE = "base"


def random_adapter(base: Path, rank: int) -> LowRank:
    """Small changes of all linear layers."""
    random = np.random.default_rng(0)
    modules = {
        module.name: Delta(
            random.normal(0, 0.05, (rank, module.columns)).astype(np.float32),
            random.normal(0, 0.02, (module.rows, rank)).astype(np.float32),
        )
        for module in BaseShape.of_header(read_header(base)).modules
        if module.layer >= 0
    }
    return LowRank("random", "lora", modules)


def measure(engine: GgufEngine, name: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds of a prompt, and of a token after it."""
    engine.truncate(0)
    engine.activate({} if name == BASE else {name: 1.0})
    begin = clock()
    engine.decode(range(300, 300 + PROMPT_TOKENS))
    prompt_s, tokens_s = clock() - begin, []
    for token in range(DECODED):
        begin = clock()
        engine.decode([400 + token])
        tokens_s.append(clock() - begin)
    return prompt_s * 1e3, statistics.median(tokens_s) * 1e3


def main() -> None:
    parser = BENCHMARK.parser(threads=1, works=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rounds", type=int, default=10)
    options = BENCHMARK.options(parser, ranks=[8], rounds=1)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    sizes = {}
    with work_folder(options) as work:
        base = resolve_base(quantization="q4_0", work=work)
        with closing(GgufEngine(base.path, context_length=512, threads=options.threads)) as engine:
            for rank in options.ranks:
                adapter = random_adapter(base.path, rank)
                for dtype in FORMAT.adapter_dtypes:
                    name, file = f"{rank} {dtype}", work / f"{rank}-{dtype}.gguf"
                    write_adapter(adapter, base.path, file, dtype=dtype, base_fingerprint=base.fingerprint)
                    engine.load_adapter(name, file)
                    sizes[name] = file.stat().st_size / 1e6
            runs = {name: partial(measure, engine, name, clock) for name in (BASE, *sizes)}
            times = in_turns(runs, options.rounds, warmups=1)
    medians = {name: [statistics.median(values) for values in zip(*each, strict=True)] for name, each in times.items()}
    figures = {
        name: {
            "prompt_ms": round(prompt, 1),
            "token_ms": round(token, 2),
            "prompt_share": round(medians[BASE][0] / prompt, 3),
            "token_share": round(medians[BASE][1] / token, 3),
            "mb": round(sizes.get(name, 0.0), 1),
        }
        for name, (prompt, token) in medians.items()
    }
    BENCHMARK.report(options, {"adapters": figures})


def table(result: Result) -> str:
    rows = [{"name": name, **figures} for name, figures in result["adapters"].items()]
    columns = {
        "rank, dtype": "{name}",
        "file": "{mb:.1f} MB",
        f"prompt of {PROMPT_TOKENS} tokens": "{prompt_ms:.0f} ms",
        "prompt share": "{prompt_share:.2f}",
        "token": "{token_ms:.2f} ms",
        "token share": "{token_share:.2f}",
    }
    return f"{said_of_machine(result)}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

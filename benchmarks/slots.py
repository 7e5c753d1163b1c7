"""Measure a step of llama.cpp with adapters in slots of the model, beside adapters as the runtime uses them.

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/slots.py build/smart-home

Four callers have the base and three adapters. The base must be able to have slots (`engines/gguf/slots`).
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import in_turns, spread
from benchmarks.harness.worker import Worker

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.llama import decode_batch, library, make_context
from edgetune_runtime.engines.gguf.slots import SlotPool, compose
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import read_header

PROMPT = [1, *(100 + 37 * number % 4000 for number in range(63))]
CALLERS = 4
CONTEXT_LENGTH = 512
SETUPS = {
    "base": (1, False),
    "adapter": (1, False),
    "base in slots": (1, True),
    "adapter in slots": (1, True),
    "4 callers in turn": (CALLERS, False),
    "4 callers in one batch of slots": (CALLERS, True),
}
"""The number of callers, and whether they use slots; one caller has the base or the first adapter."""


def adapters_of(bundle: Path, setup: str) -> list[tuple[str, Path] | None]:
    """The adapter of each caller with its file; None for the base."""
    manifest = read_manifest(bundle)
    files = [(name, resolve(bundle, entry.files["gguf"])) for name, entry in manifest.adapters.items()]
    if SETUPS[setup][0] == 1:
        return [None if setup.startswith("base") else files[0]]
    return [None, *files[: CALLERS - 1]]


def steps_as_today(bundle: Path, setup: str, threads: int, count: int) -> Callable[[], float]:
    """A context per caller with its adapter; the median time in ms until each has computed a token."""
    base = resolve(bundle, read_manifest(bundle).base.files["gguf"])
    first = GgufEngine(base, context_length=CONTEXT_LENGTH, threads=threads)
    engines = [first]
    for caller, adapter in enumerate(adapters_of(bundle, setup)):
        if caller:
            engines.append(first.fork())
        if adapter is not None:
            engines[-1].load_adapter(*adapter)
            engines[-1].activate({adapter[0]: 1.0})
        engines[-1].decode(PROMPT)

    def step() -> None:
        for engine in engines:
            engine.decode([500])
            engine.truncate(len(PROMPT))

    return lambda: median_ms(step, count)


def steps_in_slots(bundle: Path, setup: str, threads: int, count: int) -> Callable[[], float]:
    """A sequence per caller in one context; the median time in ms of a batch with a token of each."""
    base = resolve(bundle, read_manifest(bundle).base.files["gguf"])
    header, adapters = read_header(base), adapters_of(bundle, setup)
    check_base(header, base)
    rank = max(max(entry.ranks.values()) for entry in read_manifest(bundle).adapters.values())
    model = compose(base, header, CALLERS, rank, repack=True)
    pool, llama = SlotPool(model, header), library()
    context = make_context(model.pointer, CONTEXT_LENGTH, threads, batch=128, sequences=8, kv="f16")
    memory, stack = llama.llama_get_memory(context), ExitStack()
    slots = []
    for name, file in filter(None, adapters):
        pool.add(name, file)
    for caller, adapter in enumerate(adapters):
        slots.append(stack.enter_context(pool.use({} if adapter is None else {adapter[0]: 1.0})).slot)
        tokens = model.tokens_for(slots[-1], PROMPT, begins=True)
        outputs = [False] * (len(tokens) - 1) + [True]
        assert decode_batch(context, tokens, range(len(tokens)), [(caller,)] * len(tokens), outputs) == 0
    callers, width = len(adapters), llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model.pointer))

    def step() -> None:
        tokens = [token for slot in slots for token in model.tokens_for(slot, [500], begins=False)]
        positions, members = [len(PROMPT)] * callers, [(caller,) for caller in range(callers)]
        assert decode_batch(context, tokens, positions, members, [True] * callers) == 0
        np.ctypeslib.as_array(llama.llama_get_logits(context), (callers, width)).copy()
        for caller in range(callers):
            llama.llama_memory_seq_rm(memory, caller, len(PROMPT), -1)

    return lambda: median_ms(step, count)


def median_ms(step: Callable[[], None], count: int) -> float:
    """The median time of a step."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Run the setups in turns."""
    parser = BENCHMARK.parser(only=list(SETUPS), threads=2)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = BENCHMARK.options(parser, rounds=1, steps=2)
    setups: Sequence[str] = options.only
    with ExitStack() as stack:
        workers = {
            setup: stack.enter_context(
                Worker(
                    steps_in_slots if SETUPS[setup][1] else steps_as_today,
                    options.bundle,
                    setup,
                    options.threads,
                    options.steps,
                )
            )
            for setup in setups
        }
        times = in_turns(workers, options.rounds, warmups=1)
    BENCHMARK.report(options, {"setups": {setup: spread(values) for setup, values in times.items()}})


def table(result: Result) -> str:
    """A row per setup."""
    rows = [{"setup": setup, **figures} for setup, figures in result["setups"].items()]
    columns = {"setup": "{setup}", "ms per step": "{median:.1f}", "range": "{min:.1f} to {max:.1f}"}
    return f"{said_of_machine(result)}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

"""Measure callers that generate at the same time, in both engines and in other libraries; writes a table and a plot.

    pip install -e '.[demo]' xllamacpp onnxruntime-genai
    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/batching.py --json --out benchmarks/results

Each caller is a thread that asks for one answer after another: all callers with the bundle's first adapter, or with the
base and all adapters in turn, so that calls at the same time have different ones. All answers are streamed and greedy;
one is wrong if its text is not that which the same setup gives to a caller alone. `benchmarks/serve.py` measures the
same of the server, with clients over HTTP.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.plots import subplots
from benchmarks.harness.tables import markdown, progress
from benchmarks.harness.turns import in_turns
from benchmarks.harness.worker import Worker

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.engines.gguf.base import GgufTokenizer

from benchmarks.batching_setups import SETUPS, Answering, Place
from benchmarks.serve import Ask, Reply, asks_of, latencies

SAME, DIFFERENT = "same adapter", "different adapters"
CALLERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Load:
    """The answers to some requests, the seconds that they took together, and how many were wrong."""

    replies: Sequence[Reply]
    seconds: float
    wrong: int


def main() -> None:
    """Run every setup that is installed, in turns, and write the figures."""
    parser = BENCHMARK.parser(only=[*SETUPS], threads=2)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/smart-home"))
    parser.add_argument("--recipe", type=Path, default=Path("examples/smart-home/quick.yaml"), help="has the rows")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS, help="threads at the same time")
    parser.add_argument("--requests", type=int, default=48, help="of all callers together")
    parser.add_argument("--rows", type=int, default=12, help="validation rows per adapter")
    parser.add_argument("--rounds", type=int, default=3)
    options = BENCHMARK.options(parser, callers=[1, 2], requests=4, rows=2, rounds=1)
    manifest = read_manifest(options.bundle)
    lacking = {name: reason for name in options.only if (reason := SETUPS[name].lacks(manifest))}
    for name, reason in lacking.items():
        progress(f"{name} is left out: {reason}")
    asks = {kind: list(islice(cycle(own), options.requests)) for kind, own in requests(options).items()}
    place = Place(options.bundle, options.threads, max(options.callers))
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(open_setup, name, place, asks, options.callers))
            for name in options.only
            if name not in lacking
        }
        rounds = in_turns(workers, options.rounds)
    tokenizer = GgufTokenizer(resolve(options.bundle, manifest.base.files["gguf"]))
    loads = [
        {"setup": setup, "adapters": kind, "callers": callers} | figures([one[kind, callers] for one in own], tokenizer)
        for setup, own in rounds.items()
        for kind, callers in own[0]
    ]
    BENCHMARK.report(options, {"left_out": lacking, "loads": loads})


def requests(options: argparse.Namespace) -> dict[str, list[Ask]]:
    """Requests that all have the first adapter, and of the base and all adapters in turn."""
    asks = asks_of(options)
    first = [ask for ask in asks if ask.adapter == asks[0].adapter]
    different = [[replace(ask, adapter=""), ask] if ask in first else [ask] for ask in asks]
    return {SAME: first, DIFFERENT: [ask for group in different for ask in group]}


def open_setup(
    name: str, place: Place, asks: Mapping[str, Sequence[Ask]], callers: Sequence[int]
) -> Callable[[], dict[tuple[str, int], Load]]:
    """Open a setup and answer each request alone; returns a function that measures each kind and number of callers."""
    answer = SETUPS[name].open(place)
    alone = {ask: timed(answer, ask).text for ask in dict.fromkeys(chain(*asks.values()))}

    def load(kind: str, count: int) -> Load:
        begin = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            replies = list(threads.map(partial(timed, answer), asks[kind]))
        seconds = time.perf_counter() - begin
        return Load(replies, seconds, sum(r.text != alone[ask] for r, ask in zip(replies, asks[kind], strict=True)))

    return lambda: {(kind, count): load(kind, count) for kind in asks for count in callers}


def timed(answer: Answering, ask: Ask) -> Reply:
    """The answer with its times."""
    begin = time.perf_counter()
    pieces = answer(ask)
    whole_s = time.perf_counter() - begin
    return Reply("".join(piece for piece, _ in pieces), whole_s, [came - begin for piece, came in pieces if piece])


def figures(rounds: Sequence[Load], tokenizer: GgufTokenizer) -> dict[str, Any]:
    """Figures over all rounds; the tokens are those of the answers' texts."""
    replies = [reply for load in rounds for reply in load.replies]
    seconds = sum(load.seconds for load in rounds)
    return {
        "answers": len(replies),
        "wrong": sum(load.wrong for load in rounds),
        "requests_per_s": round(len(replies) / seconds, 2),
        "tokens_per_s": round(sum(len(tokenizer.tokenize(reply.text)) for reply in replies) / seconds, 1),
        **latencies(replies),
    }


def table(result: Result) -> str:
    """Markdown: a row for each setup, kind of adapters and number of callers."""
    about = (
        f"{result['requests']} requests per round, {result['rounds']} rounds, {said_of_machine(result)}. Speedup: "
        "tokens/s relative to one caller. One step can give several tokens, with no time between them."
    )
    columns = {
        "setup": "{setup}",
        "adapters": "{adapters}",
        "callers": "{callers}",
        "requests/s": "{requests_per_s:.1f}",
        "tokens/s": "{tokens_per_s:.0f}",
        "speedup": "{speedup:.2f}",
        "TTFT p50 / p99, ms": "{ttft_ms[p50]:.0f} / {ttft_ms[p99]:.0f}",
        "between tokens p50 / p99, ms": "{between_ms[p50]:.1f} / {between_ms[p99]:.0f}",
        "wrong": "{wrong} of {answers}",
    }
    alone = {
        (load["setup"], load["adapters"]): load["tokens_per_s"] for load in result["loads"] if load["callers"] == 1
    }
    rows = []
    for load in result["loads"]:
        single = alone.get((load["setup"], load["adapters"]))
        rows.append({**load, "speedup": load["tokens_per_s"] / single if single else None})
    left_out = "".join(f"\n{name} is left out: {reason}.\n" for name, reason in result["left_out"].items())
    return f"{about}\n\n{markdown(rows, columns)}{left_out}"


def plot(result: Result, out: Path) -> None:
    """Plot tokens/s over the number of callers, a panel for the same and for different adapters."""
    loads = result["loads"]
    with subplots(out, 1, 2, dpi=130, figsize=(10, 4), sharey=True) as panels:
        for kind, axes in zip((SAME, DIFFERENT), panels, strict=True):
            for setup in dict.fromkeys(load["setup"] for load in loads):
                own = [load for load in loads if (load["setup"], load["adapters"]) == (setup, kind)]
                style = "o-" if setup.startswith("edgetune") else "o--"
                axes.plot([load["callers"] for load in own], [load["tokens_per_s"] for load in own], style, label=setup)
            axes.set_title(f"{kind}: tokens/s of all callers", loc="left", fontsize=10)
            axes.set_xlabel("callers at the same time")
            axes.set_xticks(sorted({load["callers"] for load in loads}))
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, fontsize=8)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

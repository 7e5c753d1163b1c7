"""Measure both engines and other runtimes under CPU contention: time to first token and tokens/s.

    pip install -e '.[demo,bench]'
    python benchmarks/busy.py --json --out benchmarks/results

SmolLM2-135M in q4_0 with one rank-16 adapter on all linear layers. Each setup stays loaded in its own process and
answers the same requests of 16 tokens under each condition. The setups take turns in rounds, so that slow phases of the
machine affect all of them. CPU quotas need writable cgroup v1 or v2 folders, and are skipped without them.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.cgroup import cpu_quota
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.plots import subplots
from benchmarks.harness.tables import markdown, progress
from benchmarks.harness.turns import p99
from benchmarks.harness.worker import SPAWN, Worker

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from benchmarks.switching import prepare, read_requests
from benchmarks.switching_setups import SETUPS as SWITCHING_SETUPS
from benchmarks.switching_setups import Defaults, Folder

SETUPS = {
    **{name: SWITCHING_SETUPS[name] for name in ("edgetune gguf", "edgetune onnx")},
    "Llama with its defaults": Defaults,
    **{name: SWITCHING_SETUPS[name] for name in ("llama-server", "onnxruntime-genai")},
}
QUIET = "quiet"
SIDE_BY_SIDE = "two of the same"
ROUND_S = 12.0
"""Longest time of one setup's round; it ends earlier when all requests are answered."""
MOST_WAIT_S = 60
"""Longest wait for a busy process to do something."""


@dataclass(frozen=True)
class Condition:
    """What else runs: kinds of busy processes, a second process of the same setup, or a CPU quota in cores."""

    name: str
    neighbours: tuple[str, ...] = ()
    quota: float | None = None


CONDITIONS = (
    Condition(QUIET),
    Condition("1 CPU-bound", ("spin",)),
    Condition("2 CPU-bound", ("spin", "spin")),
    Condition("2 memory-bound", ("copy", "copy")),
    Condition("training", ("train",)),
    Condition(SIDE_BY_SIDE),
    Condition("quota 1.0", quota=1.0),
    Condition("quota 0.5", quota=0.5),
)


class Neighbour:
    """A busy process, which counts its rounds of work."""

    def __init__(self, kind: str) -> None:
        self._rounds = SPAWN.Value("q", 0)
        self._process = SPAWN.Process(target=disturb, args=(kind, self._rounds))
        self._process.start()
        while not self.count():
            time.sleep(0.05)

    def count(self) -> int:
        """Rounds of work done so far."""
        return int(self._rounds.value)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def main() -> None:
    parser = BENCHMARK.parser(only=[*SETUPS], threads=os.cpu_count() or 1, works=True)
    parser.add_argument("--requests", type=int, default=12, help="requests per setup and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of the task's fixed prompt")
    parser.set_defaults(adapters=1)
    options = BENCHMARK.options(parser, requests=1, rounds=1, prompt_tokens=32)
    with work_folder(options) as work:
        prepare(options, work)
        BENCHMARK.report(options, {"setups": measure(options, Folder(work, 1, options.threads))})


def measure(options: argparse.Namespace, folder: Folder) -> dict[str, Any]:
    """Measure each setup under each condition."""
    by_setup: dict[str, dict[str, Any]] = {setup: {} for setup in options.only}
    makes = {setup: partial(Worker, setup_rounds, setup, folder, options.requests) for setup in options.only}
    with ExitStack() as stack:
        workers = {setup: stack.enter_context(make()) for setup, make in makes.items()}
        raw: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for condition in CONDITIONS:
                progress(f"round {number + 1} of {options.rounds}: {condition.name}")
                for setup, took in _round(condition, workers, makes):
                    progress(f"  {setup}: {_tokens_per_s(took):.1f} tokens/s")
                    raw.setdefault((setup, condition.name), []).append(took)
    for (setup, name), rounds in raw.items():
        by_setup[setup][name] = _figures(rounds)
    for figures in by_setup.values():
        for one in figures.values():
            one["share_of_quiet"] = one["tokens_per_s"] / figures[QUIET]["tokens_per_s"]
            one["first_token_times_quiet"] = one["first_token_ms_p50"] / figures[QUIET]["first_token_ms_p50"]
    return by_setup


def _round(
    condition: Condition, workers: Mapping[str, Worker], makes: Mapping[str, Callable[..., Worker]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run one round of each setup under the condition; yields the times of each."""
    with ExitStack() as stack:
        if condition.quota is not None:
            try:
                procs = stack.enter_context(cpu_quota(condition.quota)).procs
            except OSError as error:
                progress(f"no CPU quota here: {error}")
                return
            for setup, make in makes.items():
                with make(procs=procs) as worker:
                    yield setup, _took([worker], [])
            return
        neighbours = [stack.enter_context(closing(Neighbour(kind))) for kind in condition.neighbours]
        alone = _rates(neighbours, 1.0)
        for setup, worker in workers.items():
            if condition.name == SIDE_BY_SIDE:
                with makes[setup]() as second:
                    yield setup, _took([worker, second], [])
            else:
                yield setup, _took([worker], neighbours, alone)


def _took(workers: Sequence[Worker], neighbours: Sequence[Neighbour], alone: Sequence[float] = ()) -> dict[str, Any]:
    # After this pause the setup has to detect the other processes again, as after a pause between calls.
    time.sleep(1.0)
    begin, before = time.perf_counter(), [neighbour.count() for neighbour in neighbours]
    for worker in workers:
        worker.begin()
    rounds = [worker.end() for worker in workers]
    seconds = time.perf_counter() - begin
    rates = [(neighbour.count() - count) / seconds for neighbour, count in zip(neighbours, before, strict=True)]
    # With two processes of the same setup, report the slower one.
    took: dict[str, Any] = max(rounds, key=lambda one: statistics.fmean(one["steps_s"]))
    took["neighbours"] = [rate / own for rate, own in zip(rates, alone, strict=True)]
    return took


def _rates(neighbours: Sequence[Neighbour], least_s: float) -> list[float]:
    begin, before = time.perf_counter(), [neighbour.count() for neighbour in neighbours]
    time.sleep(least_s)
    # On a slow machine a training step takes seconds.
    while any(neighbour.count() == count for neighbour, count in zip(neighbours, before, strict=True)):
        if time.perf_counter() - begin > MOST_WAIT_S:
            raise RuntimeError(f"a busy process did nothing in {MOST_WAIT_S} s")
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    return [(neighbour.count() - count) / seconds for neighbour, count in zip(neighbours, before, strict=True)]


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    firsts = [first for took in rounds for first in took["firsts_s"]]
    steps = [step for took in rounds for step in took["steps_s"]]
    neighbours = [share for took in rounds for share in took["neighbours"]]
    return {
        "first_token_ms_p50": statistics.median(firsts) * 1e3,
        "first_token_ms_p99": p99(firsts) * 1e3,
        "tokens_per_s": statistics.median(map(_tokens_per_s, rounds)),
        "longest_step_ms": max(steps) * 1e3,
        "neighbours_speed": statistics.fmean(neighbours) if neighbours else None,
    }


def _tokens_per_s(took: dict[str, Any]) -> float:
    return float(len(took["steps_s"]) / sum(took["steps_s"]))


def setup_rounds(name: str, folder: Folder, requests: int) -> Callable[[], dict[str, list[float]]]:
    """Load one setup; returns a function that answers a round of requests.

    It gives the times to first token, and the times of all other tokens, in seconds.
    """
    setup = SETUPS[name](folder)
    asked = read_requests(folder.path)["round robin"]
    setup.answer(asked[0])

    def answer_round() -> dict[str, list[float]]:
        took: dict[str, list[float]] = {"firsts_s": [], "steps_s": []}
        end = time.perf_counter() + ROUND_S
        for request in islice(cycle(asked), requests):
            answer = setup.answer(request)
            took["firsts_s"].append(answer.first_s)
            took["steps_s"] += answer.steps_s
            if time.perf_counter() > end:
                break
        return took

    return answer_round


def disturb(kind: str, rounds: Synchronized[int]) -> None:
    """Work until killed, counting rounds: a Python loop, copies of 64 MB, or training steps on all cores."""
    for count, _ in enumerate(_work_of(kind), 1):
        rounds.value = count


def _work_of(kind: str) -> Iterator[None]:
    if kind == "spin":
        while True:
            for _ in range(1000):
                pass
            yield
    if kind == "copy":
        source, target = bytearray(64_000_000), bytearray(64_000_000)
        while True:
            target[:] = source
            yield
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.SiLU(), torch.nn.Linear(1536, 576))
    optimizer, rows = torch.optim.AdamW(model.parameters()), torch.randn(256, 576)
    while True:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()
        yield


def table(result: Result) -> str:
    """The figures as a Markdown table."""
    rows = [
        {"setup": setup, "condition": condition, **figures}
        for setup, conditions in result["setups"].items()
        for condition, figures in conditions.items()
    ]
    columns = {
        "setup": "{setup}",
        "condition": "{condition}",
        "TTFT ms p50": "{first_token_ms_p50:.0f}",
        "p99": "{first_token_ms_p99:.0f}",
        "TTFT x quiet": "{first_token_times_quiet:.1f}",
        "tokens/s": "{tokens_per_s:.1f}",
        "x quiet": "{share_of_quiet:.2f}",
        "longest step ms": "{longest_step_ms:.0f}",
        "neighbours": "{neighbours_speed:.2f}",
    }
    about = (
        f"SmolLM2-135M in q4_0 with one rank-16 adapter, a task prompt of {result['prompt_tokens']} tokens, "
        f"{result['rounds']} round(s) of up to {result['requests']} requests of 16 tokens, {said_of_machine(result)}. "
        "The neighbours' speed is relative to their speed without the setup."
    )
    return f"{about}\n\n{markdown(rows, columns)}"


def plot(result: Result, out: Path) -> None:
    """Plot the tokens/s of each setup under each condition."""
    setups = result["setups"]
    conditions = [c.name for c in CONDITIONS if all(c.name in figures for figures in setups.values())]
    with subplots(out, dpi=130, figsize=(9, 4.5)) as axes:
        for number, (setup, figures) in enumerate(setups.items()):
            places = [place + (number - len(setups) / 2 + 0.5) * 0.15 for place in range(len(conditions))]
            color = ("#1d6b43", "#56a878", "#4a5663", "#8794a1", "#c0c8d0")[number % 5]
            axes.bar(places, [figures[name]["tokens_per_s"] for name in conditions], 0.14, label=setup, color=color)
        axes.set_xticks(range(len(conditions)), [name.replace(" ", "\n", 1) for name in conditions])
        axes.set_ylabel("tokens/s")
        axes.set_title("Decode speed under CPU contention", loc="left")
        axes.legend(frameon=False, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

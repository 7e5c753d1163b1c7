"""Measure both engines and other runtimes under CPU contention: time to first token and tokens/s.

    pip install -e '.[demo,bench]'
    python benchmarks/busy.py --json --out benchmarks/results

SmolLM2-135M in q4_0 with one rank-16 adapter on all linear layers. Each setup stays loaded in its own process and
answers the same requests of 16 tokens under each condition. The setups take turns in rounds, so that slow phases of the
machine affect all of them. CPU quotas need writable cgroup v1 or v2 folders, and are skipped without them.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

from benchmarks.switching import _machine, _p99, _read, prepare
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
    """A busy process, which counts its rounds of work in a mapped file."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._path = folder / f"{kind}-{time.monotonic_ns()}"
        self._path.write_bytes(bytes(8))
        self._process = subprocess.Popen([sys.executable, __file__, "--neighbour", kind, "--work", str(self._path)])
        while not self.count():
            time.sleep(0.05)

    def count(self) -> int:
        """Rounds of work done so far."""
        return int(struct.unpack("q", self._path.read_bytes())[0])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Worker:
    """A process with one setup loaded, which runs a round of requests on demand."""

    def __init__(self, setup: str, options: argparse.Namespace, cgroup: Path | None = None) -> None:
        command = [sys.executable, __file__, "--worker", setup, "--work", str(options.work)]
        command += ["--threads", str(options.threads), "--requests", str(options.requests)]
        command += ["--cgroup", str(cgroup)] if cgroup else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def begin(self) -> None:
        """Start a round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, list[float]]:
        """The round's times to first token, and the times of all other tokens, in seconds."""
        return dict(self._read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"busy.py: {' '.join(self._process.args)} exited with {self._process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure both engines and other runtimes under CPU contention.")
    parser.add_argument("--requests", type=int, default=12, help="requests per setup and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of the task's fixed prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--setups", default=",".join(SETUPS), metavar="A,B", help="which setups to run")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep prepared files here (default: temporary)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write busy.json, busy.md and busy.png here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=SETUPS, help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--neighbour", choices=("spin", "copy", "train"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.adapters = 1
    if options.neighbour:
        disturb(options.neighbour, options.work)
    elif options.worker:
        work(options)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            options.work = options.work or Path(temporary)
            prepare(options)
            report(measure(options, Path(temporary)), options)


def measure(options: argparse.Namespace, temporary: Path) -> dict[str, Any]:
    """Measure each setup under each condition."""
    setups = options.setups.split(",")
    found: dict[str, dict[str, Any]] = {setup: {} for setup in setups}
    with ExitStack() as stack:
        workers = {setup: stack.enter_context(Worker(setup, options)) for setup in setups}
        raw: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for condition in CONDITIONS:
                print(f"round {number + 1} of {options.rounds}: {condition.name}", file=sys.stderr, flush=True)
                for setup, took in _round(condition, workers, options, temporary):
                    print(f"  {setup}: {_tokens_per_s(took):.1f} tokens/s", file=sys.stderr, flush=True)
                    raw.setdefault((setup, condition.name), []).append(took)
    for (setup, condition), rounds in raw.items():
        found[setup][condition] = _figures(rounds)
    for figures in found.values():
        for one in figures.values():
            one["share_of_quiet"] = one["tokens_per_s"] / figures[QUIET]["tokens_per_s"]
            one["first_token_times_quiet"] = one["first_token_ms_p50"] / figures[QUIET]["first_token_ms_p50"]
    settings = {key: getattr(options, key) for key in ("requests", "rounds", "prompt_tokens", "threads")}
    return {"machine": _machine(options.threads), **settings, "setups": found}


def _round(
    condition: Condition, workers: dict[str, Worker], options: argparse.Namespace, temporary: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run one round of each setup under the condition; yields the times of each."""
    if condition.quota is not None:
        with _quota(condition.quota) as cgroup:
            for setup in workers if cgroup else ():
                with Worker(setup, options, cgroup) as worker:
                    yield setup, _took([worker], [])
        return
    neighbours = [Neighbour(kind, temporary) for kind in condition.neighbours]
    try:
        alone = _rates(neighbours, 1.0)
        for setup, worker in workers.items():
            if condition.name == SIDE_BY_SIDE:
                with Worker(setup, options) as second:
                    yield setup, _took([worker, second], [])
            else:
                yield setup, _took([worker], neighbours, alone)
    finally:
        for neighbour in neighbours:
            neighbour.close()


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


def _rates(neighbours: Sequence[Neighbour], seconds: float) -> list[float]:
    before = [neighbour.count() for neighbour in neighbours]
    time.sleep(seconds)
    return [(n.count() - count) / seconds for n, count in zip(neighbours, before, strict=True)]


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    firsts = [first for took in rounds for first in took["firsts_s"]]
    steps = [step for took in rounds for step in took["steps_s"]]
    neighbours = [share for took in rounds for share in took["neighbours"]]
    return {
        "first_token_ms_p50": statistics.median(firsts) * 1e3,
        "first_token_ms_p99": _p99(firsts) * 1e3,
        "tokens_per_s": statistics.median(map(_tokens_per_s, rounds)),
        "longest_step_ms": max(steps) * 1e3,
        "neighbours_speed": statistics.fmean(neighbours) if neighbours else None,
    }


def _tokens_per_s(took: dict[str, Any]) -> float:
    return float(len(took["steps_s"]) / sum(took["steps_s"]))


@contextmanager
def _quota(cores: float) -> Iterator[Path | None]:
    """A temporary cgroup with a CPU quota; None if it cannot be created."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    folder = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"edgetune-busy-{os.getpid()}"
    try:
        folder.mkdir()
        if version_1.is_dir():
            (folder / "cpu.cfs_quota_us").write_text(str(round(cores * 100_000)))
        else:
            (folder / "cpu.max").write_text(f"{round(cores * 100_000)} 100000")
    except OSError as error:
        print(f"no CPU quota here: {error}", file=sys.stderr)
        yield None
        return
    try:
        yield folder
    finally:
        folder.rmdir()


def work(options: argparse.Namespace) -> None:
    """Load one setup, then answer a round of requests for each line of standard input."""
    if options.cgroup:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    setup = SETUPS[options.worker](Folder(options.work, 1, options.threads))
    asked = _read(options.work)["round robin"]
    setup.answer(asked[0])
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        took: dict[str, list[float]] = {"firsts_s": [], "steps_s": []}
        end = time.perf_counter() + ROUND_S
        for number in range(options.requests):
            answer = setup.answer(asked[number % len(asked)])
            took["firsts_s"].append(answer.first_s)
            took["steps_s"] += answer.steps_s
            if time.perf_counter() > end:
                break
        print(json.dumps(took), flush=True)


def disturb(kind: str, path: Path) -> None:
    """Run until killed, counting rounds in a file: a Python loop, copies of 64 MB, or training steps on all cores."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as counter:
        for count, _ in enumerate(_work_of(kind), 1):
            counter[:] = struct.pack("q", count)


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


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the figures, and write them to `--out`."""
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "busy.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "busy.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "busy.png")
    print(json.dumps(result) if options.json else table(result))


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{result['machine']}. SmolLM2-135M in q4_0 with one rank-16 adapter, a task prompt of "
        f"{result['prompt_tokens']} tokens, {result['rounds']} round(s) of up to {result['requests']} requests of 16 "
        "tokens. The neighbours' speed is relative to their speed without the setup.",
        "",
        "| setup | condition | TTFT ms p50 | p99 | x quiet | tokens/s | x quiet | longest step ms | neighbours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setup, found in result["setups"].items():
        for condition, one in found.items():
            neighbours = "" if one["neighbours_speed"] is None else f"{one['neighbours_speed']:.2f}"
            lines.append(
                f"| {setup} | {condition} | {one['first_token_ms_p50']:.0f} | {one['first_token_ms_p99']:.0f} "
                f"| {one['first_token_times_quiet']:.1f} | {one['tokens_per_s']:.1f} | {one['share_of_quiet']:.2f} "
                f"| {one['longest_step_ms']:.0f} | {neighbours} |"
            )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], out: Path) -> None:
    """Plot the tokens/s of each setup under each condition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    setups = result["setups"]
    conditions = [c.name for c in CONDITIONS if all(c.name in found for found in setups.values())]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for number, (setup, found) in enumerate(setups.items()):
        places = [place + (number - len(setups) / 2 + 0.5) * 0.15 for place in range(len(conditions))]
        color = ("#1d6b43", "#56a878", "#4a5663", "#8794a1", "#c0c8d0")[number % 5]
        axes.bar(places, [found[name]["tokens_per_s"] for name in conditions], 0.14, label=setup, color=color)
    axes.set_xticks(range(len(conditions)), [name.replace(" ", "\n", 1) for name in conditions])
    axes.set_ylabel("tokens/s")
    axes.set_title("Decode speed under CPU contention", loc="left")
    axes.legend(frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

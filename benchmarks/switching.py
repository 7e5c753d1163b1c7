"""Measure the cost of switching between tasks, in edgetune and in alternative setups; writes a table and a plot.

    pip install -e '.[demo,bench]'
    python benchmarks/switching.py --json --out benchmarks/results

SmolLM2-135M in q4_0 with eight random rank-16 adapters on all linear layers, task prompts of 512 tokens, requests of 16
tokens in round-robin and in Zipf order. All setups get the same tokens and threads. They run one after another, each in
its own process. An answer is wrong if any token differs from a cold run of the same setup.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result, work_folder
from benchmarks.harness.bundles import export_random, random_adapters, resolve_base
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.plots import subplots
from benchmarks.harness.tables import markdown, progress
from benchmarks.harness.turns import p99
from benchmarks.harness.worker import WorkerEndedError, in_own_process

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edgetune_runtime.threads.machine import resident_mb

from benchmarks.switching_setups import CONTEXT, SETUPS, STEPS, Edgetune, Folder, Request, Setup, Tokens

RANK = 16
ORDERS = ("round robin", "zipf")
MESSAGES = (
    "please turn the lamp in the hall off and open the kitchen window a little",
    "how warm is it in the bedroom now and when did it last rain outside today",
    "set an alarm for seven in the morning and play some quiet music until then",
    "tell my sister that we will come at eight and bring the bread with us",
)
WORDS = (
    "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain only "
    "first second room door open close warm cold when then else command number sentence word list reply ask check"
)


def main() -> None:
    parser = BENCHMARK.parser(only=[*SETUPS], threads=2, works=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of each task's fixed prompt")
    options = BENCHMARK.options(parser, requests=4, adapters=2, prompt_tokens=32)
    with work_folder(options) as work:
        prepare(options, work)
        figures = {name: _measured(name, Folder(work, options.adapters, options.threads)) for name in options.only}
        for name in [name for name in figures if name.startswith("edgetune") and "failed" not in figures[name]]:
            figures[name]["rss_mb_of_one_adapter"] = _measured(name, Folder(work, 1, options.threads))["rss_mb"]
    BENCHMARK.report(options, {"rank": RANK, "setups": figures})


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Make the adapters, the bundle in both formats, the merged models and the requests, unless they exist."""
    if (work / "requests.json").exists():
        return
    names = [f"task{number}" for number in range(options.adapters)]
    base = resolve_base(quantization="q4_0", work=work)
    folders = random_adapters(base, names, RANK, work / "peft")
    systems = {name: task_prompt(number, options.prompt_tokens, base.path) for number, name in enumerate(names)}
    both = {"systems": systems, "targets": ("gguf", "onnx")}
    export_random(base, folders, work / "bundle", **both)
    export_random(base, {names[0]: folders[names[0]]}, work / "one", **both)
    whole = export_random(base, folders, work / "whole", merged=True)
    (work / "merged").mkdir()
    for name in names:
        (whole / "adapters" / name / "model.gguf").rename(work / "merged" / f"{name}.gguf")
    (work / "requests.json").write_text(json.dumps(requests(options, work)), encoding="utf-8")


def task_prompt(number: int, tokens: int, base: Path) -> str:
    """A text of `tokens` tokens, different for each task."""
    from edgetune_runtime.engines.gguf.base import GgufTokenizer

    rng, words, words_of_tasks = random.Random(number), [f"Task {number}:"], WORDS.split()
    with closing(GgufTokenizer(base)) as tokenizer:
        while len(tokenizer.tokenize(" ".join(words))) < tokens:
            words.append(rng.choice(words_of_tasks))
    return " ".join(words)


def requests(options: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """The requests in each order, with the tokens that the runtime makes of their prompts."""
    from edgetune_runtime import Runtime
    from edgetune_runtime.inference.measuring import loaded_bundle

    rng, count = random.Random(0), options.adapters
    weights = [1 / (rank + 1) for rank in range(count)]
    orders = {
        "round robin": [number % count for number in range(options.requests)],
        "zipf": rng.choices(range(count), weights, k=options.requests),
    }
    with Runtime.open(work / "bundle", context_length=CONTEXT, disk_mb=0) as runtime:

        def request(number: int, adapter: int) -> dict[str, Any]:
            message = MESSAGES[number // count % len(MESSAGES)]
            job = loaded_bundle(runtime).call(message, f"task{adapter}").job
            return {"adapter": adapter, "prompt": job.tokens, "fixed": job.fixed, "message": message}

        return {order: [request(*pair) for pair in enumerate(chosen)] for order, chosen in orders.items()}


def _measured(name: str, folder: Folder) -> dict[str, Any]:
    progress(name)
    try:
        return dict(in_own_process(measure, name, folder))
    except WorkerEndedError as error:
        return {"failed": error.code}


def measure(name: str, folder: Folder) -> dict[str, Any]:
    """Run all requests with one setup, then again cold, to count the wrong answers."""
    setup = SETUPS[name](folder)
    orders = {
        order: [request for request in asked if request.adapter < folder.adapters]
        for order, asked in read_requests(folder.path).items()
    }
    # Use each adapter once, so that nothing is left to create on first use.
    for adapter in range(folder.adapters):
        setup.answer(next(request for request in orders[ORDERS[0]] if request.adapter == adapter))
    figures: dict[str, Any] = {}
    answers: list[tuple[Request, Tokens]] = []
    for order, asked in orders.items():
        figures[order] = _figures(setup, asked, answers)
    figures["rss_mb"] = resident_mb()
    if isinstance(setup, Edgetune):
        figures.update(adapters=folder.adapters, states_mb=setup.states_mb(), adapters_mb=setup.adapters_mb())
    expected: dict[tuple[int, str], Tokens] = {}
    for request, _ in answers:
        key = (request.adapter, request.message)
        if key not in expected:
            setup.cold()
            expected[key] = setup.answer(request).tokens
    figures["wrong"] = sum(expected[request.adapter, request.message] != given for request, given in answers)
    figures["answers"] = len(answers)
    return figures


def _figures(setup: Setup, asked: Sequence[Request], answers: list[tuple[Request, Tokens]]) -> dict[str, float]:
    switches, firsts, last = [], [], -1
    begin = time.perf_counter()
    for number, request in enumerate(asked):
        answer = setup.answer(request)
        answers.append((request, answer.tokens))
        if request.adapter != last:
            switches.append(answer.switch_s * 1e6)
            firsts.append(answer.first_s * 1e3)
        last = request.adapter
        if number % 50 == 49:
            progress(f"  {number + 1} of {len(asked)}")
    total_s = time.perf_counter() - begin
    return {
        "switch_us_p50": statistics.median(switches),
        "switch_us_p99": p99(switches),
        "first_token_ms_p50": statistics.median(firsts),
        "first_token_ms_p99": p99(firsts),
        "tokens_per_s": len(asked) * STEPS / total_s,
    }


def read_requests(folder: Path) -> dict[str, list[Request]]:
    """The prepared requests in each order."""
    orders = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    return {order: [Request(**values) for values in asked] for order, asked in orders.items()}


def table(result: Result) -> str:
    """The figures as a Markdown table."""
    rows = []
    for name, figures in result["setups"].items():
        if "failed" in figures:
            rows.append({"name": name, "order": f"failed with {figures['failed']}"})
        else:
            rows += [{"name": name, "order": order, **figures, **figures[order]} for order in ORDERS]
    columns = {
        "setup": "{name}",
        "order": "{order}",
        "switch µs p50": "{switch_us_p50:.1f}",
        "switch p99": "{switch_us_p99:.1f}",
        "TTFT ms p50": "{first_token_ms_p50:.1f}",
        "TTFT p99": "{first_token_ms_p99:.1f}",
        "tokens/s": "{tokens_per_s:.1f}",
        "RSS MB": "{rss_mb:.0f}",
        "wrong": "{wrong} of {answers}",
    }
    about = (
        f"SmolLM2-135M in q4_0, {result['adapters']} adapters of rank {result['rank']} on all linear layers, task "
        f"prompts of {result['prompt_tokens']} tokens, {result['requests']} requests of {STEPS} tokens in each order, "
        f"{said_of_machine(result)}. Switch and TTFT are those of requests that change the adapter."
    )
    return f"{about}\n\n{markdown(rows, columns)}\n" + "\n".join(summary(result["setups"])) + "\n"


def summary(setups: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Compare edgetune's TTFT with the alternatives without wrong answers, and explain its memory."""
    setups = {name: figures for name, figures in setups.items() if "failed" not in figures}
    others = [name for name, figures in setups.items() if not name.startswith("edgetune") and not figures["wrong"]]
    for name in [name for name in setups if name.startswith("edgetune")]:
        figures, firsts = setups[name], {other: setups[other][ORDERS[0]]["first_token_ms_p50"] for other in others}
        times = {other: first / figures[ORDERS[0]]["first_token_ms_p50"] for other, first in firsts.items()}
        ratios = ", ".join(f"{other} {times[other]:.1f}x" for other in sorted(times, key=times.__getitem__))
        yield f"- TTFT after a switch (round robin), relative to {name}: {ratios}."
        one, parts = figures["rss_mb_of_one_adapter"], figures["adapters_mb"] + figures["states_mb"]
        more = parts * (1 - 1 / figures["adapters"])
        yield (
            f"- {name}: RSS is {figures['rss_mb']:.0f} MB with all adapters and {one:.0f} MB with one. The other "
            f"adapters and their states take {more:.0f} MB; measured against this sum, RSS is "
            f"{figures['rss_mb'] / (one + more) - 1:+.1%}."
        )


def plot(result: Result, out: Path) -> None:
    """Plot the TTFT after a switch in round-robin order, median and 99th percentile, on a logarithmic scale."""
    from matplotlib import ticker

    setups = {name: figures["round robin"] for name, figures in result["setups"].items() if "failed" not in figures}
    names = sorted(setups, key=lambda name: -setups[name]["first_token_ms_p50"])
    with subplots(out, dpi=150, figsize=(8, 0.5 * len(names) + 1.5)) as axes:
        for name in names:
            median, late = (setups[name][f"first_token_ms_{which}"] for which in ("p50", "p99"))
            color = "#2a7d4f" if name.startswith("edgetune") else "#6b7785"
            axes.plot(
                [median, late], [name, name], color=color, linewidth=2.5, marker="|", markevery=[1], markersize=11
            )
            axes.plot([median], [name], color=color, marker="o", markersize=9)
            axes.text(late * 1.12, name, f"{median:.0f} ms", va="center", fontsize=9)
        axes.set_xscale("log")
        firsts = [figures[f"first_token_ms_{which}"] for figures in setups.values() for which in ("p50", "p99")]
        axes.set_xlim(min(firsts) / 2, max(firsts) * 2)
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.grid(axis="x", color="#e3e7eb")
        axes.set_axisbelow(True)
        axes.set_xlabel("time to first token after a switch in ms: median (dot), 99th percentile (end of line)")
        axes.spines[["top", "right"]].set_visible(False)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

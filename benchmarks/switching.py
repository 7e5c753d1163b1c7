"""Measure the cost of switching between tasks, in edgetune and in alternative setups; writes a table and a plot.

    pip install -e '.[demo,bench]'
    python benchmarks/switching.py --json --out benchmarks/results

SmolLM2-135M in q4_0 with eight random rank-16 adapters on all linear layers, task prompts of 512 tokens, requests of 16
tokens in round-robin and in Zipf order. All setups get the same tokens and threads. They run one after another, each in
its own process. An answer is wrong if any token differs from a cold run of the same setup.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

from edgetune_runtime.threads.machine import resident_mb

from benchmarks.switching_setups import CONTEXT, SETUPS, STEPS, Edgetune, Folder, Request, Setup

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
    parser = argparse.ArgumentParser(description="Measure the cost of switching between tasks in several setups.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of each task's fixed prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--setups", default=",".join(SETUPS), metavar="A,B", help="which setups to run")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep prepared files here (default: temporary)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write switching.json, .md and .png here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=list(SETUPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder = Folder(options.work, options.adapters, options.threads)
        print(json.dumps(work(options.worker, folder, _read(options.work))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        prepare(options)
        found = {name: _run(name, options) for name in options.setups.split(",")}
        for name in [name for name in found if name.startswith("edgetune") and "failed" not in found[name]]:
            found[name]["rss_mb_of_one_adapter"] = _run(name, options, adapters=1)["rss_mb"]
    result = {"machine": _machine(options.threads), **_settings(options), "setups": found}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "switching.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "switching.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "switching.png")
    print(json.dumps(result) if options.json else table(result))


def prepare(options: argparse.Namespace) -> None:
    """Make the adapters, the bundle in both formats, the merged models and the requests, unless they exist."""
    if (options.work / "requests.json").exists():
        return
    import torch
    from peft import LoraConfig, get_peft_model

    from edgetune.bases import load_torch, resolve
    from edgetune.building.pipeline import export_trained
    from edgetune.progress import Progress

    work, progress = options.work, Progress()
    names = [f"task{number}" for number in range(options.adapters)]
    base = resolve("smollm2-135m", folder=Path(), quantization="q4_0", work=work, progress=progress, converter=None)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(load_torch(base, torch.float32), config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                # Large enough to change most answers, small enough to keep them sensible.
                parameter.normal_(0, 0.02 if "lora_B" in key else 0.05)
    peft.save_pretrained(work / "peft")
    folders = {name: work / "peft" / name for name in names}
    systems = {name: task_prompt(number, options.prompt_tokens, base.path) for number, name in enumerate(names)}
    export_trained(
        str(base.path), folders, work / "bundle", systems=systems, targets=("gguf", "onnx"), progress=progress
    )
    one = {name: folders[name] for name in names[:1]}
    export_trained(str(base.path), one, work / "one", systems=systems, targets=("gguf", "onnx"), progress=progress)
    whole = export_trained(str(base.path), folders, work / "whole", merged=True, progress=progress).bundle
    (work / "merged").mkdir()
    for name in names:
        (whole / "adapters" / name / "model.gguf").rename(work / "merged" / f"{name}.gguf")
    (work / "requests.json").write_text(json.dumps(requests(options)), encoding="utf-8")


def task_prompt(number: int, tokens: int, base: Path) -> str:
    """A text of `tokens` tokens, different for each task."""
    from contextlib import closing

    from edgetune_runtime.engines.gguf.engine import GgufTokenizer

    rng, words, words_of_tasks = random.Random(number), [f"Task {number}:"], WORDS.split()
    with closing(GgufTokenizer(base)) as tokenizer:
        while len(tokenizer.tokenize(" ".join(words))) < tokens:
            words.append(rng.choice(words_of_tasks))
    return " ".join(words)


def requests(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The requests in each order, with the tokens that the runtime makes of their prompts."""
    from edgetune_runtime import Runtime
    from edgetune_runtime.inference.measuring import loaded_bundle

    rng, count = random.Random(0), options.adapters
    weights = [1 / (rank + 1) for rank in range(count)]
    orders = {
        "round robin": [number % count for number in range(options.requests)],
        "zipf": rng.choices(range(count), weights, k=options.requests),
    }
    with Runtime.open(options.work / "bundle", context_length=CONTEXT, disk_mb=0) as runtime:

        def request(number: int, adapter: int) -> dict[str, Any]:
            message = MESSAGES[number // count % len(MESSAGES)]
            job = loaded_bundle(runtime).call(message, f"task{adapter}").job
            return {"adapter": adapter, "prompt": job.tokens, "fixed": job.fixed, "message": message}

        return {order: [request(*pair) for pair in enumerate(chosen)] for order, chosen in orders.items()}


def work(name: str, folder: Folder, orders: dict[str, list[Request]]) -> dict[str, Any]:
    """Run all requests with one setup, then again cold, to count the wrong answers."""
    setup = SETUPS[name](folder)
    orders = {
        order: [request for request in asked if request.adapter < folder.adapters] for order, asked in orders.items()
    }
    # Use each adapter once, so that nothing is left to create on first use.
    for adapter in range(folder.adapters):
        setup.answer(next(request for request in orders[ORDERS[0]] if request.adapter == adapter))
    found: dict[str, Any] = {}
    answers: list[tuple[Request, list[int]]] = []
    for order, asked in orders.items():
        found[order] = _measure(setup, asked, answers)
    found["rss_mb"] = resident_mb()
    if isinstance(setup, Edgetune):
        found.update(adapters=folder.adapters, states_mb=setup.states_mb(), adapters_mb=setup.adapters_mb())
    expected: dict[tuple[int, str], list[int]] = {}
    for request, _ in answers:
        key = (request.adapter, request.message)
        if key not in expected:
            setup.cold()
            expected[key] = setup.answer(request).tokens
    found["wrong"] = sum(expected[request.adapter, request.message] != given for request, given in answers)
    found["answers"] = len(answers)
    return found


def _measure(setup: Setup, asked: Sequence[Request], answers: list[tuple[Request, list[int]]]) -> dict[str, float]:
    switches, firsts, last = [], [], -1
    begin = time.perf_counter()
    for number, request in enumerate(asked):
        found = setup.answer(request)
        answers.append((request, found.tokens))
        if request.adapter != last:
            switches.append(found.switch_s * 1e6)
            firsts.append(found.first_s * 1e3)
        last = request.adapter
        if number % 50 == 49:
            print(f"  {number + 1} of {len(asked)}", file=sys.stderr, flush=True)
    total_s = time.perf_counter() - begin
    return {
        "switch_us_p50": statistics.median(switches),
        "switch_us_p99": _p99(switches),
        "first_token_ms_p50": statistics.median(firsts),
        "first_token_ms_p99": _p99(firsts),
        "tokens_per_s": len(asked) * STEPS / total_s,
    }


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _run(name: str, options: argparse.Namespace, adapters: int = 0) -> dict[str, Any]:
    print(name, file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--worker", name, "--work", str(options.work)]
    command += ["--threads", str(options.threads), "--adapters", str(adapters or options.adapters)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _read(folder: Path) -> dict[str, list[Request]]:
    orders = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    return {order: [Request(**values) for values in asked] for order, asked in orders.items()}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("requests", "adapters", "prompt_tokens", "threads")
    return {"rank": RANK, **{key: getattr(options, key) for key in keys}}


def _machine(threads: int) -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {threads} threads, {platform.system()}"


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{result['machine']}. SmolLM2-135M in q4_0, {result['adapters']} adapters of rank {result['rank']} on all "
        f"linear layers, task prompts of {result['prompt_tokens']} tokens, {result['requests']} requests of {STEPS} "
        "tokens in each order. Switch and TTFT are those of requests that change the adapter.",
        "",
        "| setup | order | switch µs p50 | p99 | TTFT ms p50 | p99 | tokens/s | RSS MB | wrong |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in result["setups"].items():
        if "failed" in found:
            lines.append(f"| {name} | failed with {found['failed']} | | | | | | | |")
            continue
        for order in ORDERS:
            figures = found[order]
            cells = [f"{figures[key]:.1f}" for key in ("switch_us_p50", "switch_us_p99")]
            cells += [f"{figures[key]:.1f}" for key in ("first_token_ms_p50", "first_token_ms_p99", "tokens_per_s")]
            ends = f"{found['rss_mb']:.0f} | {found['wrong']} of {found['answers']}"
            lines.append(f"| {name} | {order} | {' | '.join(cells)} | {ends} |")
    lines += ["", *summary(result["setups"])]
    return "\n".join(lines) + "\n"


def summary(setups: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Compare edgetune's TTFT with the alternatives without wrong answers, and explain its memory."""
    setups = {name: found for name, found in setups.items() if "failed" not in found}
    others = [name for name, found in setups.items() if not name.startswith("edgetune") and not found["wrong"]]
    for name in [name for name in setups if name.startswith("edgetune")]:
        found, firsts = setups[name], {other: setups[other][ORDERS[0]]["first_token_ms_p50"] for other in others}
        times = {other: first / found[ORDERS[0]]["first_token_ms_p50"] for other, first in firsts.items()}
        ratios = ", ".join(f"{other} {times[other]:.1f}x" for other in sorted(times, key=times.__getitem__))
        yield f"- TTFT after a switch (round robin), relative to {name}: {ratios}."
        one, parts = found["rss_mb_of_one_adapter"], found["adapters_mb"] + found["states_mb"]
        more = parts * (1 - 1 / found["adapters"])
        yield (
            f"- {name}: RSS is {found['rss_mb']:.0f} MB with all adapters and {one:.0f} MB with one. The other "
            f"adapters and their states take {more:.0f} MB; measured against this sum, RSS is "
            f"{found['rss_mb'] / (one + more) - 1:+.1%}."
        )


def plot(result: dict[str, Any], out: Path) -> None:
    """Plot the TTFT after a switch in round-robin order, median and 99th percentile, on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    setups = {name: found["round robin"] for name, found in result["setups"].items() if "failed" not in found}
    names = sorted(setups, key=lambda name: -setups[name]["first_token_ms_p50"])
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.5), layout="constrained")
    for name in names:
        median, late = (setups[name][f"first_token_ms_{which}"] for which in ("p50", "p99"))
        color = "#2a7d4f" if name.startswith("edgetune") else "#6b7785"
        axes.plot([median, late], [name, name], color=color, linewidth=2.5, marker="|", markevery=[1], markersize=11)
        axes.plot([median], [name], color=color, marker="o", markersize=9)
        axes.text(late * 1.12, name, f"{median:.0f} ms", va="center", fontsize=9)
    axes.set_xscale("log")
    firsts = [found[f"first_token_ms_{which}"] for found in setups.values() for which in ("p50", "p99")]
    axes.set_xlim(min(firsts) / 2, max(firsts) * 2)
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.grid(axis="x", color="#e3e7eb")
    axes.set_axisbelow(True)
    axes.set_xlabel("time to first token after a switch in ms: median (dot), 99th percentile (end of line)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

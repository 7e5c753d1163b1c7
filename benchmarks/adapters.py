"""Measure a bundle of many adapters: opening, switches to adapters that are in memory or not, memory, and answers.

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/adapters.py build/smart-home --json

The adapters are the bundle's first one with other factors for its matrices. Calls choose among them by Zipf's law. An
answer is wrong if it differs from that of a runtime whose bundle has only this adapter. 1,000 adapters of rank 8 on
SmolLM2-135M take 8 GB for GGUF and 12 GB for ONNX.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result, work_folder
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.plots import subplots
from benchmarks.harness.prompts import words
from benchmarks.harness.tables import markdown, progress
from benchmarks.harness.turns import in_turns, p99, spread
from benchmarks.harness.worker import Worker, in_own_process

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import (
    MANIFEST_NAME,
    AdapterEntry,
    FileEntry,
    Manifest,
    files_beside,
    read_manifest,
    sha256_of,
)
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.places import Holder
from edgetune_runtime.threads.machine import resident_mb

FEW = 4
PROMPTS = [words(count) for count in (5, 8, 13, 21)]
TOKENS = 8
OPENING: dict[str, Any] = {"contexts": 1, "cache_mb": 0, "disk_mb": 0, "preflight": False}


def main() -> None:
    parser = BENCHMARK.parser(only=ENGINES, threads=2, works=True)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--adapters-mb", type=float, default=256)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    options = BENCHMARK.options(parser, adapters=12, adapters_mb=30, calls=40, rounds=2)
    engines = {}
    with work_folder(options) as work:
        for engine in options.only:
            bundles = {count: work / f"{engine}-{count}" for count in (FEW, options.adapters)}
            for count, bundle in bundles.items():
                in_own_process(write_bundle, options.bundle, bundle, engine, count)
            engines[engine] = {"open_ms": _opening(bundles, engine, options.threads, options.rounds)}
            many = bundles[options.adapters]
            engines[engine] |= in_own_process(
                serve_zipf, many, engine, options.threads, options.adapters_mb, options.calls
            )
            asked = engines[engine].pop("asked")
            wrong = in_own_process(wrong_answers, many, work / "one", engine, options.threads, asked)
            engines[engine]["wrong"] = wrong
            if options.work is None:
                for bundle in bundles.values():
                    shutil.rmtree(bundle)
    BENCHMARK.report(options, {"engines": engines})


def _opening(bundles: dict[int, Path], engine: str, threads: int, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        workers = {
            str(count): stack.enter_context(Worker(opens, bundle, engine, threads)) for count, bundle in bundles.items()
        }
        times = in_turns(workers, rounds, warmups=1)
    medians = {count: statistics.median(values) for count, values in times.items()}
    few, many = medians.values()
    return {count: spread(values) for count, values in times.items()} | {"ratio": round(many / few, 2)}


def opens(bundle: Path, engine: str, threads: int) -> Callable[[], float]:
    """A function that opens and closes the bundle; the time of opening in ms."""

    def measure() -> float:
        begin = time.perf_counter()
        runtime = Runtime.open(bundle, engine=engine, threads=threads, disk_mb=0, preflight=False)
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        runtime.close()
        return elapsed_ms

    return measure


def serve_zipf(bundle: Path, engine: str, threads: int, adapters_mb: float, calls: int) -> Result:
    """Times of switches, memory and answers of calls that choose adapters by Zipf's law."""
    rng, cold_ms, warm_us, ttft_ms = random.Random(0), list[float](), list[float](), dict[bool, list[float]]()
    asked: dict[tuple[str, str], str] = {}
    different = 0
    opened = Runtime.open(
        bundle, engine=engine, threads=threads, adapters_mb=adapters_mb, map_large_blocks=True, **OPENING
    )
    with opened as runtime:
        loaded, names = loaded_bundle(runtime).adapters, runtime.adapters
        weights = [1 / rank for rank in range(1, len(names) + 1)]
        for prompt in PROMPTS:
            runtime.generate(prompt, max_tokens=TOKENS)
        opened_mb, most_mb = resident_mb() or 0.0, 0.0
        for number, name in enumerate(rng.choices(names, weights, k=calls)):
            is_cold, prompt = name not in loaded.names, rng.choice(PROMPTS)
            begin = time.perf_counter()
            with loaded.use({name: runtime.manifest.adapters[name]}, Holder()):
                loaded_s = time.perf_counter() - begin
                answer = runtime.generate(prompt, adapter=name, max_tokens=TOKENS)
            if is_cold:
                cold_ms.append(loaded_s * 1e3 + answer.timings.switch_us / 1e3)
            else:
                warm_us.append(answer.timings.switch_us)
            ttft_ms.setdefault(is_cold, []).append(answer.timings.ttft_ms)
            different += asked.setdefault((name, prompt), answer.text) != answer.text
            most_mb = max(most_mb, (resident_mb() or 0.0) - opened_mb)
            if number % 100 == 0:
                progress(f"{engine}: call {number} of {calls}")
    return {
        "cold_switch_ms": spread(cold_ms, 2) | {"p99": round(p99(cold_ms), 2), "count": len(cold_ms)},
        "warm_switch_us": spread(warm_us, 2) | {"p99": round(p99(warm_us), 2), "count": len(warm_us)},
        "ttft_ms": {
            "cold": round(statistics.median(ttft_ms[True]), 2),
            "warm": round(statistics.median(ttft_ms[False]), 2),
        },
        "opened_mb": round(opened_mb, 1),
        "grown_mb": round(most_mb, 1),
        "adapters_used": len({name for name, _ in asked}),
        "answers": len(asked),
        "different": different,
        "asked": asked,
    }


def wrong_answers(bundle: Path, folder: Path, engine: str, threads: int, asked: dict[tuple[str, str], str]) -> int:
    """How many answers differ from those of a runtime that has only the adapter of each."""
    manifest, wrong = read_manifest(bundle), 0
    prompts: dict[str, list[str]] = {}
    for name, prompt in asked:
        prompts.setdefault(name, []).append(prompt)
    for number, (name, own) in enumerate(prompts.items()):
        _only(bundle, manifest, manifest.adapters[name], folder)
        with Runtime.open(folder, engine=engine, threads=threads, verify=False, **OPENING) as runtime:
            for prompt in own:
                wrong += runtime.generate(prompt, adapter=name, max_tokens=TOKENS).text != asked[name, prompt]
        shutil.rmtree(folder)
        if number % 50 == 0:
            progress(f"{engine}: compared {number} of {len(prompts)} adapters")
    return wrong


def _only(bundle: Path, manifest: Manifest, entry: AdapterEntry, folder: Path) -> None:
    """A bundle with one adapter, of links to the files."""
    names = [*entry.files.values(), *(name for name in manifest.files if name.startswith("base/"))]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(bundle / name, folder / name)
    files = {name: manifest.files[name] for name in names}
    text = replace(manifest, adapters={entry.name: entry}, router=None, files=files).to_json()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def write_bundle(source: Path, out: Path, engine: str, count: int) -> None:
    """A bundle for one engine with so many adapters like the first one of another bundle; a finished one stays."""
    if (out / MANIFEST_NAME).exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    manifest = read_manifest(source)
    template = next(iter(manifest.adapters.values()))
    base = files_beside(manifest, manifest.base.files[engine])
    for name in base:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, out / name)
    files = {name: manifest.files[name] for name in base}
    entries = {}
    for number in range(count):
        name = f"task{number:04}"
        file = f"adapters/{name}/{Path(template.files[engine]).name}"
        (out / file).parent.mkdir(parents=True)
        WRITERS[engine](source / template.files[engine], out / file, number, manifest.base.fingerprint)
        files[file] = FileEntry(sha256_of(out / file), (out / file).stat().st_size)
        entries[name] = replace(
            template,
            name=name,
            files={engine: file},
            shapes={engine: template.shapes[engine]},
            draft=None,
            output=None,
            golden={},
        )
        if number % 100 == 0:
            progress(f"{engine}: wrote {number} of {count} adapters")
    base_entry = replace(manifest.base, files={engine: manifest.base.files[engine]})
    text = replace(manifest, base=base_entry, adapters=entries, router=None, files=files).to_json()
    (out / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _write_gguf(source: Path, out: Path, seed: int, _fingerprint: str) -> None:
    data, tensors = np.fromfile(source, np.uint8), read_header(source).tensors
    changed = [tensor for name, tensor in tensors.items() if name.endswith(".lora_b")]
    for tensor, factor in zip(changed, _factors(seed, len(changed)), strict=True):
        values = data[tensor.offset : tensor.offset + tensor.nbytes].view(
            {"f16": "<f2", "f32": "<f4"}[tensor.type.name]
        )
        values *= values.dtype.type(factor)
    data.tofile(out)


def _write_onnx(source: Path, out: Path, seed: int, fingerprint: str) -> None:
    from edgetune_export.backends.onnx.adapter import write_tensors

    arrays, _ = adapter_arrays(source, source.name)
    changed = [name for name in arrays if name.endswith(".lora_B.weight")]
    scales = dict(zip(changed, _factors(seed, len(changed)), strict=True))
    tensors = {name: array.astype(np.float32) * np.float32(scales.get(name, 1)) for name, array in arrays.items()}
    write_tensors(tensors, out, dtype="f32", base_fingerprint=fingerprint)


WRITERS: dict[str, Callable[[Path, Path, int, str], None]] = {"gguf": _write_gguf, "onnx": _write_onnx}


def _factors(seed: int, count: int) -> Sequence[float]:
    """A factor for each matrix: 0.5 to 1.5."""
    factors: Sequence[float] = np.random.default_rng(seed).uniform(0.5, 1.5, count).tolist()
    return factors


def table(result: Result) -> str:
    rows = []
    for engine, figures in result["engines"].items():
        few, many = (figures["open_ms"][str(count)]["median"] for count in (FEW, result["adapters"]))
        rows.append({"engine": engine, "few": few, "many": many, **figures})
    columns = {
        "engine": "{engine}",
        f"open, {FEW} adapters": "{few:.0f} ms",
        f"open, {result['adapters']}": "{many:.0f} ms",
        "ratio": "{open_ms[ratio]:.2f}",
        "cold switch, median": "{cold_switch_ms[median]:.1f} ms",
        "p99": "{cold_switch_ms[p99]:.1f} ms",
        "warm switch, median": "{warm_switch_us[median]:.1f} µs",
        "memory of adapters": "{grown_mb:.0f} MB",
        "answers": "{answers}",
        "wrong": "{wrong}",
    }
    about = f"{result['calls']} calls over {result['adapters']} adapters, adapters_mb {result['adapters_mb']:g}"
    return f"{said_of_machine(result)}; {about}\n\n{markdown(rows, columns)}"


def plot(result: Result, out: Path) -> None:
    """Plot the time to open few and many adapters, and the switches to an adapter that is in memory and that is not."""
    counts = [FEW, result["adapters"]]
    with subplots(out, 1, 2, dpi=130, figsize=(10, 3.5)) as (opening, switches):
        for place, (engine, figures) in enumerate(result["engines"].items()):
            opened = [figures["open_ms"][str(count)] for count in counts]
            heights = [times["median"] for times in opened]
            ranges = [
                [times["median"] - times["min"] for times in opened],
                [times["max"] - times["median"] for times in opened],
            ]
            opening.bar([place - 0.2, place + 0.2], heights, 0.36, yerr=ranges, color=["#9ecae1", "#3182bd"], capsize=3)
            warm, cold = (figures[key] for key in ("warm_switch_us", "cold_switch_ms"))
            milliseconds = {"in memory": [warm[key] / 1e3 for key in ("median", "p99")]}
            milliseconds["not in memory"] = [cold[key] for key in ("median", "p99")]
            for height, (name, (median, slowest)) in enumerate(milliseconds.items()):
                switches.plot([median, slowest], [place + height * 0.3] * 2, "-", color="#3182bd", lw=4, alpha=0.4)
                switches.plot(median, place + height * 0.3, "o", color="#3182bd")
                switches.text(slowest * 1.2, place + height * 0.3, f"{engine}, {name}", va="center", fontsize=9)
        engines = list(result["engines"])
        opening.set_xticks(
            range(len(engines)), [f"{engine}: {counts[0]} and {counts[1]:,} adapters" for engine in engines]
        )
        opening.set_title("opening, ms (median, min to max)", loc="left", fontsize=10)
        switches.set_title("switch, ms (median to p99)", loc="left", fontsize=10)
        switches.set_xscale("log")
        switches.set_xlim(right=3e3)
        switches.set_yticks([])
        for axes in (opening, switches):
            axes.spines[["top", "right"]].set_visible(False)


BENCHMARK = Benchmark(__file__, __doc__, table, plot)

if __name__ == "__main__":
    main()

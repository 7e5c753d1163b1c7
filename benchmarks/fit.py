"""Compare what `edgetune devices fit` predicts with measurements on this machine and with published figures of boards.

    pip install -e '.[demo]'
    python benchmarks/fit.py --work build/fit --out benchmarks/results

Memory: SmolLM2-135M in three quantizations with 0, 4 and 16 random rank-8 adapters, in both engines with three context
lengths, each in a process of its own: peak resident memory after a prompt of nearly the whole context for the base, and
of half the context for the adapters, until the saved states reach their limit. Speed: each bundle is calibrated after a
short prompt, as `edgetune-run doctor --calibrate` does; then decode speed after a long one is predicted and measured,
from the bundle's own calibration and from that of another quantization.
Boards: predictions for the published figures in `published.toml`. `--only` runs some of the three.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result, work_folder
from benchmarks.harness.bundles import export_random, random_adapters, resolve_base
from benchmarks.harness.prompts import words
from benchmarks.harness.tables import markdown, progress
from benchmarks.harness.turns import in_turns
from benchmarks.harness.worker import in_own_process

import shutil
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_devices import boards
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.quantization import repacked_types
from edgetune_runtime.sizing.calibration import MeasuredSpeed, figures_of, measure
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.needs import needed_mb, needs_of_bundle
from edgetune_runtime.sizing.speed import adapter_seconds, prefill_speed, speed_of, token_seconds
from edgetune_runtime.threads.machine import disturbance, instructions, peak_mb

if TYPE_CHECKING:
    from edgetune_runtime import Runtime

QUANTIZATIONS = ("q8_0", "q4_k_m", "q4_0")
CONTEXTS = (512, 1024, 2048)
ADAPTERS = (0, 4, 16)
TURNS = 3
"""Measurements of the short and of the long prompt, whose medians are compared: the machine may be slow for a while."""
CALIBRATED = "q4_0"
ADAPTER = "random-adapter"
RANK = 8
SYSTEMS = (
    "You control the lamps, the blinds and the heating of a house. Answer with one JSON object: the device, the room "
    "and the action. Leave out what the request does not name. Never explain the answer and never ask back.",
    "Name the intent of the request in one word: light, climate, cover, media, lock, timer, weather or talk.",
    "Reply as a polite butler of few words, in one sentence, and do not repeat what was asked.",
)
OWN = "own"
"""The calibration with the same bundle, as the documentation advises."""
LIMITS = {"memory": 0.10, "speed": 0.25, "boards": 0.30}
"""Accepted errors."""


def main() -> None:
    """Measure the parts and write fit.json and fit.md."""
    parts = {"memory": memory, "speed": speed, "boards": published}
    parser = BENCHMARK.parser(only=[*parts], threads=2, works=True)
    options = BENCHMARK.options(parser)
    with work_folder(options) as work:
        if {"memory", "speed"} & set(options.only):
            make_bundles(work)
        measured = {part: parts[part](work, options.threads) for part in options.only}
    BENCHMARK.report(options, {"limits": LIMITS, **measured})


def make_bundles(work: Path) -> None:
    """A bundle per quantization and number of adapters in `work`, unless they are there."""
    for quantization in QUANTIZATIONS:
        one = work / "one" / quantization
        if not one.exists():
            base = resolve_base(quantization=quantization, work=work / "bases")
            folders = random_adapters(base, [ADAPTER], RANK, work / "peft" / quantization)
            export_random(base, folders, one, targets=ENGINES)
        for count in ADAPTERS:
            if not bundle_of(work, quantization, count).exists():
                copy_with(count, one, bundle_of(work, quantization, count))


def copy_with(count: int, bundle: Path, out: Path) -> None:
    """A copy of the bundle with its adapter so many times, each with files and a system prompt of its own."""
    manifest = read_manifest(bundle)
    one = manifest.adapters[ADAPTER]
    files, adapters = {}, {}
    for number, system in zip(range(count), cycle(SYSTEMS), strict=False):
        name = f"task{number}"
        own = {engine: file.replace(ADAPTER, name) for engine, file in one.files.items()}
        adapters[name] = replace(one, name=name, files=own, system=f"{system} ({name})")
    for file, entry in manifest.files.items():
        for copy in [file.replace(ADAPTER, name) for name in adapters] if ADAPTER in file else [file]:
            (out / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file, out / copy)
            files[copy] = entry
    (out / MANIFEST_NAME).write_text(replace(manifest, files=files, adapters=adapters).to_json(), encoding="utf-8")


def bundle_of(work: Path, quantization: str, adapters: int) -> Path:
    return work / f"{quantization}-{adapters}"


def memory(work: Path, threads: int) -> list[dict[str, Any]]:
    """Predicted and measured peak of resident memory, in MB."""
    repacks = repacked_types(instructions())
    rows = []
    for engine, quantization, count, context in product(ENGINES, QUANTIZATIONS, ADAPTERS, CONTEXTS):
        bundle = bundle_of(work, quantization, count)
        needs = needs_of_bundle(bundle, context_length=context, engine=engine)
        measured = in_own_process(measured_peak_mb, bundle, engine, context, threads)
        case = {"engine": engine, "quantization": quantization, "adapters": count, "context_length": context}
        rows.append(case | _compared(needed_mb(needs, repacks=repacks), measured))
        progress(str(rows[-1]))
    return rows


def speed(work: Path, threads: int) -> dict[str, Any]:
    """Predicted and measured decode speed in tokens/s, with and without an adapter, after a long prompt.

    The calibration is that of the bundle itself after a short prompt, or of the bundle in `CALIBRATED`.
    """
    context = max(CONTEXTS)
    rows: list[dict[str, Any]] = []
    busy = disturbance()
    for engine in ENGINES:
        other: SpeedFigures | None = None
        for quantization in sorted(QUANTIZATIONS, key=lambda name: name != CALIBRATED):
            bundle = bundle_of(work, quantization, 4)
            needs = needs_of_bundle(bundle, context_length=context, engine=engine)
            short, long = map(_median, in_own_process(measured_speeds, bundle, engine, context, threads))
            calibrations = {OWN: figures_of(needs, short, threads)}
            if other is None:
                other = calibrations[OWN]
            else:
                calibrations[CALIBRATED] = other
            for name, figures in calibrations.items():
                case = {"engine": engine, "quantization": quantization, "calibration": name, "tokens": long.tokens}
                seconds = token_seconds(needs, figures, long.tokens)
                rows.append(case | {"adapter": False} | _compared(1 / seconds, long.decode))
                if long.adapter is not None and long.adapter_decode is not None:
                    slower = seconds + adapter_seconds(needs.adapters[long.adapter], figures)
                    rows.append(case | {"adapter": True} | _compared(1 / slower, long.adapter_decode))
    return {"busy": busy, "rows": rows}


def _median(measured: Sequence[MeasuredSpeed]) -> MeasuredSpeed:
    """The median of each speed."""
    speeds = ("decode", "prefill", "adapter_decode", "long_decode")
    taken = {name: [getattr(one, name) for one in measured] for name in speeds}
    return replace(measured[0], **{name: statistics.median(values) for name, values in taken.items() if all(values)})


def published(_work: Path, _threads: int) -> list[dict[str, Any]]:
    """Predictions for each published figure; `calibrated` if it was used to set the board's figures."""
    raw = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
    return [row | _compared(_predicted(row, raw["models"][row["model"]]), row["published"]) for row in raw["figures"]]


def _predicted(row: dict[str, Any], model: dict[str, Any]) -> float:
    """Decode or prefill speed of a model on a board, in tokens/s."""
    head = model.get("head_parameters", 0)
    needs = Needs(
        base_bytes=int(model["read_gb"] * 1e9),
        read_bytes=int(model["read_gb"] * 1e9),
        read_parameters=int(model["read_parameters"]),
        head_parameters=int(head),
        layers=model["layers"],
        heads=1,
        embedding_length=1,
        feed_forward_length=1,
        vocabulary=1,
        kv_values_per_token=model["kv_values_per_token"],
        context_length=row.get("tokens", 128),
        engine="gguf",
    )
    figures = boards.load(row["board"]).speed
    return prefill_speed(needs, figures) if row.get("prefill") else speed_of(needs, figures).decode_tokens_per_s


def measured_peak_mb(bundle: Path, engine: str, context: int, threads: int) -> float:
    """Peak resident memory of this process after prompts for the base and for the adapters."""
    from edgetune_runtime.inference.measuring import loaded_bundle
    from edgetune_runtime.states.cache import CACHE_MB

    with _opened(bundle, engine, context, threads, map_large_blocks=True) as runtime:
        for name in (None, *runtime.adapters):
            # Room for the system prompt, the template and the answer.
            runtime.generate(words(int(context * (0.5 if name else 0.9)) - 90), adapter=name, max_tokens=8)
            if loaded_bundle(runtime).context()[0].shared.cache.bytes > 0.9 * CACHE_MB * 1e6:
                break  # more states would only evict others
        peak = peak_mb()
    assert peak is not None
    return peak


def measured_speeds(bundle: Path, engine: str, context: int, threads: int) -> list[list[MeasuredSpeed]]:
    """Speed after a short and after a long prompt, several times in turn."""
    with _opened(bundle, engine, context, threads) as runtime:
        lengths = {"short": 128, "long": context * 3 // 4}
        return [*in_turns({name: partial(measure, runtime, count) for name, count in lengths.items()}, TURNS).values()]


def _opened(bundle: Path, engine: str, context: int, threads: int, *, map_large_blocks: bool = False) -> Runtime:
    from edgetune_runtime import Runtime

    return Runtime.open(
        bundle,
        engine=engine,
        context_length=context,
        threads=threads,
        disk_mb=0,
        contexts=1,
        map_large_blocks=map_large_blocks,
    )


def _compared(predicted: float, measured: float) -> dict[str, float]:
    return {
        "measured": round(measured, 1),
        "predicted": round(predicted, 1),
        "error": round(predicted / measured - 1, 3),
    }


def table(result: Result) -> str:
    """The comparisons as Markdown tables, and the largest error of each part."""
    speed = result.get("speed", {"busy": None, "rows": []})
    rows_by_part = {"memory": result.get("memory", []), "speed": speed["rows"], "boards": result.get("boards", [])}
    texts: list[str] = []
    for part, rows in rows_by_part.items():
        if not rows:
            continue
        worst = max(abs(row["error"]) for row in rows)
        outside = sum(abs(row["error"]) > LIMITS[part] for row in rows)
        texts.append(f"{part}: largest error {worst:.0%}, {outside} of {len(rows)} rows outside {LIMITS[part]:.0%}\n")
        if part == "speed" and speed["busy"]:
            texts.append(f"measured while the machine was busy: {speed['busy']}\n")
        columns = {key: f"{{{key}}}" for key in rows[0] if key != "source"}
        texts.append(markdown(rows, columns))
    return "\n".join(texts)


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

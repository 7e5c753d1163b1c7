"""Compare what `edgetune devices fit` predicts with measurements on this machine and with published figures of boards.

    pip install -e '.[demo]'
    python benchmarks/fit.py --work build/fit --out benchmarks/results

Memory: SmolLM2-135M in three quantizations with 0, 4 and 16 random rank-8 adapters, in both engines with three context
lengths, each in a process of its own: peak resident memory after a prompt of nearly the whole context for the base, and
of half the context for the adapters, until the saved states reach their limit. Speed: each bundle is calibrated after a
short prompt, as `edgetune-run doctor --calibrate` does; then decode speed after a long one is predicted and measured,
from the bundle's own calibration and from that of another quantization.
Boards: predictions for the published figures in `published.toml`. `--parts` runs some of the three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

from edgetune_devices import boards
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.doctor import instructions
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.quantization import repacked_types
from edgetune_runtime.sizing.calibration import MeasuredSpeed, figures_of, measure
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.needs import needed_mb, needs_of_bundle
from edgetune_runtime.sizing.speed import adapter_seconds, prefill_speed, speed_of, token_seconds
from edgetune_runtime.threads.machine import disturbance, peak_mb

from benchmarks.machine import this_machine

PARTS = ("memory", "speed", "boards")
ENGINES = ("gguf", "onnx")
QUANTIZATIONS = ("q8_0", "q4_k_m", "q4_0")
CONTEXTS = (512, 1024, 2048)
ADAPTERS = (0, 4, 16)
TURNS = 3
"""Measurements of the short and of the long prompt, whose medians are compared: the machine may be slow for a while."""
CALIBRATED = "q4_0"
WORDS = "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain"
OWN = "own"
"""The calibration with the same bundle, as the documentation advises."""
LIMITS = {"memory": 0.10, "speed": 0.25, "boards": 0.30}
"""Accepted errors."""


def main() -> None:
    """Measure the parts and write fit.json and fit.md."""
    parser = argparse.ArgumentParser(description="Compare predictions of memory and speed with measurements.")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the bundles (default: a temporary folder)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write fit.json and fit.md here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=("memory", "speed"), help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(peak(options) if options.worker == "memory" else decode(options)))
        return
    result: dict[str, Any] = {"machine": this_machine(), "threads": options.threads, "limits": LIMITS}
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        if "memory" in options.parts or "speed" in options.parts:
            make_bundles(options.work)
        result |= {
            part: {"memory": memory, "speed": speed, "boards": published}[part](options) for part in options.parts
        }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fit.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "fit.md").write_text(tables(result), encoding="utf-8")
    print(json.dumps(result) if options.json else tables(result))


def make_bundles(work: Path) -> None:
    """A bundle per quantization and number of adapters in `work`, unless they are there."""
    from benchmarks.fit_bundles import make_bundle, with_fewer

    for quantization in QUANTIZATIONS:
        whole = work / "whole" / quantization
        if not whole.exists():
            make_bundle(whole, work / "bases", quantization, max(ADAPTERS))
        for count in ADAPTERS:
            if not bundle_of(work, quantization, count).exists():
                with_fewer(whole, read_manifest(whole), count, bundle_of(work, quantization, count))


def bundle_of(work: Path, quantization: str, adapters: int) -> Path:
    return work / f"{quantization}-{adapters}"


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted and measured peak of resident memory, in MB."""
    repacks = repacked_types(instructions())
    rows = []
    for engine, quantization, count, context in product(ENGINES, QUANTIZATIONS, ADAPTERS, CONTEXTS):
        bundle = bundle_of(options.work, quantization, count)
        needs = needs_of_bundle(bundle, context_length=context, engine=engine)
        measured = _worker(options, "memory", bundle, engine, context)["peak_mb"]
        case = {"engine": engine, "quantization": quantization, "adapters": count, "context_length": context}
        rows.append(case | _compared(needed_mb(needs, repacks=repacks), measured))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured decode speed in tokens/s, with and without an adapter, after a long prompt.

    The calibration is that of the bundle itself after a short prompt, or of the bundle in `CALIBRATED`.
    """
    context = max(CONTEXTS)
    rows: list[dict[str, Any]] = []
    busy = disturbance()
    for engine in ENGINES:
        other: SpeedFigures | None = None
        for quantization in sorted(QUANTIZATIONS, key=lambda name: name != CALIBRATED):
            bundle = bundle_of(options.work, quantization, 4)
            needs = needs_of_bundle(bundle, context_length=context, engine=engine)
            found = _worker(options, "speed", bundle, engine, context)
            short, long = (_median([MeasuredSpeed(**one) for one in turns]) for turns in found["measured"])
            calibrations = {OWN: figures_of(needs, short, options.threads)}
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


def _median(found: Sequence[MeasuredSpeed]) -> MeasuredSpeed:
    """The median of each speed."""
    speeds = ("decode", "prefill", "adapter_decode", "long_decode")
    taken = {name: [getattr(one, name) for one in found] for name in speeds}
    return replace(found[0], **{name: statistics.median(values) for name, values in taken.items() if all(values)})


def published(_options: argparse.Namespace) -> list[dict[str, Any]]:
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
    return prefill_speed(needs, figures) if row.get("prefill") else speed_of(needs, figures).decode


def peak(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of this process after prompts for the base and for the adapters."""
    from edgetune_runtime import Runtime
    from edgetune_runtime.inference.measuring import loaded_bundle
    from edgetune_runtime.states.cache import CACHE_MB

    with Runtime.open(
        options.bundle,
        engine=options.engine,
        context_length=options.context,
        threads=options.threads,
        disk_mb=0,
        contexts=1,
        map_large_blocks=True,
    ) as runtime:
        for name in (None, *runtime.adapters):
            # One token per word, and room for the system prompt, the template and the answer.
            count = int(options.context * (0.5 if name else 0.9)) - 90
            runtime.generate(" ".join(islice(cycle(WORDS.split()), count)), adapter=name, max_tokens=8)
            if loaded_bundle(runtime).context()[0].shared.cache.bytes > 0.9 * CACHE_MB * 1e6:
                break  # more states would only evict others
        measured = peak_mb()
    assert measured is not None
    return {"peak_mb": measured}


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Speed after a short and after a long prompt, several times in turn."""
    from edgetune_runtime import Runtime

    found: list[list[dict[str, Any]]] = [[], []]
    with Runtime.open(
        options.bundle,
        engine=options.engine,
        context_length=options.context,
        threads=options.threads,
        disk_mb=0,
        contexts=1,
    ) as runtime:
        for _ in range(TURNS):
            for turns, tokens in zip(found, (128, options.context * 3 // 4), strict=True):
                turns.append(asdict(measure(runtime, tokens)))
    return {"measured": found}


def _worker(options: argparse.Namespace, what: str, bundle: Path, engine: str, context: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", what, "--bundle", str(bundle), "--engine", engine]
    command += ["--context", str(context), "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _compared(predicted: float, measured: float) -> dict[str, float]:
    return {
        "measured": round(measured, 1),
        "predicted": round(predicted, 1),
        "error": round(predicted / measured - 1, 3),
    }


def tables(result: dict[str, Any]) -> str:
    """The comparisons as Markdown tables, and the largest error of each part."""
    found = {"memory": result.get("memory", []), "speed": result.get("speed", {}).get("rows", [])}
    found["boards"] = result.get("boards", [])
    lines: list[str] = []
    for part, rows in found.items():
        if not rows:
            continue
        worst = max(abs(row["error"]) for row in rows)
        outside = sum(abs(row["error"]) > LIMITS[part] for row in rows)
        limit = f"{LIMITS[part]:.0%}"
        lines += [f"{part}: largest error {worst:.0%}, {outside} of {len(rows)} rows outside {limit}", ""]
        if part == "speed" and result["speed"]["busy"]:
            lines += [f"measured while the machine was busy: {result['speed']['busy']}", ""]
        keys = [key for key in rows[0] if key != "source"]
        lines += [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
        lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in keys)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()

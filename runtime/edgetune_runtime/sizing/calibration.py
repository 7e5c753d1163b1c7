"""Measures what an engine sustains on this machine with a bundle, and keeps it in a file for `devices fit`."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.runtime import Runtime
from edgetune_runtime.states.batches import CHUNK

from .figures import SpeedFigures
from .machine_speed import read_bandwidth

STEPS = 8
ROUNDS = 3
"""Everything is measured in turn, so that what slows the machine for a second does not slow one figure only."""
KIND = "edgetune-calibration"
_LONGEST, _LONGEST_S = 8 * CHUNK, 4
"""A longer prompt shows what attention costs: at most so many tokens, and as many as take so many seconds per round."""
_MIN_LAYER_US = 1.0
_MIN_MODULE_US = 0.1


@dataclass(frozen=True)
class MeasuredSpeed:
    """Median decode and prefill speed of a bundle's base, and decode speed with an adapter, in tokens/s.

    `tokens` is the number of tokens before the decoded ones, `adapter` the adapter's name, if there is one.
    `long_decode` is the base's decode speed after `long_tokens` tokens, None where they are not many more.
    """

    decode: float
    prefill: float
    tokens: int
    adapter: str | None
    adapter_decode: float | None
    long_tokens: int = 0
    long_decode: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The figures of an engine, and the `weights` (see `Needs`) of the bundle that they were measured with."""

    figures: SpeedFigures
    weights: str

    def caution(self, needs: Needs) -> str | None:
        """A warning for predictions of other weights than those that were measured, else None."""
        if self.weights == needs.weights:
            return None
        return (
            f"the calibration is of {self.weights} weights and these are {needs.weights}, whose speed may differ by a "
            "third; add theirs: edgetune-run doctor BUNDLE --calibrate FILE"
        )


def measure(runtime: Runtime, tokens: int = CHUNK) -> MeasuredSpeed:
    """Measure prefill of so many tokens, and some steps of the base and of the largest adapter.

    Takes two seconds or three, and at most twelve more for the base after a longer prompt.
    """
    base, _ = loaded_bundle(runtime).context()
    capacity = base.engine.capacity({}) - STEPS - 1
    tokens, name = min(tokens, capacity), _largest_adapter(runtime)
    prefills_s: list[float] = []
    steps_s: list[float] = []
    long_s: list[float] = []
    adapter_s: list[float] = []
    for _ in range(ROUNDS):
        prefill_s, times = _timed(runtime, None, tokens)
        prefills_s.append(prefill_s)
        steps_s += times
        # The first round decides for all.
        long_tokens = min(capacity, _LONGEST, int(tokens / prefills_s[0] * _LONGEST_S))
        if long_tokens >= 2 * tokens:
            long_s += _timed(runtime, None, long_tokens)[1]
        if name is not None:
            adapter_s += _timed(runtime, name, tokens)[1]
    return MeasuredSpeed(
        decode=1 / statistics.median(steps_s),
        prefill=tokens / statistics.median(prefills_s),
        tokens=tokens + STEPS // 2,
        adapter=name,
        adapter_decode=1 / statistics.median(adapter_s) if adapter_s else None,
        long_tokens=long_tokens + STEPS // 2,
        long_decode=1 / statistics.median(long_s) if long_s else None,
    )


def figures_of(needs: Needs, measured: MeasuredSpeed, threads: int) -> SpeedFigures:
    """The figures with which `speed_of` predicts what was measured; the bandwidth is measured on `threads` threads."""
    bandwidth = read_bandwidth(threads)
    body = max(needs.read_parameters - needs.head_parameters, 1)
    compute = measured.prefill * 2 * body / 1e9
    kv_bandwidth = _kv_bandwidth(needs, measured, bandwidth)
    # Without attention, of which the two decode speeds show the cost.
    seconds = 1 / measured.decode - needs.kv_bytes_per_token * measured.tokens / (kv_bandwidth * 1e9)
    reading = needs.read_bytes / (bandwidth * 1e9)
    computing = 2 * needs.read_parameters / (compute * 1e9)
    # The layers take what is left after reading or computing. Where nothing is left, a step was faster than the
    # measurements of either allow, so it shows what the machine can do.
    layer_us = max(_MIN_LAYER_US, (seconds - max(reading, computing)) * 1e6 / needs.layers)
    left = max(seconds - needs.layers * layer_us / 1e6, seconds / 2)
    bandwidth *= max(1.0, reading / left)
    compute *= max(1.0, computing / left)
    module_us = _MIN_MODULE_US
    if measured.adapter is not None and measured.adapter_decode is not None:
        size = needs.adapters[measured.adapter]
        extra = 1 / measured.adapter_decode - 1 / measured.decode - size.file_bytes / (bandwidth * 1e9)
        module_us = max(_MIN_MODULE_US, extra * 1e6 / max(size.modules, 1))
    return SpeedFigures(bandwidth, compute, layer_us, module_us, kv_bandwidth)


def _kv_bandwidth(needs: Needs, measured: MeasuredSpeed, bandwidth: float) -> float:
    """The rate at which attention reads keys and values, at most the memory's; the same if nothing shows less."""
    if measured.long_decode is None:
        return bandwidth
    more_s = 1 / measured.long_decode - 1 / measured.decode
    more_bytes = needs.kv_bytes_per_token * (measured.long_tokens - measured.tokens)
    # A disturbed measurement must not leave less than half of a step for the rest.
    slowest = needs.kv_bytes_per_token * measured.tokens * measured.decode / 0.5 / 1e9
    return bandwidth if more_s <= 0 else min(bandwidth, max(slowest, more_bytes / more_s / 1e9))


def write_calibration(path: Path, needs: Needs, figures: SpeedFigures, machine: Mapping[str, Any]) -> None:
    """Write the figures for an engine and weights; others that are in the file stay if the machine is the same."""
    engines: dict[str, Any] = {}
    if path.exists():
        before = _read(path)
        engines = before["engines"] if before.get("machine") == machine else {}
    engines.setdefault(needs.engine, {})[needs.weights] = {
        key: round(value, 3) for key, value in asdict(figures).items()
    }
    document = {"kind": KIND, "machine": dict(machine), "date": time.strftime("%Y-%m-%d"), "engines": engines}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_calibration(path: Path, needs: Needs) -> Calibration:
    """The figures for this engine and these weights, or else for the first weights measured.

    NotFoundError if there are none for the engine, UsageError for a file of another kind.
    """
    engines, engine = _read(path)["engines"], needs.engine
    by_weights = engines.get(engine)
    if not by_weights:
        remedy = f"measure them on the board: edgetune-run doctor BUNDLE --engine {engine} --calibrate {path.name}"
        raise NotFoundError(f"{path} has no figures for {engine}, only for {', '.join(engines) or 'none'}", remedy)
    weights = needs.weights if needs.weights in by_weights else next(iter(by_weights))
    return Calibration(SpeedFigures(**by_weights[weights]), weights)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", "give a file of doctor --calibrate") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}", "give a file of doctor --calibrate") from error
    engines = document.get("engines") if isinstance(document, dict) and document.get("kind") == KIND else None
    is_whole = isinstance(engines, dict) and all(
        isinstance(by_weights, dict) and all(map(_is_figures, by_weights.values())) for by_weights in engines.values()
    )
    if not is_whole:
        raise UsageError(f"{path} is not a file of doctor --calibrate", "measure again on the board")
    return cast("dict[str, Any]", document)


def _is_figures(value: object) -> bool:
    names = {field.name for field in fields(SpeedFigures)}
    return (
        isinstance(value, dict)
        and value.keys() == names
        and all(isinstance(number, int | float) and 0 < number < math.inf for number in value.values())
    )


def _prompt(tokens: int) -> list[int]:
    return [3 + number % 97 for number in range(tokens)]


def _largest_adapter(runtime: Runtime) -> str | None:
    """The adapter that changes most modules, merged models and prefixes apart."""
    entries = runtime.manifest.adapters.values()
    names = [entry.name for entry in entries if entry.shapes.get(runtime.engine) == "low_rank"]
    return max(names, key=lambda name: runtime.manifest.adapters[name].module_count, default=None)


def _timed(runtime: Runtime, adapter: str | None, tokens: int) -> tuple[float, list[float]]:
    """Seconds of a prefill of so many tokens, and of each of the steps of one token after it."""
    steps_s = []
    context, active = loaded_bundle(runtime).context(adapter)
    with context.hold():
        context.reset()
        begin = time.perf_counter()
        context.start(active, _prompt(tokens))
        prefill_s = time.perf_counter() - begin
        for _ in range(STEPS):
            begin = time.perf_counter()
            context.extend([5])
            steps_s.append(time.perf_counter() - begin)
    return prefill_s, steps_s

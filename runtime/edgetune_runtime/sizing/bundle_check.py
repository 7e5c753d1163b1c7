"""Checks a bundle on this machine for `doctor`: why it is refused, its memory, predicted and measured speed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.inference.runtime import Runtime
from edgetune_runtime.threads.machine import free_mb, own_mb

from .calibration import Calibration, MeasuredSpeed, figures_of, measure
from .figures import SpeedFigures
from .machine_speed import read_bandwidth
from .needs import items_of, kept_of
from .speed import adapter_seconds, prefill_speed, token_seconds

_LAPTOP_LAYER_US = 10
"""Time per layer that was measured on a laptop, for machines without a calibration."""


@dataclass(frozen=True)
class BundleCheck:
    """What `doctor` reports of a bundle, as JSON values, problems in one line each, and the figures measured."""

    report: dict[str, Any]
    problems: list[str]
    figures: SpeedFigures | None


def check_bundle(
    open_runtime: Callable[[], Runtime],
    needs: Needs | None,
    *,
    calibration: Calibration | None,
    repacks: Collection[str],
) -> BundleCheck:
    """Open the bundle, measure it for some seconds (see `measure`), and close it.

    Without `needs`, as for an encoder, nothing is predicted and measured. The prediction uses the figures of
    `calibration`, by default the memory bandwidth measured here. An error of opening is a problem, not raised.
    """
    report: dict[str, Any] = {}
    problems: list[str] = []
    free = free_mb()
    if needs is not None:
        items = items_of(needs, repacks=repacks)
        needed = sum(item.mb for item in items)
        report["memory_mb"] = {item.name: round(item.mb, 1) for item in items} | {"needed": round(needed, 1)}
        kept = kept_of(items)
        # What this process has already is part of what the bundle needs.
        own = own_mb()
        if free is not None and kept > free + own:
            remedy = "shorten --context-length, or limit saved states with --cache-mb"
            problems.append(f"the bundle needs about {kept - own:.0f} MB more, and {free:.0f} MB are free: {remedy}")
    try:
        with open_runtime() as runtime:
            report |= {"engine": runtime.engine, "threads": runtime.threads}
            if needs is None:
                return BundleCheck(report, problems, None)
            measured = measure(runtime)
            threads = runtime.threads
    except EdgetuneError as error:
        return BundleCheck(report | {"refused": str(error)}, [*problems, f"refused: {error}"], None)
    figures = figures_of(needs, measured, threads)
    used = calibration.figures if calibration else _assumed(figures, threads)
    report["predicted_from"] = (
        f"the figures given, of {calibration.weights} weights" if calibration else "the memory bandwidth measured here"
    )
    report["predicted_tokens_per_s"] = _predicted(needs, used, measured, prefill=calibration is not None)
    report["measured_tokens_per_s"] = _speeds(measured.decode, measured.adapter_decode, measured.prefill)
    return BundleCheck(report, problems, figures)


def _assumed(figures: SpeedFigures, threads: int) -> SpeedFigures:
    """The figures without a calibration: memory bandwidth on so many threads, and the measured compute speed."""
    bandwidth = read_bandwidth(threads)
    return SpeedFigures(bandwidth, figures.compute_gflop_per_s, _LAPTOP_LAYER_US, 0, bandwidth)


def _predicted(
    needs: Needs, figures: SpeedFigures, measured: MeasuredSpeed, *, prefill: bool
) -> dict[str, float | None]:
    seconds = token_seconds(needs, figures, measured.tokens)
    adapter = None
    if measured.adapter is not None:
        adapter = 1 / (seconds + adapter_seconds(needs.adapters[measured.adapter], figures))
    return _speeds(1 / seconds, adapter, prefill_speed(needs, figures) if prefill else None)


def _speeds(decode: float, adapter: float | None, prefill: float | None) -> dict[str, float | None]:
    return {
        "decode": round(decode, 1),
        "decode_adapter": None if adapter is None else round(adapter, 1),
        "prefill": None if prefill is None else round(prefill, 1),
    }

"""Measures the score and the speed of a built bundle in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from edgetune_runtime import Runtime
from edgetune_runtime.cli import bench

from edgetune.evaluation import Evaluation, score
from edgetune.progress import Progress
from edgetune.tasks.data import TaskRow

from .figures import EngineFigures, standard_error


def measure(
    bundle: Path, task: str, rows: Sequence[TaskRow], target: str, progress: Progress
) -> tuple[Evaluation, EngineFigures]:
    """Score the bundle's only adapter, `task`, on `rows` in the device's engine of a format, then time it there."""
    open_bundle = partial(Runtime.open, bundle, engine=target, disk_mb=0, preflight=False)
    progress.say(f"scoring on {target}")
    with open_bundle() as runtime:
        scored, entry = score(runtime, task, rows, progress), runtime.manifest.adapter(task)
    progress.say(f"timing {target}")
    timed = bench.measure(open_bundle, lambda _: None)
    speed = timed["decode_tokens_per_s"]
    return scored, EngineFigures(
        shape=entry.shapes[target],
        bytes=round(timed["adapter_mb"] * 1e6),
        score=scored.score,
        standard_error=standard_error(scored.metric, scored.score, [row.score for row in scored.details]),
        kl=entry.parity[target]["kl"],
        base_tokens_per_s=speed["base"],
        tokens_per_s=speed["adapters"][task],
        switch_us=timed["switch_us"] and timed["switch_us"]["p50"],
        first_token_ms=timed["ttft_ms"] and timed["ttft_ms"]["after_switch"],
        slow=bool(timed.get("slow", False)),
        busy=timed.get("busy"),
    )

"""Measures scores and speeds of a built bundle on each engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import AdapterEntry, Manifest, read_manifest
from edgetune_runtime.cli import bench

from edgetune.evaluation import Evaluation, score
from edgetune.progress import Progress
from edgetune.tasks.data import TaskRow

from .figures import EngineFigures, standard_error


@dataclass(frozen=True)
class BundleMeasurement:
    """Measures a bundle with a single adapter, `task`, on the device's engines; scores it on `rows`."""

    bundle: Path
    task: str
    rows: Sequence[TaskRow]
    progress: Progress

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return read_manifest(self.bundle)

    @property
    def entry(self) -> AdapterEntry:
        """The adapter's entry in the manifest."""
        return self.manifest.adapter(self.task)

    def score(self, target: str) -> Evaluation:
        """The adapter's score on the device's engine."""
        self.progress.say(f"scoring on {target}")
        with Runtime.open(self.bundle, engine=target, disk_mb=0, preflight=False) as runtime:
            return score(runtime, self.task, self.rows, self.progress)

    def on_engine(self, target: str, scored: Evaluation) -> EngineFigures:
        """All figures of the adapter on an engine: the given scores, and speeds measured here."""
        self.progress.say(f"timing {target}")
        timed = bench.measure(
            partial(Runtime.open, self.bundle, engine=target, disk_mb=0, preflight=False), lambda _: None
        )
        shape, speed = self.entry.shapes[target], timed["decode_tokens_per_s"]
        return EngineFigures(
            shape=shape,
            bytes=round(timed["adapter_mb"] * 1e6),
            score=scored.score,
            standard_error=standard_error(scored.metric, scored.score, [row.score for row in scored.details]),
            kl=self.entry.parity[target]["kl"],
            base_tokens_per_s=speed["base"],
            tokens_per_s=speed["adapters"][self.task],
            switch_us=timed["switch_us"] and timed["switch_us"]["p50"],
            first_token_ms=timed["ttft_ms"] and timed["ttft_ms"]["after_switch"],
            slow=bool(timed.get("slow", False)),
            busy=timed.get("busy"),
        )

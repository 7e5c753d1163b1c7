"""Measures scores and speeds of a built bundle on each engine, and of its checkpoint in torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from edgetune_export import backends
from edgetune_export.adapters.shapes import Merged
from edgetune_export.backends.base import Source
from edgetune_export.merged import source_of_merged
from edgetune_runtime import Runtime, engines
from edgetune_runtime.bundle import AdapterEntry, Manifest, read_manifest
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.inference.measuring import runtime_around
from edgetune_runtime.sizing import bench
from filelock import FileLock

from edgetune import bases, methods
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import TrainedAdapter
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import Evaluation, score
from edgetune.tasks.metrics import per_conversation

from .figures import EngineFigures, standard_error
from .torch_engine import TorchEngine


@dataclass(frozen=True)
class MergedSpeed:
    """Decoding speed of a merged model; `slow` and `busy` as in `EngineFigures`."""

    tokens_per_s: float
    slow: bool = False
    busy: str | None = None


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

    def on_engine(self, target: str, scored: Evaluation, merged: MergedSpeed | None) -> EngineFigures:
        """All figures of the adapter on an engine: the given scores, and speeds measured here."""
        self.progress.say(f"timing {target}")
        points = per_conversation((row.conversation, row.score) for row in scored.details)
        timed = bench.measure(
            partial(Runtime.open, self.bundle, engine=target, disk_mb=0, preflight=False), lambda _: None
        )
        shape, speed = self.entry.shapes[target], timed["decode_tokens_per_s"]
        decode_speed, is_merged = speed["adapters"][self.task], shape == Merged.shape
        slow, busy = _load_in(timed)
        if is_merged:
            merged = MergedSpeed(decode_speed, slow, busy)
        return EngineFigures(
            shape=shape,
            bytes=round(timed["adapter_mb"] * 1e6),
            score=scored.score,
            standard_error=standard_error(scored.metric, scored.score, points),
            kl=self.entry.parity[target]["kl"],
            base_tokens_per_s=speed["base"],
            tokens_per_s=None if is_merged else decode_speed,
            merged_tokens_per_s=None if merged is None else merged.tokens_per_s,
            switch_us=timed["switch_us"] and timed["switch_us"]["p50"],
            first_token_ms=timed["ttft_ms"] and timed["ttft_ms"]["after_switch"],
            slow=slow or (merged is not None and merged.slow),
            busy=busy or (None if merged is None else merged.busy),
        )


@dataclass(frozen=True)
class TorchMeasurement:
    """Measures the checkpoint of a bundle in torch, in float32, and merged models made from it.

    `work` has the base's ONNX graph, which trials share.
    """

    measured: BundleMeasurement
    base: bases.Base
    trained: TrainedAdapter
    work: Path
    recipe: Recipe

    @cached_property
    def checkpoint(self) -> methods.Checkpoint:
        """The trained checkpoint with its base."""
        return self.trained.checkpoint(bases.load_torch(self.base, torch.float32))

    @property
    def method(self) -> methods.Method[Any]:
        """The method that trained it."""
        return methods.load(self.trained.plan.method)

    def score(self, answers: Sequence[str]) -> Evaluation:
        """The checkpoint's score with greedy decoding; `answers` are guesses that save time, such as the device's."""
        measured = self.measured
        measured.progress.say("scoring in torch")
        entry = replace(measured.entry, shapes={}, files={})
        manifest = replace(measured.manifest, adapters={entry.name: entry})
        with closing(GgufTokenizer(self.base.path)) as tokenizer, self.method.loaded(self.checkpoint) as model:
            engine = TorchEngine(model, tokenizer, context_length=manifest.context_length, guesses=answers)
            with runtime_around(engine, measured.bundle, manifest, "torch") as runtime:
                return score(runtime, entry.name, measured.rows, measured.progress)

    def merged_speed(self, target: str) -> MergedSpeed | None:
        """Decoding speed with the adapter merged into the base; None if the adapter is already merged or cannot be.

        The merged model is written only for this measurement and deleted afterwards.
        """
        measured, backend = self.measured, backends.load(target)
        shapes = {*self.method.shapes(self.trained.plan.options)} & {*backend.SHAPES}
        if measured.entry.shapes[target] == Merged.shape or Merged.shape not in shapes:
            return None
        measured.progress.say(f"timing a merged model in {target}")
        out = measured.bundle.with_name("merged") / backend.MODEL_FILE
        base = self.base
        try:
            folded = self.method.fold(self.checkpoint, Merged.shape)
            assert isinstance(folded, Merged)
            options = self.recipe.format_options
            model, quantization = self.checkpoint.base, base.quantization
            source = Source(base.path, base.fingerprint, model, self.work, options, quantization=quantization)
            # Trials that run at the same time share the folder.
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "lock"):
                requested, on_grid = self.recipe.merged_quantization, self.method.trains_on_grid
                backend.write_merged(folded, source_of_merged(source, requested, trains_on_grid=on_grid), out)
            return self._speed(target, out)
        finally:
            shutil.rmtree(measured.bundle.with_name("merged"), ignore_errors=True)

    def _speed(self, target: str, model: Path) -> MergedSpeed:
        manifest = replace(self.measured.manifest, adapters={})
        make = engines.load(target)
        engine = make(model, context_length=manifest.context_length, threads=manifest.threads)
        timed = bench.measure(lambda: runtime_around(engine, self.measured.bundle, manifest, target), lambda _: None)
        return MergedSpeed(float(timed["decode_tokens_per_s"]["base"]), *_load_in(timed))


def _load_in(timed: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether the machine was busy during `bench.measure`, and the reason if it is known."""
    return bool(timed.get("slow", False)), timed.get("busy")

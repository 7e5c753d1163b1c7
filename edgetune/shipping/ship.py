"""Exports a base with trained adapters: folds, writes every format, checks parity, and packs the bundle.

It makes no difference whether `edgetune build` trained the adapters or someone else did.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_export import backends
from edgetune_export.adapters.shapes import Adapter, Floats, Folded, LowRank, Merged, Prefix
from edgetune_export.backends.base import Source
from edgetune_export.merged import source_of_merged
from edgetune_export.pack import Complete, pack
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import STATES_FOLDER, AdapterEntry, Manifest, RouterEntry, read_manifest
from edgetune_runtime.decoding.drafts import DRAFT_FILE, write_table
from edgetune_runtime.inference.routing.classifier import ROUTER_FILE, write_classifiers

from edgetune.common.progress import Progress
from edgetune.report.facts import facts_of
from edgetune.report.render import card
from edgetune.training.allocator import give_back_freed_memory

from .builder import Builder
from .confidence import with_confidence
from .exported import B, BuildBase, BundleSpec, ExportedFormat, ParityReport, TrainedAdapter, WrittenAdapter
from .golden import with_golden
from .manifest import adapter_entry, manifest_of
from .scope import state_basis, with_scopes

CARD_NAME = "README.md"
"""The model card, at the top of a bundle."""

_LARGE_BYTES = 50_000_000
"""For bases larger than this, freeing memory early is worth the time."""


def ship(
    builder: Builder[B],
    base: B,
    adapters: Sequence[TrainedAdapter],
    work: Path,
    out: Path,
    *,
    spec: BundleSpec,
    progress: Progress,
) -> Manifest:
    """Export `adapters`, compare each with the trained one, and pack the bundle `out`; `work` is overwritten.

    Returns the manifest of the bundle.

    Raises VerificationError that names an adapter that differs from the trained one, and the errors of fold, the
    backends and pack. On an error nothing is written to `out`.
    """
    shutil.rmtree(work, ignore_errors=True)
    existing = spec.existing
    if existing is not None:
        existing.stage(work)
    # Training has just freed the base; do not keep it in memory while the next copy loads.
    _give_back(base)
    model = builder.load_for_export(base, spec, work / "intermediate", progress)
    source = builder.source(base, model, work / "intermediate", spec)
    stage = _Stage(work, source, adapters, builder, spec, progress)
    exports = []
    for target in spec.targets:
        progress.say(f"writing {target}")
        exports.append(stage.export(target))
        _give_back(base)
    progress.say("comparing the exported files with the trained model")
    shipped = [adapter for adapter in adapters if adapter.fold_of is None]
    parity = builder.verify(base, model, shipped, exports, progress)
    entry = builder.base_entry(base, source, {export.backend: stage.name_of(export.base) for export in exports})
    basis = _state_basis(model, adapters)
    # The next comparison loads two engines at a time.
    stage.source = replace(source, model=None)
    del model, source
    _give_back(base)
    between = builder.compare_formats(shipped, exports, progress) if existing is None else {}
    types = {export.backend: export.values_by_type for export in exports}
    manifest = manifest_of(
        spec,
        replace(entry, values_by_type=types, parity={**parity.base, **between}),
        stage.entries(exports, parity),
        stage.packages(),
        task=builder.task,
        router=stage.router(),
    )
    if existing is not None:
        manifest = existing.with_adapters(manifest)
    check = [] if existing is None else [existing.check_unchanged]
    pack(work, out, manifest, _steps(adapters, basis, spec, progress), *check)
    shutil.rmtree(work, ignore_errors=True)
    return read_manifest(out)


def _state_basis(model: Any, adapters: Sequence[TrainedAdapter]) -> Floats | None:  # noqa: ANN401 - a PreTrainedModel
    """What computes states from logits, if an adapter needs it; None for an encoder."""
    head: Any = model.get_output_embeddings()
    if head is None or not any(adapter.compared_rows for adapter in adapters):
        return None
    return state_basis(head.weight.detach().float().numpy())


def _give_back(base: BuildBase) -> None:
    """Free reference cycles, which modules of models and graphs have, and return the memory to the system."""
    # It takes a third of a second, too long for a small base.
    if base.path.stat().st_size > _LARGE_BYTES:
        gc.collect()
        give_back_freed_memory()


@dataclass
class _Stage:
    """The folder where the files of a bundle are collected, and what is exported into it."""

    work: Path
    source: Source
    adapters: Sequence[TrainedAdapter]
    builder: Builder[Any]
    spec: BundleSpec
    progress: Progress

    def __post_init__(self) -> None:
        self.backends = {target: backends.load(target, self.builder.task) for target in self.spec.targets}
        # Where a base needs places for all adapters, they are folded before it is written, and kept.
        is_new = self.spec.existing is None
        self.needs_all = {name: is_new and not backends.format_of(name).links_base for name in self.spec.targets}
        self.folded: dict[tuple[str, str], Adapter] = {}

    def export(self, target: str) -> ExportedFormat:
        """Write the base and all adapters in one format."""
        backend = self.backends[target]
        shapes = {adapter.name: adapter.plan.shapes[target] for adapter in self.adapters}
        if self.spec.existing is None:
            beside = [item for item in self.adapters if self.needs_all[target] and shapes[item.name] != Merged.shape]
            folded = [self._folded(adapter, shapes[adapter.name]) for adapter in beside]
            base = backend.write_base(self.source, self.work / "base", folded)
        else:
            base = self.work / self.spec.existing.manifest.base.files[target]
        written = {}
        for adapter in self.adapters:
            shape = shapes[adapter.name]
            if shape == Merged.shape:
                written[adapter.name] = self._write_merged(target, adapter)
            else:
                written[adapter.name] = self._write(target, self._folded(adapter, shape), adapter, base)
        return ExportedFormat(target, base, backend.values_by_type(base), written, backend.weight_type(self.source))

    def entries(self, exports: Sequence[ExportedFormat], parity: ParityReport) -> dict[str, AdapterEntry]:
        """The manifest entry of each adapter; writes the draft tables."""
        entries = {}
        for adapter in self.adapters:
            draft = self._write_draft(adapter)
            entries[adapter.name] = adapter_entry(
                adapter, exports, parity, fingerprint=self.source.fingerprint, stage=self.work, draft=draft
            )
        return entries

    def _write_draft(self, adapter: TrainedAdapter) -> Path | None:
        if adapter.draft is None:
            return None
        path = self._folder(adapter) / DRAFT_FILE
        write_table(path, adapter.draft)
        return path

    def router(self) -> RouterEntry | None:
        """The manifest entry of the router, whose file this writes."""
        trained = self.spec.router
        if trained is None:
            return None
        path = self.work / "adapters" / ROUTER_FILE
        write_classifiers(path, trained.classifiers)
        return RouterEntry(self.name_of(path), trained.calls, trained.below)

    def name_of(self, path: Path) -> str:
        """The name of a staged file in the bundle."""
        return path.relative_to(self.work).as_posix()

    def packages(self) -> list[str]:
        """The packages of the task and of the formats."""
        packages = [*self.builder.packages, *(name for backend in self.backends.values() for name in backend.PACKAGES)]
        return list(dict.fromkeys(packages))

    def _write(self, target: str, folded: Adapter, adapter: TrainedAdapter, base: Path) -> WrittenAdapter:
        backend = self.backends[target]
        out = self._folder(adapter) / backend.ADAPTER_FILE
        dtype = adapter.plan.dtypes[target]
        backend.write_adapter(folded, base, out, dtype=dtype, base_fingerprint=self.source.fingerprint)
        written = WrittenAdapter(out, backend.values_by_type(out))
        if isinstance(folded, LowRank):
            ranks = Counter(delta.rank for delta in folded.modules.values())
            return replace(written, error=folded.error, invocation=folded.invocation, modules_by_rank=ranks)
        return replace(written, prefix_tokens=folded.tokens) if isinstance(folded, Prefix) else written

    def _write_merged(self, target: str, adapter: TrainedAdapter) -> WrittenAdapter:
        backend = self.backends[target]
        on_grid = adapter.plan.on_grid
        # On the grid it has the base's types, even if the recipe names them.
        source = self.source if on_grid else source_of_merged(self.source, self.spec.merged_quantization)
        weight_type = backend.weight_type(source)
        if not adapter.plan.spec.merged or source is not self.source:
            description = f"{target} holds {adapter.plan.method} as a whole model, in {weight_type}"
            self.progress.say(f"  {adapter.name}: {description}, {source.path.stat().st_size / 1e6:.0f} MB")
        merged, out = self._fold(adapter, Merged.shape), self._folder(adapter) / backend.MODEL_FILE
        assert isinstance(merged, Merged)
        backend.write_merged(replace(merged, on_grid=on_grid), source, out)
        if not on_grid and weight_type == "f32":
            # What is stored in float32 was rounded to the types of the source's file before.
            weight_type = source.header.main_type.name
        values = backend.values_by_type(out)
        return WrittenAdapter(out, values, quantization=source.quantization, weight_type=weight_type)

    def _folded(self, adapter: TrainedAdapter, shape: str) -> Adapter:
        """The adapter in a shape to be a file of its own."""
        key = adapter.name, shape
        folded = self.folded.get(key) or self._fold(adapter, shape)
        assert not isinstance(folded, Merged)
        if any(self.needs_all.values()):
            self.folded[key] = folded
        return folded

    def _fold(self, adapter: TrainedAdapter, shape: str) -> Folded:
        assert self.source.model is not None
        folded = self.builder.fold(adapter, self.source.model, shape)
        if isinstance(folded, LowRank) and folded.error:
            ranks = sorted(delta.rank for delta in folded.modules.values())
            loss = f"leaves out {folded.error:.1%} of the trained change"
            self.progress.say(f"  {adapter.name}: rank {ranks[0]} to {ranks[-1]}, {loss}")
        return folded

    def _folder(self, adapter: TrainedAdapter) -> Path:
        return self.work / "adapters" / adapter.name


def _steps(
    adapters: Sequence[TrainedAdapter], basis: Floats | None, spec: BundleSpec, progress: Progress
) -> list[Complete]:
    """What adds to a bundle what the runtime computes from its files: each step opens what the earlier ones made."""
    return [
        partial(with_golden, adapters=adapters, progress=progress),
        partial(with_scopes, adapters=adapters, basis=basis, progress=progress),
        partial(with_confidence, adapters=adapters, progress=progress),
        partial(_without_folds, adapters=adapters),
        partial(_with_states_and_card, spec=spec, progress=progress),
    ]


def _without_folds(bundle: Path, manifest: Manifest, *, adapters: Sequence[TrainedAdapter]) -> Manifest:
    """The manifest without the adapters that do not ship, whose files this deletes."""
    folds = {f"adapters/{adapter.name}": adapter.name for adapter in adapters if adapter.fold_of is not None}
    for folder in folds:
        shutil.rmtree(bundle / folder)
    entries = {name: entry for name, entry in manifest.adapters.items() if name not in folds.values()}
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith((*(f"{f}/" for f in folds),))}
    return replace(manifest, adapters=entries, files=files)


def _with_states_and_card(bundle: Path, manifest: Manifest, *, spec: BundleSpec, progress: Progress) -> Manifest:
    if spec.ships_states:
        _make_states(bundle, manifest.base.files, progress)
    (bundle / CARD_NAME).write_text(card(facts_of(bundle, manifest)), encoding="utf-8")
    return manifest


def _make_states(bundle: Path, engines: Iterable[str], progress: Progress) -> None:
    """Compute the states of the fixed prompts with the runtime, and add them to the bundle."""
    for engine in engines:
        options: dict[str, Any] = {"cache_mb": 0, "disk_mb": sys.maxsize / 1e6, "cache_folder": bundle / STATES_FOLDER}
        with Runtime.open(bundle, engine=engine, verify=False, preflight=False, contexts=1, **options) as runtime:
            tokens = runtime.warm()
        states = ", ".join(f"{name} ({count} tokens)" for name, count in tokens.items())
        progress.say(f"  {engine}: {f'states of {states}' if states else 'no prompt is long enough for a state'}")
    # The runtime keeps its own states private, and whoever may read a bundle needs these.
    folder = bundle / STATES_FOLDER
    if folder.is_dir():
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path == folder else 0o644)

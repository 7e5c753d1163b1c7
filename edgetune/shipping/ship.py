"""A base and trained PEFT folders in, a checked bundle out: fold, export, parity, pack.

What comes before, whether `edgetune build` trained the adapters or someone else did, makes no difference here.
"""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune_devices.fit import kv_bytes_per_token
from edgetune_export import backends
from edgetune_export.adapters.shapes import Adapter, Folded, LowRank, Merged, Prefix
from edgetune_export.backends.base import Source, Weights
from edgetune_export.merged import source_of_merged
from edgetune_export.pack import pack
from edgetune_export.parity import Parity
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import STATES_FOLDER, AdapterEntry, BaseEntry, Manifest
from edgetune_runtime.formats.gguf_file import describe_quantization, digest_of_chat_template, digest_of_tokenizer
from edgetune_runtime.threads import machine

from edgetune import bases, methods
from edgetune.bases import Base, base_context_length
from edgetune.progress import Progress
from edgetune.targets import shapes_in
from edgetune.training.allocator import give_back_freed_memory

from .verify import ExportedFormat, FormatParity, TrainedAdapter, WrittenAdapter, compare_bases, verify

_LARGE_BYTES = 50_000_000
"""Of a base's file: what is freed is worth looking for."""


@dataclass(frozen=True)
class BundleSpec:
    """What a bundle is to be: its name and defaults, the formats to write, and the recipe that it keeps."""

    name: str
    context_length: int
    threads: int | None = None
    targets: tuple[str, ...] = (backends.DEFAULT,)
    weights: Weights = field(default_factory=Weights)
    quantize_merged: str | None = None
    ships_states: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShippedAdapter:
    """What is in the bundle for an adapter: its manifest entry, bytes of its files, and parity by backend."""

    entry: AdapterEntry
    bytes: int
    parity: Mapping[str, Parity]


def ship(
    base: Base, adapters: Sequence[TrainedAdapter], work: Path, out: Path, *, wanted: BundleSpec, progress: Progress
) -> dict[str, ShippedAdapter]:
    """Export `adapters`, compare each with what was trained, and pack the bundle `out`; `work` is overwritten.

    Raises VerificationError that names the adapter when one does not say what was trained, and what fold, the backend
    and pack raise. Nothing is left under `out` unless all is right.
    """
    import torch  # noqa: PLC0415 - only where something is exported

    shutil.rmtree(work, ignore_errors=True)
    # A training has just let go of the base; two of them need not be there at once.
    _give_back(base)
    model = bases.load_torch(base, torch.float32, mapped=_file_to_map(base, wanted, work / "way", progress))
    source = Source(base.path, base.fingerprint, model, work / "way", wanted.weights)
    shapes = {a.name: shapes_in(wanted.targets, a.method, a.options, merged=a.merged) for a in adapters}
    stage = _Stage(work, source, adapters, shapes, wanted.quantize_merged, progress)
    exports = []
    for target in wanted.targets:
        progress.say(f"writing {target}")
        exports.append(stage.export(target))
        _give_back(base)
    progress.say("checking that the bundle says what was trained")
    checked = verify(base, model, adapters, exports, progress)
    parity = {target: asdict(found.base) for target, found in checked.items()}
    # What follows holds two engines beside each other.
    stage.source = replace(source, model=None)
    del model, source
    _give_back(base)
    for other in exports[1:]:
        parity[f"{exports[0].backend}/{other.backend}"] = asdict(compare_bases(exports[0], other, adapters, progress))
    shipped = stage.shipped(exports, checked)
    manifest = Manifest(
        name=wanted.name,
        base=replace(_base_entry(base, {e.backend: stage.name_of(e.base) for e in exports}), parity=parity),
        adapters={name: item.entry for name, item in shipped.items()},
        files={},
        context_length=wanted.context_length,
        threads=wanted.threads,
        recipe=wanted.recipe,
        versions=_versions(wanted.targets),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if wanted.ships_states:
        _make_states(work, manifest, progress)
    pack(work, out, manifest)
    shutil.rmtree(work, ignore_errors=True)
    return shipped


def _file_to_map(base: Base, wanted: BundleSpec, folder: Path, progress: Progress) -> Path | None:
    """Where the base's weights in float32 are to lie on the disk, as memory is short; None where it is not."""
    weights_mb, free_mb = base.header.parameters * 4 / 1e6, machine.free_mb()
    needed_mb = max(
        backends.format_of(target).export_mb(weights_mb, wanted.weights.scheme) for target in wanted.targets
    )
    if free_mb is None or free_mb >= needed_mb:
        return None
    progress.say(f"mapping the base's weights from the disk, as {free_mb:,.0f} MB of memory are free")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "weights.f32"


def _give_back(base: Base) -> None:
    """Free what refers to itself, as modules of models and graphs do, and give it back to the system."""
    # A third of a second, which a small base is not worth.
    if base.path.stat().st_size > _LARGE_BYTES:
        gc.collect()
        give_back_freed_memory()


@dataclass
class _Stage:
    """The folder in which a bundle is put together, and what goes into it."""

    work: Path
    source: Source
    adapters: Sequence[TrainedAdapter]
    shapes: Mapping[str, Mapping[str, str]]
    quantize_merged: str | None
    progress: Progress

    def __post_init__(self) -> None:
        """Fold what lies beside the base; merged models are folded when they are written."""
        self.folded: dict[tuple[str, str], Adapter] = {}
        for adapter in self.adapters:
            for shape in dict.fromkeys(self.shapes[adapter.name].values()):
                if shape != Merged.shape:
                    folded = self._fold(adapter, shape)
                    assert not isinstance(folded, Merged)
                    self.folded[adapter.name, shape] = folded

    def export(self, target: str) -> ExportedFormat:
        """Write the base and all adapters in one format."""
        backend = backends.load(target)
        shapes = {adapter.name: self.shapes[adapter.name][target] for adapter in self.adapters}
        beside = {name: self.folded[name, shape] for name, shape in shapes.items() if shape != Merged.shape}
        base = backend.write_base(self.source, self.work / "base", list(beside.values()))
        written = {}
        for adapter in self.adapters:
            if shapes[adapter.name] == Merged.shape:
                written[adapter.name] = self._write_merged(target, adapter)
            else:
                written[adapter.name] = self._write(target, beside[adapter.name], adapter, base)
        return ExportedFormat(target, base, written, backend.quantization(self.source))

    def shipped(
        self, exports: Sequence[ExportedFormat], checked: Mapping[str, FormatParity]
    ) -> dict[str, ShippedAdapter]:
        """What the manifest says of each adapter."""
        shipped: dict[str, ShippedAdapter] = {}
        for adapter in self.adapters:
            found = {target: of.adapters[adapter.name] for target, of in checked.items()}
            folded = [item for (name, _), item in self.folded.items() if name == adapter.name]
            written = {export.backend: export.adapters[adapter.name] for export in exports}
            entry = AdapterEntry(
                name=adapter.name,
                method=adapter.method,
                shapes={target: item.shape for target, item in written.items()},
                files={target: self.name_of(item.file) for target, item in written.items()},
                base_fingerprint=self.source.fingerprint,
                ranks={m: d.rank for item in folded if isinstance(item, LowRank) for m, d in item.modules.items()},
                error=max(item.error for item in written.values()),
                prefix_tokens=max(item.prefix_tokens for item in written.values()),
                invocation=next((item.invocation for item in written.values()), ()),
                scale=adapter.scale,
                system=adapter.system,
                metric=adapter.metric,
                labels=adapter.labels,
                parity={target: asdict(figures) for target, figures in found.items()},
                training=adapter.training,
            )
            size = sum(path.stat().st_size for path in self._folder(adapter).rglob("*") if path.is_file())
            shipped[adapter.name] = ShippedAdapter(entry, size, found)
        return shipped

    def name_of(self, path: Path) -> str:
        """The name in the bundle of a staged file."""
        return path.relative_to(self.work).as_posix()

    def _write(self, target: str, folded: Adapter, adapter: TrainedAdapter, base: Path) -> WrittenAdapter:
        backend = backends.load(target)
        out = self._folder(adapter) / backend.ADAPTER_FILE
        dtype = adapter.dtype_in(target)
        backend.write_adapter(folded, base, out, dtype=dtype, base_fingerprint=self.source.fingerprint)
        if isinstance(folded, LowRank):
            return WrittenAdapter(out, folded.shape, folded.error, folded.invocation)
        return WrittenAdapter(out, folded.shape, prefix_tokens=folded.tokens if isinstance(folded, Prefix) else 0)

    def _write_merged(self, target: str, adapter: TrainedAdapter) -> WrittenAdapter:
        backend = backends.load(target)
        source = source_of_merged(self.source, self.quantize_merged)
        quantization = backend.quantization(source)
        if not adapter.merged or source is not self.source:
            what = f"{target} holds {adapter.method} as a whole model, in {quantization}"
            self.progress.say(f"  {adapter.name}: {what}, {source.path.stat().st_size / 1e6:.0f} MB")
        merged, out = self._fold(adapter, Merged.shape), self._folder(adapter) / backend.MODEL_FILE
        assert isinstance(merged, Merged)
        backend.write_merged(merged, source, out)
        return WrittenAdapter(out, Merged.shape, quantization=quantization)

    def _fold(self, adapter: TrainedAdapter, shape: str) -> Folded:
        assert self.source.model is not None
        return methods.load(adapter.method).fold(adapter.checkpoint(self.source.model), shape)

    def _folder(self, adapter: TrainedAdapter) -> Path:
        return self.work / "adapters" / adapter.name


def _make_states(stage: Path, manifest: Manifest, progress: Progress) -> None:
    """Let the runtime answer once from a bundle of the staged files, and stage the states of the fixed prompts."""
    bundle = pack(stage, stage.with_name(f"{stage.name}-without-states"), manifest)
    for engine in manifest.base.files:
        options: dict[str, Any] = {"cache_mb": 0, "disk_mb": sys.maxsize / 1e6, "cache_folder": stage / STATES_FOLDER}
        with Runtime.open(bundle, engine=engine, verify=False, contexts=1, **options) as runtime:
            tokens = runtime.warm()
        progress.say(f"  {engine}: states of {', '.join(f'{name} ({count} tokens)' for name, count in tokens.items())}")
    shutil.rmtree(bundle)


def _base_entry(base: Base, files: Mapping[str, str]) -> BaseEntry:
    metadata, arch = base.header.metadata, base.header.architecture
    return BaseEntry(
        name=base.name if "/" not in base.name else Path(base.name).name,
        fingerprint=base.fingerprint,
        architecture=arch,
        quantization=describe_quantization(base.header),
        parameters=base.header.parameters,
        context_length=base_context_length(base.header),
        layers=int(metadata[f"{arch}.block_count"]),
        kv_bytes_per_token=kv_bytes_per_token(base.header),
        tokenizer_sha256=digest_of_tokenizer(base.header),
        chat_template_sha256=digest_of_chat_template(base.header),
        files=files,
        domain=base.domain,
    )


def _versions(targets: Sequence[str]) -> dict[str, str]:
    # Every base is quantized and tokenized by llama.cpp.
    names = ["edgetune", "edgetune-runtime", "llama-cpp-python", "torch", "transformers", "peft"]
    names += [package for target in targets for package in backends.format_of(target).packages]
    return {name: importlib.metadata.version(name) for name in names}

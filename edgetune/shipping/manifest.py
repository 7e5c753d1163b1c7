"""Makes the manifest of a bundle; `pack` adds the digests of its files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgetune_export.adapters.shapes import Adapter, LowRank
from edgetune_runtime.bundle import AdapterEntry, BaseEntry, Manifest

from .exported import BundleSpec, Checked, ExportedFormat, TrainedAdapter

_PACKAGES = ("edgetune", "edgetune-runtime", "torch", "transformers", "peft")


def manifest_of(
    wanted: BundleSpec,
    base: BaseEntry,
    adapters: Mapping[str, AdapterEntry],
    packages: Iterable[str],
    *,
    task: str,
) -> Manifest:
    """The manifest of a bundle, with the versions of `packages` and of the packages of every build."""
    return Manifest(
        name=wanted.name,
        base=base,
        adapters=adapters,
        files={},
        context_length=wanted.context_length,
        threads=wanted.threads,
        recipe=wanted.recipe,
        versions={name: importlib.metadata.version(name) for name in (*_PACKAGES, *packages)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task,
        warms=wanted.warms,
    )


def adapter_entry(
    adapter: TrainedAdapter,
    folded: Iterable[Adapter],
    exports: Sequence[ExportedFormat],
    checked: Checked,
    *,
    fingerprint: str,
    stage: Path,
    draft: Path | None = None,
) -> AdapterEntry:
    """The entry of an adapter whose files are in `stage`; `folded` are its shapes, except a merged model."""
    written = {export.backend: export.adapters[adapter.name] for export in exports}
    return AdapterEntry(
        name=adapter.name,
        method=adapter.method,
        shapes={target: item.shape for target, item in written.items()},
        files={target: item.file.relative_to(stage).as_posix() for target, item in written.items()},
        base_fingerprint=fingerprint,
        ranks={m: d.rank for item in folded if isinstance(item, LowRank) for m, d in item.modules.items()},
        error=max(item.error for item in written.values()),
        prefix_tokens=max(item.prefix_tokens for item in written.values()),
        invocation=next((item.invocation for item in written.values()), ()),
        scale=adapter.scale,
        system=adapter.system,
        metric=adapter.metric,
        labels=adapter.labels,
        output=None if adapter.output is None else adapter.output.to_json(),
        draft=None if draft is None else draft.relative_to(stage).as_posix(),
        quantization=next((item.quantization for item in written.values() if item.quantization), None),
        values_by_type={target: item.values_by_type for target, item in written.items()},
        parity={target: found[adapter.name] for target, found in checked.adapters.items()},
        training=adapter.training,
    )

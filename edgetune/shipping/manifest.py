"""Makes the manifest of a bundle; `pack` adds the digests of its files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry, BaseEntry, Manifest, RouterEntry

from .exported import BundleSpec, ExportedFormat, ParityReport, TrainedAdapter

_PACKAGES = ("edgetune", "edgetune-runtime", "torch", "transformers", "peft")


def manifest_of(
    spec: BundleSpec,
    base: BaseEntry,
    adapters: Mapping[str, AdapterEntry],
    packages: Iterable[str],
    *,
    task: str,
    router: RouterEntry | None,
) -> Manifest:
    """The manifest of a bundle, with the versions of `packages` and of the packages of every build."""
    return Manifest(
        name=spec.name,
        base=base,
        adapters=adapters,
        files={},
        context_length=spec.context_length,
        threads=spec.threads,
        recipe=spec.recipe,
        versions={name: importlib.metadata.version(name) for name in (*_PACKAGES, *packages)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task,
        warms=spec.warms,
        router=router,
        plan=spec.plan,
    )


def adapter_entry(
    adapter: TrainedAdapter,
    exports: Sequence[ExportedFormat],
    parity: ParityReport,
    *,
    fingerprint: str,
    stage: Path,
    draft: Path | None,
) -> AdapterEntry:
    """The entry of an adapter whose files are in `stage`."""
    plan, written = adapter.plan, {export.backend: export.adapters[adapter.name] for export in exports}
    return AdapterEntry(
        name=plan.name,
        method=plan.method,
        shapes=plan.shapes,
        files={target: item.file.relative_to(stage).as_posix() for target, item in written.items()},
        base_fingerprint=fingerprint,
        modules_by_rank=dict(next((item.modules_by_rank for item in written.values() if item.modules_by_rank), {})),
        error=max(item.error for item in written.values()),
        prefix_tokens=max(item.prefix_tokens for item in written.values()),
        invocation=next((item.invocation for item in written.values()), ()),
        scale=plan.spec.scale,
        system=plan.spec.system,
        metric=plan.metric,
        labels=plan.labels,
        output=None if plan.output is None else plan.output.to_json(),
        draft=None if draft is None else draft.relative_to(stage).as_posix(),
        quantization=next((item.quantization for item in written.values() if item.quantization), None),
        values_by_type={target: item.values_by_type for target, item in written.items()},
        parity={target: figures.get(adapter.name, {}) for target, figures in parity.adapters.items()},
        unsure=plan.spec.unsure_rule,
        training=adapter.training,
    )

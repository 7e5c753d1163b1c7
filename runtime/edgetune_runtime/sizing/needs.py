"""The memory that a bundle needs, part by part."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime import engines
from edgetune_runtime.bundle import bytes_of_model, read_manifest, resolve
from edgetune_runtime.engines.needs import MB, Needs, adapter_size
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.quantization import TENSOR_TYPES

SERVER_MB = 12.0
"""Resident memory that `edgetune-run serve` adds: uvicorn, starlette and connections."""
_HOT_LIBRARY_MB = 12.0
"""The part of the libraries that is used all the time: what stayed in memory within a limit that was too small."""
_EMBEDDING = "embedding beside the repacked output head"
_PER_LAYER = "embedding for the inputs of each layer"
_ANGLES = "angles of positions"
_RUNTIME = "runtime (Python and libraries)"


@dataclass(frozen=True)
class Item:
    """One part of the memory needed; of it, `droppable_mb` are mapped files that are rarely read again."""

    name: str
    mb: float
    droppable_mb: float = 0.0


def items_of(needs: Needs, *, repacks: Collection[str]) -> list[Item]:
    """The parts of the memory needed; `repacks` are the processor's `repacked_types`, none if the file is mapped."""
    repacked = {needs.main_type, needs.head_type} <= {*repacks} and TENSOR_TYPES[needs.main_type].repacked
    adapters_mb = sum(size.file_bytes for size in needs.adapters.values()) / MB
    adapters = [(f"adapter {name}", size.file_bytes) for name, size in needs.adapters.items()]
    if adapters_mb > needs.adapters_mb:
        adapters = [(f"adapters in memory, of {adapters_mb:.0f} MB", int(needs.adapters_mb * MB))]
    # One adapter is in use, and each token reads it.
    unused = sorted((size.file_bytes, name) for name, size in needs.adapters.items() if size.is_mapped)[:-1]
    droppable_mb = {
        **{f"adapter {name}": size / MB for size, name in unused},
        _RUNTIME: needs.cost.libraries_mb - _HOT_LIBRARY_MB,
        _EMBEDDING: needs.head_bytes / MB if needs.cost.maps_embedding else 0.0,
        _PER_LAYER: needs.per_layer_bytes / MB,
        _ANGLES: needs.angle_bytes / MB,
    }
    parts = [
        ("base weights", needs.base_bytes - needs.per_layer_bytes - needs.angle_bytes),
        (_PER_LAYER, needs.per_layer_bytes),
        (_ANGLES, needs.angle_bytes),
        (_EMBEDDING, needs.head_bytes if repacked or needs.cost.maps_embedding else 0),
        *adapters,
        *((f"merged model {name}", size + needs.engine_bytes) for name, size in needs.merged.items()),
        (f"keys and values of {needs.context_length} tokens", needs.kv_bytes_per_token * needs.context_length),
        ("recurrent states", needs.recurrent_bytes),
        ("saved states", needs.state_bytes),
        ("draft tables", needs.draft_bytes),
        ("computing", needs.compute_bytes),
        ("vocabulary", needs.vocabulary_bytes),
        ("constraints on answers", needs.constraint_bytes),
        (_RUNTIME, needs.cost.runtime_mb * MB),
        ("server", SERVER_MB * MB if needs.serves else 0),
    ]
    return [Item(name, size / MB, droppable_mb.get(name, 0.0)) for name, size in parts if size]


def needed_mb(needs: Needs, *, repacks: Collection[str]) -> float:
    """The sum of all parts."""
    return sum(item.mb for item in items_of(needs, repacks=repacks))


def kept_mb(needs: Needs, *, repacks: Collection[str]) -> float:
    """What `kept_of` counts of all parts."""
    return kept_of(items_of(needs, repacks=repacks))


def kept_of(items: Iterable[Item]) -> float:
    """The sum without what the system can drop, in MB: with less memory, the bundle cannot run at full speed."""
    return sum(item.mb - item.droppable_mb for item in items)


def needs_of_bundle(bundle: Path, *, context_length: int | None = None, engine: str | None = None) -> Needs:
    """The needs of a bundle, from its manifest and the header of its base; weights are not read.

    `engine` defaults to the first one that the bundle has files for. IncompatibleError if it has none for it, and the
    errors of `read_manifest` and of reading the base's header.
    """
    manifest = read_manifest(bundle)
    with_needs = engines.names_with_needs()
    choices = [name for name in manifest.base.files if name in with_needs]
    if not choices or (engine is not None and engine not in choices):
        expected = engine or " or ".join(with_needs)
        message = f"bundle {manifest.name!r} has no {expected} base"
        remedy = f"use one of: {', '.join(choices)}" if choices else f"build it with targets: [{expected}]"
        raise IncompatibleError(message, remedy)
    engine = engine or choices[0]
    path = resolve(bundle, manifest.base.files[engine])
    engine_needs, entries = engines.load_needs(engine), manifest.adapters.values()
    base = engine_needs.needs_of_base(path, manifest, context_length or manifest.context_length)
    merged = [entry for entry in entries if entry.is_merged(engine)]
    return replace(
        base,
        adapters={entry.name: adapter_size(manifest, entry, engine) for entry in entries if entry not in merged},
        merged={entry.name: bytes_of_model(manifest.files, entry.files[engine]) for entry in merged},
        draft_bytes=sum(manifest.files[entry.draft].bytes for entry in entries if entry.draft),
        constrained=any(entry.output for entry in entries),
    )

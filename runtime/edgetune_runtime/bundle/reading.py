"""Reads the manifest of a bundle, and checks what it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, VerificationError, parsing
from edgetune_runtime.type_checks import FINITE, dataclass_of
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, printable, shortened

from .files import bundle_path
from .records import (
    AUTHOR_NAME,
    BASE,
    CLASSIFY,
    ERROR,
    GENERATE,
    MOST_AUTHORS,
    ROUTER_WORDS,
    SCHEMA_VERSION,
    SHAPES,
    TASKS,
    AdapterEntry,
    BaseEntry,
    ConfidenceCurve,
    FileEntry,
    GoldenAnswer,
    Manifest,
    RoutedCall,
    RouterEntry,
    Scope,
    UnsureRule,
)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`, read from `path`, without parts; errors as those of `read_manifest` for a wrong one."""
    with parsing(f"{path} is not JSON", COPY_BUNDLE_AGAIN):
        raw = FINITE.decode(data.decode("utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
        raise VerificationError(f"{path} has no schema number", COPY_BUNDLE_AGAIN)
    if raw["schema"] != SCHEMA_VERSION:
        message = f"{path} has schema {raw['schema']}, this runtime reads {SCHEMA_VERSION}"
        remedy = "build the bundle again" if raw["schema"] < SCHEMA_VERSION else "update edgetune-runtime"
        raise VerificationError(message, remedy)
    manifest = _parse(raw, path)
    check(manifest, path)
    return manifest


def check(manifest: Manifest, path: Path) -> None:
    """Raise what is wrong with a manifest that was read from `path`: its names, or what they refer to."""
    _check_names(manifest, path)
    _check_references(manifest, path)


def _parse(raw: Mapping[str, Any], path: Path) -> Manifest:
    with parsing(f"{path} is not a manifest", COPY_BUNDLE_AGAIN):
        adapters = {name: parse_adapter(value) for name, value in raw["adapters"].items()}
        files = {name: dataclass_of(FileEntry, value) for name, value in raw["files"].items()}
        base = dataclass_of(BaseEntry, raw["base"])
        router = None if raw.get("router") is None else _router(raw["router"])
        return dataclass_of(Manifest, {**raw, "base": base, "adapters": adapters, "files": files, "router": router})


def parse_adapter(raw: Mapping[str, Any]) -> AdapterEntry:
    """The entry of an adapter; KeyError, TypeError, AttributeError or ValueError for a wrong one."""
    golden = {backend: dataclass_of(GoldenAnswer, value) for backend, value in raw.get("golden", {}).items()}
    scope = {backend: dataclass_of(Scope, value) for backend, value in raw.get("scope", {}).items()}
    curves = {
        backend: {kind: dataclass_of(ConfidenceCurve, curve) for kind, curve in kinds.items()}
        for backend, kinds in raw.get("confidence", {}).items()
    }
    unsure = None if raw.get("unsure") is None else dataclass_of(UnsureRule, raw["unsure"])
    ranks = {int(rank): int(count) for rank, count in raw.get("modules_by_rank", {}).items()}
    if any(number < 1 for number in (*ranks, *ranks.values())):
        raise ValueError(f"modules_by_rank is {ranks}")
    parsed = {"golden": golden, "scope": scope, "confidence": curves, "unsure": unsure, "modules_by_rank": ranks}
    return dataclass_of(AdapterEntry, {**raw, **parsed})


def _router(raw: Mapping[str, Any]) -> RouterEntry:
    calls = {call: dataclass_of(RoutedCall, value) for call, value in raw["calls"].items()}
    return dataclass_of(RouterEntry, {**raw, "calls": calls})


def _check_names(manifest: Manifest, path: Path) -> None:
    """Names reach terminals, logs and paths, so they have no control characters."""
    base, adapters = manifest.base, manifest.adapters
    names = [manifest.name, base.name, base.architecture, *base.files, *manifest.files, *adapters]
    for adapter in adapters.values():
        names += [adapter.name, adapter.method, adapter.metric, *adapter.files]
    granted = [name for name in manifest.authors if not re.fullmatch(AUTHOR_NAME, name)]
    if granted or sum(map(len, manifest.authors.values())) > MOST_AUTHORS:
        message = f"{path} has {len(manifest.authors)} adapters with authors, such as {shortened(str(granted))}"
        raise VerificationError(message, "do not use this bundle")
    text = "".join(names)
    if text != printable(text):
        name = next(name for name in names if name != printable(name))
        message = f"{path} has the name {name[:80]!r}, with characters that control a terminal"
        raise VerificationError(message, "do not use this bundle")


def _check_references(manifest: Manifest, path: Path) -> None:
    named = [*manifest.base.files.values(), *(f for a in manifest.adapters.values() for f in a.files.values())]
    named += [file for adapter in manifest.adapters.values() for file in adapter.shared_files]
    named += [] if manifest.router is None else [manifest.router.file]
    with parsing(f"{path} is refused", "do not use this bundle"):
        for name in {*manifest.files, *named}:
            bundle_path(name)
    for name in named:
        if name not in manifest.files:
            raise VerificationError(f"{path} has no digest for {name!r}", COPY_BUNDLE_AGAIN)
    if manifest.task not in TASKS:
        raise VerificationError(f"{path} has the unknown task {manifest.task!r}", "update edgetune-runtime")
    for name, adapter in manifest.adapters.items():
        if adapter.name != name:
            message = f"{path} has adapter {adapter.name!r} under the name {name!r}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        unknown = [shape for shape in adapter.shapes.values() if shape not in SHAPES]
        if unknown or adapter.shapes.keys() != adapter.files.keys():
            message = f"adapter {adapter.name!r} has unknown shapes {unknown}, or a file without a shape"
            raise VerificationError(message, "update edgetune-runtime")
        if not all(_is_possible(curve) for kinds in adapter.confidence.values() for curve in kinds.values()):
            raise VerificationError(f"adapter {name!r} has an impossible confidence curve", COPY_BUNDLE_AGAIN)
        if "" in adapter.labels or len({*adapter.labels}) < len(adapter.labels):
            raise VerificationError(f"adapter {name!r} has an empty label, or one twice", COPY_BUNDLE_AGAIN)
        if adapter.base_fingerprint != manifest.base.fingerprint:
            message = f"adapter {adapter.name!r} was made for another base than the one in bundle {manifest.name!r}"
            raise IncompatibleError(message, "build the bundle again")
    if manifest.router is not None:
        _check_router(manifest.router, manifest.adapters, path)


def _is_possible(curve: ConfidenceCurve) -> bool:
    return 0 <= curve.rows < 1 << 31 and 0 <= curve.right <= 1


def _check_router(router: RouterEntry, adapters: Mapping[str, AdapterEntry], path: Path) -> None:
    """The router names adapters of the bundle, and leaves no doubt who answers."""
    calls = router.calls.values()
    problems = [f"the call {call!r}" for call in router.calls if call not in (GENERATE, CLASSIFY)]
    problems += [f"the adapter {name!r}" for call in calls for name in call.adapters if name not in adapters]
    problems += [f"the threshold {call.threshold}" for call in calls if not 0 < call.threshold < 1]
    problems += [f"below: {router.below!r}"] if router.below not in (BASE, ERROR, *adapters) else []
    problems += [f"an adapter called {name!r}" for name in ROUTER_WORDS if name in adapters]
    problems += [] if all(call.adapters for call in calls) else ["no adapters to choose from"]
    if problems:
        raise VerificationError(f"{path} has a router with {problems[0]}", "build the bundle again")

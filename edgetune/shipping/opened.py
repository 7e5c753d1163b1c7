"""Opens a bundle that is being built, for what is computed from its answers: golden answers, scopes and confidence."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Unpack

from edgetune_export.adapters.shapes import Merged
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest
from edgetune_runtime.inference.opening_options import RuntimeOptions


def opened(
    bundle: Path, manifest: Manifest, adapters: Collection[str], **options: Unpack[RuntimeOptions]
) -> Iterator[tuple[str, str, Runtime]]:
    """Each format with each of these adapters, and a runtime for both; `options` are those of `Runtime.open`."""
    merged = {engine: _merged(manifest, engine, adapters) for engine in manifest.base.files}
    for engine, alone in merged.items():
        # Each merged model alone, because it stays in memory.
        for names in ([name for name in adapters if name not in alone], *([name] for name in alone)):
            options.update({"engine": engine, "verify": False, "preflight": False, "disk_mb": 0})
            with Runtime.open(bundle, **options) as runtime:
                for name in names:
                    yield engine, name, runtime


def _merged(manifest: Manifest, engine: str, adapters: Collection[str]) -> list[str]:
    return [name for name in adapters if manifest.adapters[name].shapes[engine] == Merged.shape]

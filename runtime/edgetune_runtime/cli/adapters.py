"""`edgetune-run adapters`: lists the adapters of a bundle on disk, adds and removes them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgetune_runtime.bundle import Manifest, bytes_of_model, read_manifest
from edgetune_runtime.wording import first_of, printable

from .options import open_runtime


def list_adapters(options: argparse.Namespace) -> None:
    """`adapters ls`: the adapters with their methods, shapes and sizes; reads the manifest alone."""
    manifest = read_manifest(options.bundle)
    rows = [_row(manifest, name) for name in manifest.adapters]
    if options.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        shapes = " and ".join(dict.fromkeys(row["shapes"].values()))
        sizes = ", ".join(f"{engine} {size / 1e6:.1f} MB" for engine, size in row["bytes"].items())
        print("\t".join(map(printable, (row["name"], row["method"], shapes, sizes))))


def add(options: argparse.Namespace) -> None:
    """`adapters add`: copy an adapter of another bundle on the same base into a bundle."""
    from edgetune_runtime.inference.bundle_files import add_to_bundle  # noqa: PLC0415 - it imports numpy

    def check(name: str) -> None:
        with open_runtime(options, contexts=1, disk_mb=0) as runtime:
            runtime.add_adapter(options.source, name)

    entry = add_to_bundle(options.bundle, options.source, options.adapter, check)
    print(json.dumps({"added": entry.name}) if options.json else f"added {printable(entry.name)} to {options.bundle}")


def remove(options: argparse.Namespace) -> None:
    """`adapters remove`: remove an adapter from a bundle, and its files."""
    from edgetune_runtime.inference.bundle_files import remove_from_bundle  # noqa: PLC0415 - as above

    name, had_router = options.name, read_manifest(options.bundle).router is not None
    manifest = remove_from_bundle(options.bundle, name)
    rules = {other: entry.unsure for other, entry in manifest.adapters.items()}
    others = [other for other, rule in rules.items() if rule is not None and rule.then == name]
    is_lost = had_router and manifest.router is None
    if options.json:
        print(json.dumps({"removed": name, "only_marked": others, "is_router_removed": is_lost}))
        return
    marked = f"; unsure answers of {first_of(others, separator=', ')} are only marked from now on" if others else ""
    lost = "; the router, which chose it, is removed too: a build makes another" if is_lost else ""
    print(f"removed {printable(name)} from {options.bundle}{marked}{lost}")


def _row(manifest: Manifest, name: str) -> dict[str, Any]:
    entry = manifest.adapters[name]
    sizes = {engine: bytes_of_model(manifest.files, file) for engine, file in entry.files.items()}
    return {"name": name, "method": entry.method, "shapes": dict(entry.shapes), "bytes": sizes}

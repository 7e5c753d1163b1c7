"""The commands about this machine: saved states, benchmark, and doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.bundle import CLASSIFICATION, MARK, Manifest, read_manifest, verify_files
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError
from edgetune_runtime.formats.quantization import repacked_types
from edgetune_runtime.wording import printable

from .options import open_runtime

if TYPE_CHECKING:
    from edgetune_runtime.inference.runtime import Runtime
    from edgetune_runtime.states.store import StateStore


def list_states(options: argparse.Namespace) -> None:
    """`cache ls`: the states on disk, most recently used first."""
    store = _store(options)
    entries = store.entries()
    if options.json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        print(json.dumps(rows, ensure_ascii=False))
        return
    for entry in entries:
        print(f"{printable(entry.label)}\t{entry.tokens} tokens\t{entry.bytes / 1e6:.1f} MB\t{printable(entry.engine)}")
    print(
        f"{len(entries)} states, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB in {store.folder}",
        file=sys.stderr,
    )


def clear_states(options: argparse.Namespace) -> None:
    """`cache clear`: delete the states and past answers on disk."""
    from edgetune_runtime.decoding.past_answers import clear_all  # noqa: PLC0415 - not needed for --help

    store = _store(options)
    count, answers = store.clear(), clear_all(store.folder)
    result = {"deleted": count, "past_answers": answers}
    text = f"deleted {count} states, and the past answers of {answers} bundles, in {store.folder}"
    print(json.dumps(result) if options.json else text)


def _store(options: argparse.Namespace) -> StateStore:
    """The states on disk; OSError if their folder cannot be read."""
    from edgetune_runtime.states.store import StateStore, default_folder  # noqa: PLC0415 - as above

    folder = options.cache_folder or default_folder()
    with suppress(FileNotFoundError):
        # The store itself takes an unreadable folder for an empty one.
        next(Path(folder).iterdir(), None)
    return StateStore(folder, 0)


def bench(options: argparse.Namespace) -> None:
    """`bench`: measure the bundle on this machine."""
    from tempfile import TemporaryDirectory  # noqa: PLC0415 - as above

    from edgetune_runtime.sizing.bench import measure, restored_ms, start_ms  # noqa: PLC0415 - see open_runtime

    if (manifest := read_manifest(options.bundle)).task == CLASSIFICATION:
        message = f"bundle {manifest.name!r} only classifies text: it has no generation to measure"
        raise UsageError(message, "use classify")
    figures = measure(lambda: open_runtime(options, disk_mb=0), lambda text: print(f"{text} ...", file=sys.stderr))
    if figures["ttft_ms"] is not None:
        print("states on disk and process start ...", file=sys.stderr)
        with TemporaryDirectory() as folder:
            options.cache_folder = Path(folder)
            with open_runtime(options) as runtime:
                figures["ttft_ms"]["restored"] = restored_ms(runtime)
                name, engine = runtime.adapters[0], runtime.engine
            command = [sys.executable, "-m", "edgetune_runtime", "generate", str(options.bundle), "--no-preflight"]
            flags = {"prompt": "?", "adapter": name, "engine": engine, "max-tokens": 1}
            flags |= {"unsure": MARK, "cache-folder": folder}
            flags |= {name: value for name in ("threads", "kv") if (value := getattr(options, name)) is not None}
            command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            command += [] if options.repack is None else ["--repack" if options.repack else "--no-repack"]
            figures["start_ms"] = start_ms(command)
    print(json.dumps(figures) if options.json else "\n".join(_lines(figures)))


def doctor(options: argparse.Namespace) -> None:
    """`doctor`: examine the machine, and check the bundle if one is given."""
    from .doctor import examine  # noqa: PLC0415 - as above

    if options.bundle is None and (options.calibrate or options.calibration):
        raise UsageError("--calibrate and --calibration need a bundle", "give the bundle's folder")
    if options.calibrate is not None:
        _require_writable(options.calibrate)
    manifest = None if options.bundle is None else read_manifest(options.bundle)
    report = examine(manifest)
    if manifest is not None:
        _check(options, manifest, report)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    problems = report.pop("problems")
    print("\n".join(_lines(report)))
    print("\n".join(f"problem\t{problem}" for problem in problems) or "no problem found")


def _require_writable(path: Path) -> None:
    """UsageError unless a file can be written there, before minutes are spent on what it is to hold."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}", "give a file in a folder that you may write to")


def _check(options: argparse.Namespace, manifest: Manifest, report: dict[str, Any]) -> None:
    """Add the check of the bundle to `report`, and store the calibration."""
    from edgetune_runtime.sizing.bundle_check import check_bundle  # noqa: PLC0415 - as above
    from edgetune_runtime.sizing.calibration import read_calibration, write_calibration  # noqa: PLC0415
    from edgetune_runtime.sizing.needs import needs_of_bundle  # noqa: PLC0415
    from edgetune_runtime.sizing.options import with_options  # noqa: PLC0415

    needs = None
    if manifest.base.is_decoder:
        try:
            needs = needs_of_bundle(options.bundle, context_length=options.context_length, engine=options.engine)
            needs = with_options(needs, kv=options.kv, cache_mb=options.cache_mb, adapters_mb=options.adapters_mb)
        except EdgetuneError as error:
            if options.calibrate is not None:
                raise
            report["bundle"]["refused"] = str(error)
            report["problems"].append(f"refused: {error}")
            return
    calibration = None
    if options.calibration is not None and needs is not None:
        calibration = read_calibration(options.calibration, needs)
    repacks = frozenset() if options.repack is False else repacked_types(report["instructions"])

    def opened() -> Runtime:
        if not options.no_verify:
            verify_files(options.bundle, manifest)
        return open_runtime(options, disk_mb=0)

    check = check_bundle(opened, needs, calibration=calibration, repacks=repacks)
    report["bundle"] |= check.report
    report["problems"] += check.problems
    if options.calibrate is None:
        return
    if check.figures is None or needs is None:
        reason = check.report.get("refused") or "it is not a bundle for text generation"
        raise IncompatibleError(f"nothing to calibrate with: {reason}", "give a bundle that runs here")
    machine = {"processor": report["processor"], "board": report["board"], "threads": check.report["threads"]}
    write_calibration(options.calibrate, needs, check.figures, machine)
    report["calibration"] = str(options.calibrate)


def _lines(figures: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}\t{value:.1f}" if isinstance(value, float) else f"{prefix}{name}\t{value}"

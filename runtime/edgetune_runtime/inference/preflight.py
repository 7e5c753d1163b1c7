"""Opens an unknown bundle in a child process with limits before this process does: an abort becomes an error."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune_runtime import engines, errors
from edgetune_runtime.bundle import AdapterEntry, Manifest, NewAdapter, files_beside, files_of
from edgetune_runtime.errors import EdgetuneError, OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.processes.child_process import ProcessResult, has_python, run
from edgetune_runtime.processes.confinement import limits_of

from .opening_options import OpeningOptions

VARIABLE = "EDGETUNE_PREFLIGHT"
"""0 turns the check off for all processes that inherit it."""
FOLDER = "checked"
"""Folder in the cache folder with an empty file for each bundle that passed."""
STEP, ERROR, DONE = "step", "error", "done"
"""Keys of the lines that the child writes, each a JSON object."""
OPTIONS = ("engine", "threads", "context_length", "kv", "repack", "verify", "priority")
"""Options of opening that the child is given."""
_MAX_REMEMBERED = 1024
_MAX_OF_KIND = 8
"""Adapters of one kind that are tried: native code reads them alike, and a bundle may have a thousand."""
_CHARACTERS = 2000
# Files of the app's own folder must not replace modules, so the child has this process' path, and no other.
_START = f"import sys; sys.path[:] = sys.argv[1:]; from {__package__}.preflight_child import main; main()"
_REMEDY = "free some memory if it is short, or do not use this bundle"

_LOG = logging.getLogger(__name__)


def require_opens(bundle: Path, manifest: Manifest, options: OpeningOptions, added: NewAdapter | None = None) -> None:
    """Open the bundle in a child process, unless it is remembered in the cache folder that it passed; remember it.

    With `added`, this adapter is added there, and no other is tried. Raises the error of opening it, and
    VerificationError if the child crashes, hangs, or exceeds its limits. Logs a warning, and does nothing, if this
    process cannot start a Python.
    """
    if os.environ.get(VARIABLE) == "0":
        return
    digest = _digest_of(bundle, manifest, options, added)
    # An account without a home has no cache folder; the folder of another one cannot be read.
    with suppress(UsageError, OSError):
        if _marker_path(options.cache_folder, digest).exists():
            return
    begin = time.perf_counter()
    result = _run_child(bundle, manifest, options, added)
    if result is None:
        return
    report = _last_values(result.output)
    if isinstance(report.get(ERROR), dict):
        raise _error(report[ERROR])
    if STEP not in report:
        # Nothing of the bundle was read yet.
        _LOG.warning("cannot check %s in a child process: it %s (%s)", bundle, result.how, result.last_line)
        return
    if result.code or result.timeout_s is not None or DONE not in report:
        reason = f" ({result.last_line})" if result.last_line else ""
        message = f"bundle {bundle} cannot be opened safely: while {report[STEP]}, a child process {result.how}{reason}"
        raise VerificationError(message, _REMEDY)
    _LOG.info("checked %s in a child process in %.2f s", bundle, time.perf_counter() - begin)
    try:
        _remember(_marker_path(options.cache_folder, digest))
    except (UsageError, OSError, OutOfSpaceError) as error:
        _LOG.warning("cannot remember that a bundle was checked, so it is checked at each start: %s", error)


def _marker_path(cache_folder: str | Path | None, digest: str) -> Path:
    """The empty file that says that a bundle passed."""
    # It imports numpy, which the child must not do before it is confined.
    from edgetune_runtime.states.store import default_folder  # noqa: PLC0415

    return Path(cache_folder or default_folder()) / FOLDER / digest


def tried(manifest: Manifest, engine: str) -> list[AdapterEntry]:
    """The adapters to compute with: all merged ones, and some of each shape with the same ranks and types."""
    counts: Counter[object] = Counter()
    chosen = []
    for entry in manifest.adapters.values():
        types = entry.values_by_type.get(engine, {})
        kind = (entry.shapes.get(engine), tuple(sorted(entry.modules_by_rank)), tuple(sorted(types)))
        counts[kind] += 1
        if engine in entry.files and (entry.is_merged(engine) or counts[kind] <= _MAX_OF_KIND):
            chosen.append(entry)
    return chosen


def _digest_of(bundle: Path, manifest: Manifest, options: OpeningOptions, added: NewAdapter | None) -> str:
    """A digest of everything that determines what native code reads and does; the manifest has those of the files."""
    # Not imported, because the package imports everything.
    version = sys.modules[__name__.partition(".")[0]].__version__
    versions = (version, engines.load(options.engine, manifest.task).library_version(), platform.machine())
    opening = (options.engine, options.context_length, options.kv, options.repack)
    paths = {
        bundle / name: manifest.files[name] for name in files_beside(manifest, manifest.base.files[options.engine])
    }
    entries = tried(manifest, options.engine) if added is None else [added.entry]
    for entry in entries if added is None else ():
        paths |= {bundle / name: manifest.files[name] for name in files_of(manifest, entry)}
    if added is not None:
        paths |= {added.folder / name: file for name, file in added.files.items()}
    identity: list[object] = [versions, opening, asdict(manifest.base), [asdict(entry) for entry in entries]]
    identity += [file.sha256 for file in paths.values()]
    if not options.verify:
        # Then the files may be others than those of the manifest.
        states = [path.stat() for path in paths if path.exists()]
        identity += [(state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns) for state in states]
    return hashlib.sha256(json.dumps(identity, default=int).encode()).hexdigest()


def _run_child(
    bundle: Path, manifest: Manifest, options: OpeningOptions, added: NewAdapter | None
) -> ProcessResult | None:
    """How the child ended; None, with a warning in the log, if there is none."""
    if not has_python():
        return None
    limits = limits_of(manifest, options.context_length)
    request = {
        "bundle": str(bundle.absolute()),
        "engines": list(engines.__path__),
        "limits": asdict(limits),
        "options": {name: getattr(options, name) for name in OPTIONS},
        "added": None if added is None else (str(added.folder.absolute()), added.entry.name),
    }
    command = [sys.executable, "-I", "-B", "-c", _START, *sys.path]
    try:
        # Numbers may be numpy's.
        return run(command, timeout_s=limits.time_s, stdin=json.dumps(request, default=int).encode())
    except OSError as error:
        _LOG.warning("cannot check %s in a child process: %s", bundle, error)
        return None


def _last_values(output: bytes) -> dict[str, Any]:
    """The last values that the child wrote under each key."""
    values: dict[str, Any] = {}
    for line in output.splitlines():
        with suppress(ValueError, RecursionError, TypeError):
            values |= json.loads(line)
    return values


def _error(raw: Any) -> EdgetuneError:  # noqa: ANN401 - JSON
    """The error that the child had, which is as untrusted as the bundle."""
    name, message, remedy = (str(raw.get(key))[:_CHARACTERS] for key in ("name", "message", "remedy"))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, EdgetuneError):
        return kind(message, remedy)
    return EdgetuneError(message, remedy)


def _remember(passed: Path) -> None:
    """Create the file, and delete the oldest ones."""
    for folder in (passed.parents[1], passed.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(passed) as temporary:
        temporary.touch(mode=0o600)
    others = sorted(passed.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_MAX_REMEMBERED:]:
        path.unlink(missing_ok=True)

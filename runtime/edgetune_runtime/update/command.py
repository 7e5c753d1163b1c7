"""`edgetune-run update`: look for a newer bundle in a signed repository, install it, and go back."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import BusyError, EdgetuneError, IncompatibleError, UsageError
from edgetune_runtime.formats.atomic import raising_disk_errors
from edgetune_runtime.processes.interrupts import end_in_order
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import write_for_all
from edgetune_runtime.wording import printable

from . import current

_DEFAULT = "device"
"""Name of the default prefix of a device on which no kit was installed."""
_SOURCE = ("repo", "bundle", "channel", "formats", "root", "report", "quota_mb")
"""The options that --check and --apply remember."""


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    actions = command.add_mutually_exclusive_group(required=True)
    for flag, text in (
        ("--check", "look for a newer bundle"),
        ("--apply", "install the newest bundle, and switch to it when it answers as built"),
        ("--status", "show what is installed and remembered"),
        ("--rollback", "switch back to the previous version, and skip the current release in later updates"),
        ("--mark-good", "acknowledge the current version, so that it is kept however often it is started"),
        ("--mark-bad", "the same as --rollback, for a program that watches the device"),
        ("--starting", "count a start of the current version; at the third one without an acknowledgement, go back"),
    ):
        actions.add_argument(flag, action="store_true", help=text)
    source = command.add_argument_group("where updates come from (remembered)")
    text = "the repository: an address, or a folder such as a USB stick"
    source.add_argument("--repo", metavar="URL", help=text)
    source.add_argument("--bundle", metavar="NAME", help="the bundle to follow (default: the only one)")
    source.add_argument("--channel", metavar="NAME", help="the channel to follow (default: stable)")
    text = "what to download, such as gguf or gguf,onnx (default, also if empty: as the installed version, or else all)"
    source.add_argument("--formats", metavar="A,B", help=text)
    text = "trust the repository with this root, the 1.root.json of `edgetune keys init`; needed once"
    source.add_argument("--root", type=Path, metavar="FILE", help=text)
    text = "report what this device runs after each --check and --apply, to an address or into a folder (default: off)"
    source.add_argument("--report", metavar="URL", help=text)
    text = "refuse an update if the files of all versions would exceed this size (default: 0, no limit)"
    source.add_argument("--quota-mb", type=float, metavar="MB", help=text)
    default = f"~/{versions.USER_FOLDER}/edgetune/{_DEFAULT}; for root {versions.ROOT_FOLDER}/{_DEFAULT}"
    text = f"where versions are installed (default: that of {versions.RUN_SCRIPT}, else {default})"
    command.add_argument("--prefix", type=versions.directory, metavar="DIR", help=text)


def run(options: argparse.Namespace) -> None:
    """Run the action that was asked for, and print what it did.

    OutOfSpaceError where the disk is full, IncompatibleError on Windows.
    """
    if sys.platform == "win32":
        raise IncompatibleError("updates need links and locks that Windows does not have", "copy the bundle instead")
    given = [name for name in _SOURCE if getattr(options, name) is not None]
    if given and not (options.check or options.apply):
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{flag} does nothing without --check or --apply", "add one of them, or leave it out")
    end_in_order()
    write_for_all()
    default = os.environ.get(versions.PREFIX_VARIABLE) or versions.default_prefix(_DEFAULT)
    prefix = (options.prefix or Path(default)).absolute()
    with raising_disk_errors(prefix):
        _act(prefix, options)


def _act(prefix: Path, options: argparse.Namespace) -> None:
    if options.check or options.apply:
        _update(prefix, options)
    elif options.status:
        _show_status(current.status(prefix, _say), options.json)
    elif options.starting:
        _show({"version": current.count_start(prefix, _say), **_where(prefix)}, options.json)
    elif options.mark_good:
        _show({"version": current.mark_good(prefix), **_where(prefix)}, options.json)
    else:
        reason = "it was marked as bad" if options.mark_bad else current.WENT_BACK
        version = current.roll_back(prefix, reason, _say)
        _show({"version": version, **_where(prefix)}, options.json)


def _update(prefix: Path, options: argparse.Namespace) -> None:
    from . import report, update  # noqa: PLC0415 - they import libraries of an extra, and of networks

    formats = None
    if options.formats is not None:
        formats = tuple(dict.fromkeys(name for word in options.formats.split(",") if (name := word.strip())))
    report_to = None if options.report is None else report.checked_address(options.report)
    if options.quota_mb is not None and not 0 <= options.quota_mb < math.inf:
        raise UsageError(f"--quota-mb is {options.quota_mb:g}", "give 0 or more")
    source = update.UpdateSource(
        options.repo, options.bundle, options.channel, options.root, formats, report_to, options.quota_mb
    )
    try:
        with raising_disk_errors(prefix):
            found = (update.check(prefix, source), False) if options.check else update.apply(prefix, source, _say)
    except BusyError:
        # Whoever is at work reports how that ended.
        raise
    except EdgetuneError as error:
        report.report(prefix, _say, error=error)
        raise
    newest, changed = found
    report.report(prefix, _say, newest)
    result = {} if options.check else {"available": False, "changed": changed, **_where(prefix)}
    _show({**newest.to_json(), **result}, options.json)


def _where(prefix: Path) -> dict[str, Any]:
    return {"path": str(prefix / versions.CURRENT / "bundle")}


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
        return
    print(printable(", ".join(f"{name} {value}" for name, value in values.items() if value is not None)))


def _show_status(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
        return
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            print(f"{name}\t{printable(json.dumps(item, ensure_ascii=False) if isinstance(item, dict) else str(item))}")


def _say(text: str) -> None:
    # An update goes on when nobody is there to read it.
    with suppress(OSError):
        print(f"edgetune-run: {printable(text)}", file=sys.stderr, flush=True)

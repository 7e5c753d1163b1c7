"""The command line of board.pyz."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from edgetune_runtime.errors import BusyError, NotFoundError, UsageError, error_to_report
from edgetune_runtime.processes.interrupts import end_in_order, end_on_interrupt
from edgetune_runtime.processes.streams import flush_output
from edgetune_runtime.store import service, systemd, versions
from edgetune_runtime.store.durable import write_for_all
from edgetune_runtime.store.kit import KIT_NAME, Kit, kit_text, parse_kit, read_kit
from edgetune_runtime.update import current
from edgetune_runtime.wording import printable

from . import check, install, uninstall
from .updates import updates_from_options

PROGRAM = "edgetune-board"
"""The program's name in front of messages."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{PROGRAM}: {message}; see --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 or the exit code of the error, which is printed to standard error in one line."""
    end_on_interrupt()
    end_in_order()
    write_for_all()
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    flush_output()
    reported = error_to_report(error, unexpected="report it")
    _say(" ".join(str(reported).split()))
    return reported.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(PROGRAM, description="Install an edgetune kit on this board, and switch between versions.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = _command(commands, "install", _install, "install a kit and switch to it when it answers as built")
    command.add_argument("kit", type=Path, metavar="KIT", help="the kit's folder")
    text = "run `edgetune-run serve` as a systemd unit: of the system for root, of the user for others"
    command.add_argument("--service", nargs="?", const="", metavar="NAME", help=text)
    text = "address that the unit listens on; one that other machines reach needs the key in PREFIX/keys"
    command.add_argument("--host", metavar="IP", help=f"{text} (default: as it was, or {service.LOOPBACK})")
    text = f"port of the unit (default: as it was, or the kit's, {service.PORT})"
    command.add_argument("--port", type=int, metavar="N", help=text)
    text = "update once a day from the signed repository at this address, by a systemd timer"
    command.add_argument("--updates", metavar="URL", help=text)
    text = "trust the repository of --updates with this root, the 1.root.json of `edgetune keys init`"
    command.add_argument("--root", type=Path, metavar="FILE", help=text)
    text = "of `edgetune deploy`: list the files that are missing, and read them from standard input"
    command.add_argument("--receive", metavar="VERSION", help=text)
    command = _command(commands, "check", _check, "show what this board has, and what keeps a kit from running on it")
    command.add_argument("--kit", type=Path, metavar="KIT", help="a kit's folder or its kit.json (default: this one)")
    _command(
        commands,
        "rollback",
        _rollback,
        "switch back to the previous version, and skip the current release in later updates",
    )
    _command(commands, "list", _list, "list the installed versions")
    _command(commands, "uninstall", _uninstall, "remove all versions and the unit")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's own
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    default = f"~/{versions.USER_FOLDER}/edgetune/NAME; for root {versions.ROOT_FOLDER}/NAME"
    text = f"where versions are installed (default: {default})"
    command.add_argument("--prefix", type=versions.directory, metavar="DIR", help=text)
    command.add_argument("--json", action="store_true", help="write JSON to standard output")
    command.set_defaults(run=run)
    return command


def _install(options: argparse.Namespace) -> None:
    kit = read_kit(options.kit)
    if options.receive not in (None, kit.version):
        raise BusyError("another deploy is sending a kit to this board", "wait until it ends")
    prefix = (options.prefix or versions.default_prefix(kit.name)).absolute()
    name = options.service or f"{service.NAME_START}{kit.name}"
    unit, updates = _unit(options, kit, name, prefix), updates_from_options(options.updates, options.root, name)
    if unit is not None or updates is not None:
        service.require_prefix(prefix)
    if updates is not None:
        updates.timer.require_own(prefix)
    changed = install.install(options.kit, prefix, unit=unit, say=_say, receives=options.receive is not None)
    if updates is not None:
        updates.set_up(prefix, kit.name, _say)
    warnings: list[str] = []
    if unit is not None:
        warnings = _linger_warnings(f"unit {unit.name}")
    elif updates is not None:
        warnings = _linger_warnings(f"timer {updates.timer.name}")
    if options.json:
        _print({"version": kit.version, "changed": changed, "warnings": warnings})
        return
    for warning in warnings:
        _say(warning)
    print(f"version {kit.version} {'is installed' if changed else 'was installed already'} in {prefix}")
    if unit is not None and unit.needs_key:
        print(f"clients need the key in {prefix / service.KEYS_NAME}")
    print(f"run: {prefix / versions.RUN_SCRIPT} info {prefix / versions.CURRENT / 'bundle'}")


def _unit(options: argparse.Namespace, kit: Kit, name: str, prefix: Path) -> service.Unit | None:
    """The unit to run, if any; without --host and --port, one of this name listens where it did."""
    if options.service is None:
        if options.host is not None or options.port is not None:
            raise UsageError("--host and --port are those of a unit", "add --service")
        return None
    before = service.installed(prefix, lambda _: None)
    host, port = service.LOOPBACK, kit.service["port"]
    if before is not None and before.name == name:
        host, port = before.host, before.port
    return service.unit_from_options(name, options.host or host, port if options.port is None else options.port)


def _linger_warnings(unit: str) -> list[str]:
    if os.geteuid() == 0 or systemd.lingers():
        return []
    remedy = f"run once: sudo loginctl enable-linger {systemd.user_name()}"
    return [f"{unit} ends when you log out, and does not start with the board; {remedy}"]


def _check(options: argparse.Namespace) -> None:
    path = options.kit or _own_folder()
    if not path.exists():
        raise NotFoundError(f"there is no {path}", "give the folder of a kit, or its kit.json")
    kit = parse_kit(kit_text(path / KIT_NAME if path.is_dir() else path))
    prefix = options.prefix or versions.default_prefix(kit.name)
    facts = check.examine(prefix)
    problems = list(check.problems(kit, facts, disk_mb=install.mb_to_write(kit, prefix)))
    if options.json:
        _print({**facts.to_json(), "problems": [{"message": item.message, "remedy": item.remedy} for item in problems]})
        return
    for name, value in facts.to_json().items():
        print(f"{name}\t{' '.join(value) if isinstance(value, tuple) else value}")
    for item in problems:
        print(f"problem\t{item.message}; {item.remedy}")
    if problems:
        raise problems[0]


def _rollback(options: argparse.Namespace) -> None:
    prefix = _prefix(options)
    versions.require_installed(prefix)
    version = current.roll_back(prefix, current.WENT_BACK, _say)
    if options.json:
        _print({"version": version})
    else:
        print(f"version {version} is the current one now")


def _list(options: argparse.Namespace) -> None:
    installed = versions.listing(_prefix(options), _say)
    if options.json:
        _print([item.to_json() for item in installed])
        return
    for item in installed:
        print(f"{item.kit.version}\t{item.state or '-'}\t{item.kit.name}\t{', '.join(item.kit.engines)}")


def _uninstall(options: argparse.Namespace) -> None:
    prefix = _prefix(options)
    uninstall.uninstall(prefix, _say)
    if not options.json:
        print(f"removed all versions from {prefix}")


def _prefix(options: argparse.Namespace) -> Path:
    """--prefix, or the one that this program lies in, or the default of the kit that it lies in."""
    if options.prefix is not None:
        return Path(options.prefix).absolute()
    folder = _own_folder()
    if folder.parent.name == versions.FOLDER:
        return folder.parents[1]
    if not (folder / KIT_NAME).is_file():
        raise UsageError("no --prefix is given", "give the folder of the install")
    return versions.default_prefix(read_kit(folder).name)


def _own_folder() -> Path:
    """The folder of the kit or of the version that this program lies in."""
    return Path(sys.argv[0]).resolve().parent


def _say(text: str) -> None:
    # Nobody may be there to read it: an install goes on when the connection of a deploy is lost.
    with suppress(OSError):
        print(f"{PROGRAM}: {printable(text)}", file=sys.stderr, flush=True)


def _print(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))

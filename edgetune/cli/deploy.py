"""`edgetune deploy BUNDLE USER@HOST`: install a bundle on boards over ssh, go back, and list versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import EdgetuneError, UsageError

from .arguments import AsJson, BundlePath, CacheMb, ContextLength, Engine, Kv, Quiet, print_json, refuse_given

if TYPE_CHECKING:
    from edgetune.delivery.deploy.deploy import Outcome
    from edgetune.delivery.deploy.target import Target

# Options by the groups in --help.
fleet_option = partial(typer.Option, rich_help_panel="Several boards")
board_option = partial(typer.Option, rich_help_panel="On the board")


def deploy(
    bundle: BundlePath,
    host: Annotated[
        str | None,
        typer.Argument(
            metavar="HOST", help="The board as USER@HOST or USER@HOST:PORT, as ssh knows it.", show_default=False
        ),
    ] = None,
    *,
    goes_back: Annotated[bool, typer.Option("--rollback", help="Switch back to the previous version.")] = False,
    lists: Annotated[bool, typer.Option("--list", help="List the versions on the board.")] = False,
    wait_healthy: Annotated[
        bool,
        board_option("--wait-healthy", help="Fail if the board has no unit (an install waits until its unit answers)."),
    ] = False,
    service: Annotated[
        str | None, board_option(metavar="NAME", help="Run `edgetune-run serve` as the systemd unit NAME.")
    ] = None,
    listen: Annotated[
        str | None,
        board_option(
            metavar="IP",
            help="With --service: address that the unit listens on (default: as it was, or 127.0.0.1, for the board "
            "alone); 0.0.0.0 for all, with a key.",
        ),
    ] = None,
    port: Annotated[
        int | None, board_option(metavar="N", help="With --service: its port (default: as it was, or 8080).")
    ] = None,
    updates: Annotated[
        str | None,
        board_option(metavar="URL", help="Update once a day from the signed repository at this address, by a timer."),
    ] = None,
    root: Annotated[
        Path | None,
        board_option(metavar="FILE", help="With --updates: trust this root, the 1.root.json of `edgetune keys init`."),
    ] = None,
    prefix: Annotated[
        str | None,
        board_option(
            metavar="DIR",
            help="Folder on the board (default: ~/.local/share/edgetune/NAME; for root /opt/edgetune/NAME).",
        ),
    ] = None,
    board: Annotated[
        str | None,
        board_option(
            metavar="NAME",
            help="The board: see `edgetune devices list`, or a board file (default: what it says of itself).",
        ),
    ] = None,
    engine: Engine = None,
    context_length: ContextLength = None,
    kv: Kv = None,
    cache_mb: CacheMb = None,
    inventory: Annotated[
        Path | None, fleet_option(metavar="FILE", help="Boards, one USER@HOST[:PORT] per line.")
    ] = None,
    parallel: Annotated[int, fleet_option(metavar="N", min=1, help="Boards at a time.")] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Install a bundle on boards over ssh.

    Sends only what a board lacks, resumes after a lost connection, and switches to the new version when its answers are
    right; the previous version stays for --rollback. Uses your ssh configuration, agent and known hosts; never asks for
    a password.
    """
    from edgetune_devices import boards
    from edgetune_runtime.bundle import read_manifest
    from edgetune_runtime.store.opening import Opening

    from edgetune.common.progress import Progress
    from edgetune.delivery.board.updates import repository_from_options
    from edgetune.delivery.deploy import deploy as actions
    from edgetune.delivery.deploy.fleet import on_each
    from edgetune.delivery.deploy.target import parse_target, read_inventory
    from edgetune.delivery.kit.make import KitOptions, assembler

    if (host is None) == (inventory is None):
        raise UsageError("give one board, or several with --inventory", "see edgetune deploy --help")
    if goes_back and lists:
        raise UsageError("--rollback and --list are given together", "give one of them")
    if prefix is not None and not (prefix.startswith("/") and prefix.isprintable()):
        raise UsageError(f"--prefix {prefix!r} is not an absolute path", "write for example /opt/edgetune/home")
    installing = {
        **{"--wait-healthy": wait_healthy, "--service": service, "--listen": listen, "--port": port},
        **{"--updates": updates, "--root": root, "--board": board, "--engine": engine},
        **{"--context-length": context_length, "--kv": kv, "--cache-mb": cache_mb},
    }
    if goes_back or lists:
        refuse_given(installing, f"with {'--rollback' if goes_back else '--list'}", "leave it out")
    if service is None and (listen is not None or port is not None):
        raise UsageError("--listen and --port are those of a unit", "add --service NAME")
    repository = repository_from_options(updates, root)
    if board is not None:
        boards.find(board)
    where = actions.Where(read_manifest(bundle).name, prefix)
    targets = [parse_target(host)] if host is not None else read_inventory(inventory or Path())
    act: Callable[[Target], Outcome]
    if goes_back:
        act = partial(actions.roll_back, where=where)
    elif lists:
        act = partial(actions.list_versions, where=where)
    else:
        kit_options = KitOptions(engine=engine, opening=Opening(context_length, kv, cache_mb))
        assemble = assembler(bundle, kit_options, Progress(quiet=quiet))
        # Boards of an inventory have one line each.
        progress = Progress(quiet=quiet or inventory is not None)
        unit = None if service is None else actions.UnitOptions(service, listen, port)
        options = actions.DeployOptions(board, unit, repository, waits_healthy=wait_healthy)
        act = partial(actions.deploy, where=where, assemble=assemble, options=options, progress=progress)
    if host is not None:
        _print(act(targets[0]), as_json=as_json)
        return
    failures = _print_each(on_each(targets, parallel, act), as_json=as_json)
    if failures:
        raise EdgetuneError("\n".join([f"{len(failures)} of {len(targets)} boards failed", *failures]))


def _print_each(outcomes: Iterable[Outcome], *, as_json: bool) -> list[str]:
    """Print each outcome as it comes; returns the boards that failed, with their errors."""
    from edgetune.delivery.deploy.fleet import Failed

    failures = []
    for outcome in outcomes:
        _print(outcome, as_json=as_json)
        if isinstance(outcome, Failed):
            failures.append(f"{outcome.target}: {outcome.error}")
    return failures


def _print(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print_json(outcome.to_json())
    else:
        print(outcome, flush=True)

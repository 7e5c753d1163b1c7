"""`edgetune fleet status REPO`: what devices run, from their reports."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer
from edgetune_runtime.wording import printable

from .arguments import AsJson, print_json
from .grouped_help import GroupedCommand
from .tables import print_table

app = typer.Typer(help="Show which releases devices run.", no_args_is_help=True)
_SHOWN = 20


@app.callback()
def _group() -> None:
    """The group stays one with a single command."""


@app.command(cls=GroupedCommand)
def status(
    repo: Annotated[Path, typer.Argument(metavar="REPO", help="The repository's folder, with a folder reports.")],
    *,
    silent_days: Annotated[
        float, typer.Option(metavar="N", min=0, max=36_500, help="Days without a report until a device is silent.")
    ] = 7,
    as_json: AsJson = False,
) -> None:
    """Count the devices by release, from the reports that `edgetune-run update --report` has written.

    Devices report only if their users want that. The errors of those that fail are shown.
    """
    from edgetune.delivery.publish.reports import ReleaseCount, fleet_status

    fleet = fleet_status(repo, silent_days)
    if as_json:
        print_json(fleet.to_json())
        return
    titles = [field.name for field in fields(ReleaseCount)]
    rows = [[str(value) for value in asdict(count).values()] for count in fleet.releases]
    print_table([title.replace("_", " ") for title in titles], rows, texts=("name", "channel"))
    for report in fleet.failing[:_SHOWN]:
        print(printable(f"{report.device} has release {report.release}: {report.error}"))
    if len(fleet.failing) > _SHOWN:
        print(f"and {len(fleet.failing) - _SHOWN} more that fail; see --json")
    if fleet.damaged:
        print(f"{fleet.damaged} reports are damaged")

"""The `edgetune` command: exit codes, errors in one line, and the list of commands."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Annotated

import typer
from edgetune_runtime.processes.interrupts import end_on_interrupt, interrupt_on_termination
from edgetune_runtime.processes.streams import flush_output, prepare_streams

from edgetune.common.failure import PROGRAM, fail

from . import data, devices, fleet, keys
from .arguments import print_json
from .augment import augment
from .bases import bases
from .build import build, export
from .compare import compare
from .deploy import deploy
from .evaluate import evaluate
from .grouped_help import GroupedCommand, GroupedGroup
from .imatrix import imatrix
from .init import init
from .kit import kit
from .learn import learn
from .methods import methods
from .oci import pull, push
from .plan import plan
from .publish import publish
from .rebase import rebase
from .report import report
from .wheel import wheel

# Set by the script of --install-completion when a shell asks for completions.
COMPLETION_VARIABLE = "_EDGETUNE_COMPLETE"
app = typer.Typer(
    help="Train one small adapter per task on a shared quantized base, and pack them for a small board.",
    no_args_is_help=True,
    cls=GroupedGroup,
    rich_markup_mode=None,
)
# It takes a tenth of a second.
_command_of = cache(typer.main.get_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; an error is printed as one line on standard error."""
    end_on_interrupt()
    interrupt_on_termination()
    prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    command = _command_of(app)
    if COMPLETION_VARIABLE in os.environ:
        command(prog_name=PROGRAM)  # prints completions and exits
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                # Deprecation warnings of libraries are of no use to someone who runs a command.
                warnings.simplefilter("ignore")
            # Not command.main(): it exits the process, with its own codes.
            with command.make_context(PROGRAM, [word for word in words if word != "--debug"]) as context:
                command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        flush_output()  # the reader closed the pipe
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return fail(error)
    return 0


def _print_version(*, requested: bool) -> None:
    if requested:
        print(f"{PROGRAM} {version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Print a traceback on errors; allowed anywhere in a command.")
    ] = False,
) -> None:
    """Options of all commands; `main` removes --debug before parsing."""


def schema() -> None:
    """Print the JSON schema of recipes for editors."""
    from edgetune.recipe.json_schema import json_schema

    print_json(json_schema(), indent=2)


# By the titles of the groups in --help.
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Recipe commands": (init, plan, augment, imatrix, bases, methods, schema),
    "Bundle commands": (build, learn, rebase, export, report, deploy, kit, publish, push, pull, wheel),
    "Measurement commands": (evaluate, compare),
}
for _title, _commands in COMMANDS.items():
    for _command in _commands:
        app.command(cls=GroupedCommand, rich_help_panel=_title)(_command)
app.command("validate", cls=GroupedCommand, hidden=True)(plan)
app.add_typer(data.app, name="data", rich_help_panel="Recipe commands")
app.add_typer(keys.app, name="keys", rich_help_panel="Bundle commands")
app.add_typer(fleet.app, name="fleet", rich_help_panel="Bundle commands")
app.add_typer(devices.app, name="devices", rich_help_panel="Measurement commands")

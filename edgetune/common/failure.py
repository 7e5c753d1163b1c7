"""Turns errors into one line on standard error and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer
from edgetune_runtime.errors import CancelledError, EdgetuneError, UsageError, error_to_report
from edgetune_runtime.processes.streams import flush_output
from edgetune_runtime.wording import printable

PROGRAM = "edgetune"
# The base class of all command-line errors; Typer exports only this subclass.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[1]
_EXPECTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than_equal": "a number of at most {le:g}",
}
"""What an option needs, by the kind of pydantic's error."""


def fail(error: BaseException) -> int:
    """Print an error as one line on standard error and return its exit code."""
    flush_output()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return UsageError.exit_code
    reported = _reported(error)
    # Several problems of one file are one line each.
    for line in str(reported).splitlines():
        print(f"{PROGRAM}: {printable(line)}", file=sys.stderr)
    return reported.exit_code


def _reported(error: BaseException) -> EdgetuneError:
    """The error to report to the user for `error`."""
    if isinstance(error, typer.Abort):
        return CancelledError("interrupted")
    return _wrong_command_line(error) if isinstance(error, _CommandLineError) else error_to_report(error)


def _wrong_command_line(error: Any) -> EdgetuneError:  # noqa: ANN401 - see _CommandLineError
    where = error.ctx.command_path if error.ctx is not None else PROGRAM
    number = _wrong_number(error)
    if number is not None:
        return UsageError(number, f"see {where} --help")
    message, suggested, near = " ".join(error.format_message().split()).rstrip(".").partition(". Did you mean ")
    remedy = f"did you mean {near} See {where} --help" if suggested else f"see {where} --help"
    return UsageError(f"{message[:1].lower()}{message[1:]}", remedy)


def _wrong_number(error: Any) -> str | None:  # noqa: ANN401 - see _CommandLineError
    """What is wrong with the number of an option; None for other errors. Typer's own text leaves out the value."""
    from pydantic import ValidationError  # noqa: PLC0415 - slow to import, and rarely needed

    cause = error.__cause__
    problem = cause.errors()[0] if isinstance(cause, ValidationError) else None
    if problem is None or problem["type"] not in _EXPECTED:
        return None
    expected = _EXPECTED[problem["type"]].format(**problem.get("ctx", {}))
    return f"{max(error.param.opts, key=len)} is {problem['input']!r}, not {expected}"

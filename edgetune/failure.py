"""Errors in, one line for the user on standard error and an exit code out."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from edgetune_runtime.errors import CancelledError, EdgetuneError, OutOfSpaceError, UsageError

PROGRAM = "edgetune"
# The class of all errors of a command line; Typer names only this child of it in public.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[1]


def drop_output() -> None:
    """Write what is still to come nowhere: Python flushes at exit, and would complain of what is known already."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: BaseException) -> int:
    """Tell the user of an error, in one line on standard error, and return the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return UsageError.exit_code
    told = _told(error)
    # Several problems of one file come as several lines, each of which stands alone.
    for line in str(told).splitlines():
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    return told.exit_code


def _told(error: BaseException) -> EdgetuneError:
    """What the user is told about an error."""
    full = next((cause for cause in _causes(error) if _is_full_disk(cause)), None)
    if full is not None and not isinstance(error, OutOfSpaceError):
        place = getattr(full, "filename", None) or "to the disk"
        return OutOfSpaceError(f"no space left to write {place}", "free some space and run it again")
    if isinstance(error, EdgetuneError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return CancelledError("interrupted")
    if isinstance(error, _CommandLineError):
        return _wrong_command_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return UsageError(f"{error.filename}: {error.strerror}", "check the path and its permissions")
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return EdgetuneError(f"unexpected {what}", "run again with --debug and report it")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    # safetensors and llama.cpp's converter tell it in their text alone.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _wrong_command_line(error: Any) -> EdgetuneError:  # noqa: ANN401 - see _CommandLineError
    where = error.ctx.command_path if error.ctx is not None else PROGRAM
    message = " ".join(error.format_message().split()).rstrip(".").replace(". Did you mean", "; did you mean")
    return UsageError(f"{message[:1].lower()}{message[1:]}", f"see {where} --help")

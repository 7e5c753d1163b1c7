"""All errors of edgetune with their exit codes. Each says in one line what is wrong, with the value, and what to do.

EdgetuneError                1
├── UsageError               2   a recipe, an option or an argument is wrong
│   └── PromptTooLongError   2   a prompt does not fit in the context
├── NotFoundError            3   a file, an adapter, a base or a board does not exist
├── VerificationError        4   a file is damaged, or the export does not match the trained model
├── IncompatibleError        5   valid parts that do not fit together, or that this machine cannot run
│   └── MissingLibraryError  5   a library is not installed, or cannot be loaded
├── OutOfSpaceError          6   a disk is full
├── BusyError                7   too many calls are already waiting, or the machine has no time for one
├── UnreachableError         8   another machine cannot be reached, or the connection was lost
├── UnsureError              9   the confidence of an answer is lower than asked for
└── CancelledError         130   the user interrupted
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .wording import printable, shortened

_NO_THREAD = "can't start new thread"
"""The text of Python's RuntimeError."""
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors for a full disk, a used up quota, and a file that is larger than the limit."""
_FULL = re.compile(rf"{re.escape(os.strerror(errno.ENOSPC))}|\d+ requested and \d+ written")
"""How safetensors and llama.cpp's converter report a full disk, and NumPy a file that it cannot write to its end."""


class EdgetuneError(Exception):
    """Base class of all errors that edgetune raises on purpose.

    `message` names the wrong value, `remedy` says what to do; `str()` gives both in one line, or a line for each of
    several problems. Control characters become spaces, as values may come from hostile files.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = _lines(message)
        self.remedy = _lines(remedy)
        super().__init__(f"{self.message}; {self.remedy}" if remedy else self.message)


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class UsageError(EdgetuneError):
    """A recipe, an option, an argument or a data row is wrong."""

    exit_code = 2


class PromptTooLongError(UsageError):
    """A prompt has more tokens than fit in the context."""


class NotFoundError(EdgetuneError):
    """A file, an adapter, a base or a board does not exist."""

    exit_code = 3


class VerificationError(EdgetuneError):
    """A file is damaged, or the export does not match the trained model."""

    exit_code = 4


class IncompatibleError(EdgetuneError):
    """Valid parts do not fit together: an adapter of another base, a model too big for a board, a missing engine."""

    exit_code = 5


class MissingLibraryError(IncompatibleError):
    """A library that is needed is not installed, or cannot be loaded."""


class OutOfSpaceError(EdgetuneError):
    """A disk has no space for the file to be written."""

    exit_code = 6


class BusyError(EdgetuneError):
    """Too many calls are already waiting for a context, or the machine is too busy to prepare one."""

    exit_code = 7


class UnreachableError(EdgetuneError):
    """A board, a repository or a package index cannot be reached, or the connection was lost."""

    exit_code = 8


class UnsureError(EdgetuneError):
    """The confidence of an answer is lower than asked for; `answer` is that answer."""

    exit_code = 9

    def __init__(self, message: str, remedy: str = "", answer: object = None) -> None:
        super().__init__(message, remedy)
        self.answer = answer


class CancelledError(EdgetuneError):
    """The user interrupted the work."""

    exit_code = 130


@contextmanager
def importing(need: str, install: str) -> Iterator[None]:
    """Turn what imports in the block raise into a MissingLibraryError: `need` (such as "serving needs"), and why.

    `install` is what pip installs for it.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        name = ((error.name if isinstance(error, ModuleNotFoundError) else None) or "").partition(".")[0]
        if name and find_spec(name) is None:
            message, remedy = f"{need} {name}, which is not installed", f"run: pip install {install}"
        else:
            # An old library lacks a name or a submodule; native code may need another system.
            message = f"{need} a library that cannot be loaded: {shortened(str(error))}"
            remedy = f"run: pip install --upgrade {install}"
        raise MissingLibraryError(message, remedy) from error


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Say in the errors of the block what they are about, such as "adapter 'command'"; a missing library is about none.

    Their types stay as they are.
    """
    try:
        yield
    except MissingLibraryError:
        raise
    except EdgetuneError as error:
        raise type(error)(f"{subject}: {error.message}", error.remedy) from error


@contextmanager
def parsing(problem: str, remedy: str) -> Iterator[None]:
    """Turn what Python raises at values that a block does not expect into a VerificationError: `problem`, and why."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise VerificationError(f"{problem}: {shortened(str(error))}", remedy) from error


def error_to_report(
    error: BaseException, *, unexpected: str = "run the command again with --debug and report it"
) -> EdgetuneError:
    """What a command reports to the user for `error`; `unexpected` is the remedy for one that should not happen."""
    full = next((cause for cause in _causes(error) if _is_out_of_space(cause)), None)
    if full is not None and not isinstance(error, OutOfSpaceError):
        place = getattr(full, "filename", None) or "to the disk"
        return OutOfSpaceError(f"no space left to write {place}", "free some space and run the command again")
    if isinstance(error, EdgetuneError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return CancelledError(str(error) or "interrupted")
    if isinstance(error, OSError) and error.filename is not None:
        return UsageError(f"{error.filename}: {error.strerror}", "check the path and its permissions")
    if isinstance(error, MemoryError) or _NO_THREAD in str(error):
        remedy = "free some memory, or raise the limits of this process (ulimit -v and -u)"
        return EdgetuneError("the system gives this process no more memory or threads", remedy)
    description = " ".join(f"{type(error).__name__}: {error}".split())
    return EdgetuneError(f"unexpected {description}", unexpected)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # An error that is raised again after one that it caused is a cause of itself.
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _is_out_of_space(error: BaseException) -> bool:
    number = error.errno if isinstance(error, OSError) else None
    return number in OUT_OF_SPACE or _FULL.search(str(error)) is not None

"""The error tree of edgetune: what went wrong, with the value and the remedy in one line, and the exit code it ends in.

EdgetuneError                1
├── UsageError               2   a recipe, an option or an argument is wrong
├── NotFoundError            3   a file, an adapter, a base or a board does not exist
├── VerificationError        4   a file is damaged, or what was exported does not say what was trained
├── IncompatibleError        5   sound parts that do not fit together, or that this machine cannot run
├── OutOfSpaceError          6   a disk is full
├── BusyError                7   too many calls wait already
└── CancelledError         130   the user interrupted
"""

from __future__ import annotations


class EdgetuneError(Exception):
    """Base of all errors that edgetune raises on purpose.

    `message` names the value at fault, `remedy` says what to do about it; `str()` joins both in one line.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}" if remedy else message)


class UsageError(EdgetuneError):
    """A recipe, an option, an argument or a data row is wrong."""

    exit_code = 2


class NotFoundError(EdgetuneError):
    """Something that was named does not exist."""

    exit_code = 3


class VerificationError(EdgetuneError):
    """A file is damaged, or an exported model does not agree with the trained one."""

    exit_code = 4


class IncompatibleError(EdgetuneError):
    """Sound parts that do not fit together: an adapter of another base, a model too big for a board, no engine."""

    exit_code = 5


class OutOfSpaceError(EdgetuneError):
    """A disk has no room for what has to be written."""

    exit_code = 6


class BusyError(EdgetuneError):
    """More calls wait for a context than may."""

    exit_code = 7


class CancelledError(EdgetuneError):
    """The user interrupted the work."""

    exit_code = 130

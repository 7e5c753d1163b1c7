"""What an attack on a server is: a name, the point of the list of known attacks that it belongs to, and a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.hostile_server import Reply, Target

Replies = Sequence[Reply]
WRONG = "wrong: "
"""The beginning of a status that an attack gives to what must not happen, beside the targets of all attacks."""
OPEN_FILES = 1024
"""Open files of a server if an attack does not need fewer."""


@dataclass(frozen=True)
class Attack:
    """One attack: `run` makes its requests; `options` and `open_files` are for its server."""

    name: str
    item: str
    does: str
    run: Callable[[Target], Replies]
    options: Sequence[str] = ()
    open_files: int = OPEN_FILES

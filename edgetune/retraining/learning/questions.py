"""Asks which unsure answers of a log were right: in the terminal, or in a file that the user completes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from edgetune_runtime.answer_log.log import LoggedAnswer, line_of

from edgetune.common.files import write_file

SKIP, QUIT = "s", "q"
HELP = f"Enter: the answer is right; {SKIP}: skip; {QUIT}: quit; or type the right answer."


def most_informative(entries: Sequence[LoggedAnswer], count: int) -> list[LoggedAnswer]:
    """Up to `count` answers that nobody corrected, to different prompts: wrong ones, and then the least sure, first."""
    open_ = [entry for entry in entries if entry.correction is None]
    corrected = {_key(entry) for entry in entries if entry.correction is not None}
    ordered = sorted(open_, key=_doubtlessness)
    first = {_key(entry): entry for entry in reversed(ordered) if _key(entry) not in corrected}
    return list(reversed(first.values()))[:count]


def ask(entries: Sequence[LoggedAnswer], read: Callable[[str], str]) -> Iterator[LoggedAnswer]:
    """The answers that the user corrects or confirms, by the line that `read` returns to a question; "" ends it."""
    for number, entry in enumerate(entries, 1):
        sure = "" if entry.confidence is None else f" ({entry.confidence:.0%} sure)"
        sure += ", marked as wrong" if entry.is_wrong else ""
        head = f"\n{number} of {len(entries)}, {entry.adapter}{sure}\n  asked     {entry.messages[-1]['content']}"
        line = read(f"{head}\n  answered  {entry.answer}\nright? ")
        reply = line.strip()
        if not line or reply == QUIT:
            return
        if reply != SKIP:
            yield entry.with_correction(reply or None)


def logged(entries: Iterable[LoggedAnswer], log: Path) -> Iterator[LoggedAnswer]:
    """The answers, each once it is written to the end of a log, so that none has to be asked again."""
    for entry in entries:
        with log.open("a", encoding="utf-8", errors="replace") as file:
            file.write(line_of(entry))
        yield entry


def write_questions(entries: Sequence[LoggedAnswer], path: Path) -> None:
    """Write the answers as a log, to be completed with their corrections."""
    write_file(path, "".join(map(line_of, entries)).encode(errors="replace"))


def _doubtlessness(entry: LoggedAnswer) -> tuple[bool, float]:
    return not entry.is_wrong, math.inf if entry.confidence is None else entry.confidence


def _key(entry: LoggedAnswer) -> tuple[str | None, str]:
    return entry.adapter, json.dumps([dict(message) for message in entry.messages])

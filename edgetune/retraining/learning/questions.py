"""Asks which unsure answers of a log were right: in the terminal, or in a file that the user completes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from edgetune_runtime.answer_log.answers import LoggedAnswer, line_of
from edgetune_runtime.answer_log.log import append_lines
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.routing.router import last_user_text
from edgetune_runtime.wording import printable

from edgetune.common.files import write_file

SKIP, QUIT = "s", "q"
HELP = f"Enter: the answer is right; {SKIP}: skip; {QUIT}: quit; or type the right answer."


def most_informative(entries: Sequence[LoggedAnswer], count: int) -> list[LoggedAnswer]:
    """Up to `count` answers that nobody corrected, to different prompts: wrong ones, and then the least sure, first."""
    corrected = {_key(entry) for entry in entries if entry.correction is not None}
    first: dict[tuple[str | None, str], LoggedAnswer] = {}
    for entry in sorted(entries, key=_doubtlessness):
        if _key(entry) not in corrected:
            first.setdefault(_key(entry), entry)
    return list(first.values())[:count]


def ask(entries: Sequence[LoggedAnswer], read: Callable[[str], str]) -> Iterator[LoggedAnswer]:
    """The answers that the user corrects or confirms, by the line that `read` returns to a question; "" ends it.

    What cannot be a correction is asked again, with the reason.
    """
    for number, entry in enumerate(entries, 1):
        sure = "" if entry.confidence is None else f" ({entry.confidence:.0%} sure)"
        sure += ", marked as wrong" if entry.is_wrong else ""
        head = f"\n{number} of {len(entries)}, {entry.adapter}{sure}\n  asked     {printable(_asked(entry))}"
        question = f"{head}\n  answered  {printable(entry.answer)}\nright? "
        reply = _reply(entry, question, read)
        if reply is None:
            return
        if reply is not entry:
            yield reply


def _reply(entry: LoggedAnswer, question: str, read: Callable[[str], str]) -> LoggedAnswer | None:
    """The corrected answer, the answer itself if it is skipped, and None at the end."""
    while True:
        line = read(question)
        text = line.strip()
        if not line or text == QUIT:
            return None
        try:
            return entry if text == SKIP else entry.with_correction(text or None)
        except UsageError as error:
            question = f"{error}\nright? "


def _asked(entry: LoggedAnswer) -> str:
    """What the user said last, which results of tools may follow."""
    return last_user_text(list(entry.messages)) or str(entry.messages[-1]["content"])


def logged(entries: Iterable[LoggedAnswer], log: Path) -> Iterator[LoggedAnswer]:
    """The answers, each once it is written to the end of a log, so that none has to be asked again."""
    for entry in entries:
        append_lines(log, line_of(entry))
        yield entry


def write_questions(entries: Sequence[LoggedAnswer], path: Path) -> None:
    """Write the answers as a log, to be completed with their corrections."""
    write_file(path, "".join(map(line_of, entries)).encode(errors="replace"), is_private=True)


def _doubtlessness(entry: LoggedAnswer) -> tuple[bool, float]:
    return not entry.is_wrong, math.inf if entry.confidence is None else entry.confidence


def _key(entry: LoggedAnswer) -> tuple[str | None, str]:
    return entry.adapter, json.dumps([entry.messages, entry.tools])

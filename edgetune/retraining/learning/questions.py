"""Asks which unsure answers of a log were right: in the terminal, or in a file that the user completes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import cast

from edgetune_runtime.answer_log.answers import LoggedAnswer, line_of
from edgetune_runtime.answer_log.log import append_lines
from edgetune_runtime.answer_log.redaction import REDACTED
from edgetune_runtime.bundle import AdapterEntry, Manifest
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import OutOfSpaceError, UsageError
from edgetune_runtime.inference.routing.router import last_user_text
from edgetune_runtime.wording import printable, shortened

from edgetune.common.files import write_file
from edgetune.recipe.output import AUTO
from edgetune.recipe.parts import Metric
from edgetune.tasks.data import text_of_turn

from .corrections import is_redacted_as_a_whole, problem_with, row_of, unfit

SKIP, QUIT = "s", "q"
_YES, _NO = ("y", "yes", "j", "ja"), ("n", "no", "nein")
_QUESTION = "\nright answer (Enter: this one is right): "
HELP = f"Enter: the answer is right; {SKIP}: skip; {QUIT}: quit; or type the right answer."


def most_informative(entries: Sequence[LoggedAnswer], count: int, manifest: Manifest) -> list[LoggedAnswer]:
    """Up to `count` answers of the bundle's adapters, to different prompts: wrong ones, and then the least sure, first.

    Those with a correction that can be an answer are left out, and those that can never be learned.
    """
    if not count:
        return []
    own = [entry for entry in entries if entry.adapter in manifest.adapters]
    bad = {entry.id for entry in own if _is_badly_corrected(manifest, entry)}
    corrected = {_key(entry) for entry in own if entry.correction is not None and entry.id not in bad}
    first: dict[tuple[str | None, str], LoggedAnswer] = {}
    for entry in sorted(own, key=_doubtlessness):
        is_open = entry.id in bad or _key(entry) not in corrected
        if is_open and unfit(entry) is None and not is_redacted_as_a_whole(entry):
            first.setdefault(_key(entry), entry)
        if len(first) == count:
            break
    return list(first.values())


def ask(entries: Sequence[LoggedAnswer], read: Callable[[str], str], manifest: Manifest) -> Iterator[LoggedAnswer]:
    """The answers that the user corrects or confirms, by the line that `read` returns to a question.

    What cannot be a correction is asked again, with the reason. Raises UsageError if `read` returns "", the end of the
    input, as someone whose terminal was closed did not ask for a training.
    """
    for number, entry in enumerate(entries, 1):
        sure = "" if entry.confidence is None else f" ({entry.confidence:.0%} sure)"
        sure += ", marked as wrong" if entry.is_wrong else ""
        head = f"\n{number} of {len(entries)}, {entry.adapter}{sure}\n  asked     {printable(_asked(entry))}"
        question = f"{head}\n  answered  {printable(entry.answer)}{_QUESTION}"
        reply = _reply(entry, question, read, manifest)
        if reply is None:
            return
        if reply is not entry:
            yield reply


def _reply(entry: LoggedAnswer, question: str, read: Callable[[str], str], manifest: Manifest) -> LoggedAnswer | None:
    """The corrected answer, the answer itself if it is skipped, and None at the end."""
    before = ""
    while True:
        line = read(question)
        text, last = line.strip(), before
        before = text
        if not line:
            message = "the input ended before the questions did; the replies so far are in the log"
            raise UsageError(message, f"end them with {QUIT}, or write them to a file with --questions FILE")
        if text == QUIT:
            return None
        if text == SKIP:
            return entry
        if not text and last.lower() in _NO:
            question = f"{last!r} is no right answer{_QUESTION}"
            continue
        try:
            reply = entry.with_correction(text or None)
        except UsageError as error:
            question = f"{error}{_QUESTION}"
            continue
        problem = _problem(manifest, entry, reply.correction or "")
        is_free = not manifest.adapters[str(entry.adapter)].labels
        if problem is None and is_free and text.lower() in _YES + _NO and text != last:
            problem = "would be learned as the answer: type it again if it is"
        if problem is None:
            return reply
        question = f"{shortened(reply.correction or '', 80)!r} {problem}{_QUESTION}"


def _is_badly_corrected(manifest: Manifest, entry: LoggedAnswer) -> bool:
    """Whether someone gave an answer that cannot be one, or an empty one, which is not learned."""
    text = entry.correction
    if text is None or text == entry.answer or REDACTED in text:
        return False
    return not text.strip() or _problem(manifest, entry, text) is not None


def _problem(manifest: Manifest, entry: LoggedAnswer, text: str) -> str | None:
    """Why a text cannot be an answer of the entry's adapter, as its labels, its metric and the recipe's output say."""
    about = manifest.adapters[str(entry.adapter)]
    if text != text.encode(errors="replace").decode():
        return "has bytes that are not UTF-8"
    try:
        turn = entry.message_of(text)
    except UsageError as error:
        return f"cannot be an answer: {error}"
    with suppress(UsageError):  # a conversation that cannot be a row is never learned
        row = row_of(entry, turn, about.system)
        metric, output = cast("Metric", about.metric), _given_output(manifest, about)
        are_objects = metric == "json" and about.output is not None and "schema" in about.output
        return problem_with(row, metric, about.labels, output, are_objects=are_objects)
    return None


def _given_output(manifest: Manifest, about: AdapterEntry) -> OutputSpec | None:
    """The adapter's constraint, but for one that was inferred from the rows: it changes with them."""
    given = manifest.recipe.get("adapters", {}).get(about.name, {}).get("output")
    return _output(json.dumps(about.output)) if about.output and given not in (None, AUTO) else None


@cache
def _output(stored: str) -> OutputSpec:
    # Corrections are learned with the spacing of the rows, whatever their own is.
    return replace(OutputSpec.from_json(json.loads(stored)), spacing="any")


def _asked(entry: LoggedAnswer) -> str:
    """What the user said last, and the calls and results that follow."""
    after = reversed([*takewhile(lambda message: message["role"] != "user", reversed(entry.messages))])
    steps = [f" → {text_of_turn(message)}" for message in after if message["role"] in ("assistant", "tool")]
    return "".join([last_user_text(list(entry.messages)) or "", *steps]) or str(entry.messages[-1]["content"])


def logged(entries: Iterable[LoggedAnswer], log: Path) -> Iterator[LoggedAnswer]:
    """The answers, each once it is written to the end of a log, so that none has to be asked again.

    OutOfSpaceError if one cannot be written.
    """
    for entry in entries:
        try:
            append_lines(log, line_of(entry))
        except OSError as error:
            message = f"cannot add the last answer to {log}: {error.strerror}"
            raise OutOfSpaceError(message, "free some space there, or let it be written") from error
        yield entry


def write_questions(entries: Sequence[LoggedAnswer], path: Path) -> None:
    """Write the answers as a log, to be completed with their corrections; UsageError if there is none."""
    if not entries:
        message = "no answer is left to ask about"
        raise UsageError(message, "give a log with answers of this bundle's adapters that are not corrected yet")
    write_file(path, "".join(map(line_of, entries)).encode(errors="replace"), is_private=True)


def _doubtlessness(entry: LoggedAnswer) -> tuple[bool, float]:
    return not entry.is_wrong, math.inf if entry.confidence is None else entry.confidence


def _key(entry: LoggedAnswer) -> tuple[str | None, str]:
    return entry.adapter, json.dumps([entry.messages, entry.tools])

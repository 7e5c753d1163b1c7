"""A log of answers and their corrections: lines of JSON in a file of bounded size, which `edgetune learn` reads."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.errors import EdgetuneError, NotFoundError, OutOfSpaceError, UsageError
from edgetune_runtime.text.chat import Message, Prompt, messages_for
from edgetune_runtime.tools.calls import ToolCall, answer_text
from edgetune_runtime.tools.definitions import Tools, tool_set
from edgetune_runtime.type_checks import dataclass_of

from .answers import LoggedAnswer, line_of, text_of
from .redaction import Redaction

MAX_BYTES = 64_000_000
_MIN_BYTES = 100_000
_MAX_RECENT = 1000
"""Answers that can be corrected; of long ones fewer, as the log keeps them in a tenth of its bytes."""
_BEGINNING = b'{"id": '
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recent:
    """An answer that can be corrected, the bytes of its line, and what the user got in its place, if not itself."""

    entry: LoggedAnswer
    size: int
    shown: str | None


class AnswerLog:
    """Appends answers of a bundle to `path`, and corrected ones once more. Thread-safe; for one process.

    The file, to which `path` may be a link, and the one before it, `PATH.1`, have at most `max_bytes` together; the
    oldest lines are dropped. What the regular expressions `redact` find in prompts, answers and corrections is
    replaced, but for names of fields, and in tools nothing is; texts in which that takes too long are replaced as a
    whole. Others than the user of the process cannot read the files. UsageError for a path that cannot be written, for
    one of both files that is no log, an invalid expression, and fewer than 100,000 bytes.
    """

    def __init__(
        self, path: str | Path, manifest: Manifest, *, max_bytes: int = MAX_BYTES, redact: Sequence[str] = ()
    ) -> None:
        path = _without_link(Path(path))
        if max_bytes < _MIN_BYTES:
            raise UsageError(f"a log of {max_bytes} bytes is too small", f"give at least {_MIN_BYTES}")
        self.path, self._manifest, self._max_bytes = path, manifest, max_bytes
        self._redaction = Redaction(redact)
        self._recent: OrderedDict[str, _Recent] = OrderedDict()
        # A judgement reads an answer and writes it again.
        self._lock = threading.RLock()
        try:
            for file in filter(Path.exists, (path, file_before(path))):
                # Opening a pipe waits for somebody at its other end.
                if file.is_fifo() or not _is_log(file):
                    raise UsageError(f"{file} is not a log of answers", "choose another file")
            append_lines(path, "")
        except OSError as error:
            message = f"cannot write {error.filename or path}: {error.strerror}"
            raise UsageError(message, "choose another file") from error

        for file in filter(Path.is_file, (path, file_before(path))):
            # Another user's file, or one on a file system without modes, stays as it is.
            with suppress(OSError):
                _cut(file, max_bytes // 2)
            with suppress(OSError):
                file.chmod(0o600)

    def answered(
        self,
        prompt: Prompt,
        answer: str,
        *,
        calls: Sequence[ToolCall] = (),
        tools: Tools | None = None,
        shown: str | None = None,
        adapter: str | None = None,
        confidence: float | None = None,
        answer_id: str | None = None,
        is_cut_off: bool = False,
    ) -> str:
        """Log an answer of an adapter; returns its id, for `corrected`. A disk error is a warning in the log.

        With `tools`, `answer` is `Answer.content`, and `calls` are `Answer.tool_calls`. `shown` is what the user got in
        place of an unsure answer; an empty text, as after a question, is never right. Nor is an answer that is
        cut off. UsageError for a value of another type.
        """
        turns = messages_for(prompt, None)
        offered = tool_set(tools)
        said = [[turn["content"], [call["function"]["arguments"] for call in _calls(turn)]] for turn in turns]
        text, (arguments, *parts) = self._redaction.clean(answer, [[call.arguments for call in calls], *said])
        entry = LoggedAnswer(
            answer_id or uuid.uuid4().hex,
            datetime.now(UTC).isoformat(timespec="seconds"),
            self._manifest.name,
            self._manifest.base.fingerprint,
            adapter,
            tuple(_messages(turns, parts)),
            answer_text(text, list(zip([call.name for call in calls], arguments, strict=True))),
            confidence,
            tools=None if offered is None else tuple(offered.definitions),
            is_cut_off=is_cut_off,
        )
        try:
            # As a line with another type is refused with the whole log.
            dataclass_of(LoggedAnswer, vars(entry))
        except TypeError as error:
            raise UsageError(f"it cannot be logged: {error}", "give texts, and a number as the confidence") from error
        try:
            self._write(entry, shown)
        except EdgetuneError as error:
            _LOG.warning("%s", error)
        return entry.id

    def corrected(self, answer_id: str, correction: str | dict[str, Any] | list[Any] | None = None) -> None:
        """Log what a recent answer should have been, a text or JSON; None: what the user got is right.

        A correction that calls tools is JSON as in `LoggedAnswer`. NotFoundError for an unknown id, UsageError for a
        correction that cannot be one, OutOfSpaceError if it cannot be written.
        """
        shown = self._recent_answer(answer_id).shown
        if correction is None and shown == "":
            message = "the answer was cut off or a clarifying question, which is not to be learned"
            raise UsageError(message, "give the right answer")
        try:
            right = shown if correction is None else text_of(correction)
        except (TypeError, ValueError) as error:
            message = f"the correction is neither a text nor JSON: {error}"
            raise UsageError(message, "give a text, an object or a list") from error
        text = None if right is None else self._redaction.clean(right)[0]
        with self._lock:
            self._write(self._recent_answer(answer_id).entry.with_correction(text), shown)

    def wrong(self, answer_id: str) -> None:
        """Log that a recent answer is wrong, where nobody says what is right; the same errors as `corrected`."""
        with self._lock:
            recent = self._recent_answer(answer_id)
            entry = recent.entry
            right = None if entry.correction == entry.answer else entry.correction
            self._write(replace(entry, correction=right, is_wrong=True), recent.shown)

    def _recent_answer(self, answer_id: str) -> _Recent:
        with self._lock:
            recent = self._recent.get(answer_id)
        if recent is None:
            message = f"no answer {answer_id!r} among the last ones"
            raise NotFoundError(message, "correct an answer that was logged, soon after it was given")
        return recent

    def _write(self, entry: LoggedAnswer, shown: str | None) -> None:
        line = line_of(entry)
        size = len(line.encode(errors="replace"))
        if size > self._max_bytes // 2:
            message = f"did not log an answer of {size} bytes, as {self.path} may have {self._max_bytes}"
            raise UsageError(message, "allow it more bytes")
        with self._lock:
            self._remember(_Recent(entry, size, shown))
            try:
                if self.path.exists() and self.path.stat().st_size + size > self._max_bytes // 2:
                    self.path.replace(file_before(self.path))
                append_lines(self.path, line)
            except OSError as error:
                message = f"cannot log an answer in {self.path}: {error.strerror}"
                raise OutOfSpaceError(message, "free some space there, or let it be written") from error

    def _remember(self, recent: _Recent) -> None:
        """Keep an answer, and forget the oldest ones if these are too many or too long."""
        self._recent.pop(recent.entry.id, None)
        self._recent[recent.entry.id] = recent
        size = sum(each.size for each in self._recent.values())
        while len(self._recent) > 1 and (len(self._recent) > _MAX_RECENT or size > self._max_bytes // 10):
            size -= self._recent.popitem(last=False)[1].size


def append_lines(path: Path, lines: str) -> None:
    """Add lines to a log, which is made if there is none; OSError if that fails."""
    # A process that was killed may have left a part of a line.
    end = "" if _ends_with_a_line(path) else "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    # A model may write half a surrogate pair.
    with os.fdopen(descriptor, "a", encoding="utf-8", errors="replace") as file:
        file.write(end + lines)


def file_before(path: Path) -> Path:
    """The file that the log was before it was full; beside the file itself if the path is a link to it."""
    return Path(f"{_without_link(path)}.1")


def _without_link(path: Path) -> Path:
    """The file that a link is to: a full log is renamed, which would rename the link."""
    # `Path.resolve` raises RuntimeError for links to each other, where opening the file raises OSError.
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _calls(message: Message) -> Sequence[Mapping[str, Any]]:
    """The calls of a message."""
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    return calls


def _messages(turns: Sequence[Message], parts: Sequence[tuple[str, Sequence[Any]]]) -> Iterator[Message]:
    """The messages with other contents and arguments of their calls; ids of calls become numbers, names of users go."""
    ids, numbers = dict[str, str](), count(1)
    for turn, (content, arguments) in zip(turns, parts, strict=True):
        message: dict[str, Any] = {"role": turn["role"], "content": content}
        if turn["role"] == "tool":
            message |= {"name": turn["name"]} if "name" in turn else {}
            message |= {"tool_call_id": ids[turn["tool_call_id"]]} if turn.get("tool_call_id") in ids else {}
        calls = []
        for call, each in zip(_calls(turn), arguments, strict=True):
            # As `messages_for` numbers calls without an id.
            ids[call["id"]] = f"call{next(numbers):05d}"
            function = {"name": call["function"]["name"], "arguments": each}
            calls.append({"id": ids[call["id"]], "type": "function", "function": function})
        yield message | ({"tool_calls": calls} if calls else {})


def _is_log(path: Path) -> bool:
    """Whether one of the first lines begins as those of `line_of` do, or all that there is may be a part of one."""
    with path.open("rb") as file:
        lines = [line for line in file.read(1 << 16).splitlines() if line.strip(b"\0 ")]
    return any(line.startswith(_BEGINNING) for line in lines) or all(map(_BEGINNING.startswith, lines))


def _cut(path: Path, size: int) -> None:
    """Drop the oldest lines of a log that was allowed more than these bytes; needs no space on the disk."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) <= size:
            return
        file.seek(-size - 1, os.SEEK_END)
        kept = file.read().partition(b"\n")[2]
        file.seek(0)
        file.write(kept)
        file.truncate()


def _ends_with_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

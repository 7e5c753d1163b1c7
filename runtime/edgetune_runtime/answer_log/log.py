"""A log of answers and their corrections: lines of JSON in a file of bounded size, which `edgetune learn` reads."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError
from edgetune_runtime.text.chat import Message, Prompt, messages_for
from edgetune_runtime.tools.calls import ToolCall, answer_text
from edgetune_runtime.tools.definitions import Tools, tool_set
from edgetune_runtime.type_checks import dataclass_of
from edgetune_runtime.wording import first_of, printable

from .redaction import Redaction

MAX_BYTES = 64_000_000
_MIN_BYTES = 100_000
_MAX_RECENT = 1000
"""Answers that can be corrected; of long ones fewer, as the log keeps them in a tenth of its bytes."""
_BEGINNING = b'{"id": '
_ANSWERED = ("role", "tool_call_id", "name")
"""What a log keeps of a message beside its content and its calls."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedAnswer:
    """What an adapter (None: the base) of a bundle answered to `messages`, and when (ISO 8601).

    `base` is the fingerprint of the bundle's base. `correction` is the right answer, `answer` itself if someone
    confirmed it, and None if nobody said anything; with `is_wrong` someone said that `answer` is not right.

    `tools` are the definitions of those that the answer could call. Calls in `answer` and `correction` are JSON, such
    as `{"tool_calls": [{"name": "turn_on", "arguments": {"room": "hall"}}]}`, with a `content` if there is one.
    """

    id: str
    time: str
    bundle: str
    base: str
    adapter: str | None
    messages: tuple[Message, ...]
    answer: str
    confidence: float | None = None
    correction: str | None = None
    is_wrong: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None

    def with_correction(self, text: str | None = None) -> LoggedAnswer:
        """The answer with what it should have been; None: it is right."""
        right = self.answer if text is None else text
        return replace(self, correction=right, is_wrong=right != self.answer)


class AnswerLog:
    """Appends answers of a bundle to `path`, and corrected ones once more. Thread-safe; for one process.

    The file and the one before it, `PATH.1`, have at most `max_bytes` together; the oldest lines are dropped. What the
    regular expressions `redact` find in prompts, tools, answers and corrections is replaced; texts in which that takes
    too long are replaced as a whole. Others than the user of the process cannot read the files. UsageError for a path
    that cannot be written, an expression that is none, and fewer than 100,000 bytes.
    """

    def __init__(
        self, path: Path, manifest: Manifest, *, max_bytes: int = MAX_BYTES, redact: Sequence[str] = ()
    ) -> None:
        if max_bytes < _MIN_BYTES:
            raise UsageError(f"a log of {max_bytes} bytes is too small", f"give at least {_MIN_BYTES}")
        self.path, self._manifest, self._max_bytes = path, manifest, max_bytes
        self._redaction = Redaction(redact)
        self._recent: OrderedDict[str, tuple[LoggedAnswer, int]] = OrderedDict()
        self._lock = threading.Lock()
        try:
            if path.exists() and not _is_log(path):
                raise UsageError(f"{path} is no log of answers", "choose another file")
            # A process that was killed may have left a part of a line.
            self._append("" if _ends_with_a_line(path) else "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", "choose another file") from error

    def answered(
        self,
        prompt: Prompt,
        answer: str,
        *,
        calls: Sequence[ToolCall] = (),
        tools: Tools | None = None,
        adapter: str | None = None,
        confidence: float | None = None,
        answer_id: str | None = None,
    ) -> str:
        """Log an answer of an adapter; returns its id, for `corrected`. A disk error is a warning in the log.

        With `tools`, `answer` is `Answer.content`, and `calls` are `Answer.tool_calls`.
        """
        turns = messages_for(prompt, None)
        offered = tool_set(tools)
        definitions, text, arguments, *parts = self._redaction.clean_values(
            [None if offered is None else offered.definitions, answer, [call.arguments for call in calls]]
            + [[turn["content"], [call["function"]["arguments"] for call in _calls(turn)]] for turn in turns]
        )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = LoggedAnswer(
            answer_id or uuid.uuid4().hex,
            now,
            self._manifest.name,
            self._manifest.base.fingerprint,
            adapter,
            tuple(_message(turn, *part) for turn, part in zip(turns, parts, strict=True)),
            answer_text(text, list(zip([call.name for call in calls], arguments, strict=True))),
            confidence,
            tools=None if definitions is None else tuple(definitions),
        )
        self._write(entry)
        return entry.id

    def corrected(self, answer_id: str, correction: str | None = None) -> None:
        """Log what a recent answer should have been; None: it is right. NotFoundError for an unknown id.

        A correction that calls tools is JSON as in `LoggedAnswer`.
        """
        entry = self._recent_entry(answer_id)
        self._write(entry.with_correction(None if correction is None else self._redaction.clean([correction])[0]))

    def wrong(self, answer_id: str) -> None:
        """Log that a recent answer is wrong, where nobody says what is right. NotFoundError for an unknown id."""
        entry = self._recent_entry(answer_id)
        right = None if entry.correction == entry.answer else entry.correction
        self._write(replace(entry, correction=right, is_wrong=True))

    def _recent_entry(self, answer_id: str) -> LoggedAnswer:
        with self._lock:
            entry, _ = self._recent.get(answer_id, (None, 0))
        if entry is None:
            message = f"no answer {answer_id!r} among the last ones"
            raise NotFoundError(message, "correct an answer soon after it was given")
        return entry

    def _write(self, entry: LoggedAnswer) -> None:
        line = line_of(entry)
        size = len(line.encode(errors="replace"))
        if size > self._max_bytes // 2:
            _LOG.warning("did not log an answer of %d bytes, as %s may have %d", size, self.path, self._max_bytes)
            return
        with self._lock:
            self._remember(entry, size)
            try:
                if self.path.exists() and self.path.stat().st_size + size > self._max_bytes // 2:
                    self.path.replace(_before(self.path))
                self._append(line)
            except OSError as error:
                _LOG.warning("cannot log an answer in %s: %s", self.path, error.strerror)

    def _remember(self, entry: LoggedAnswer, size: int) -> None:
        self._recent.pop(entry.id, None)
        self._recent[entry.id] = entry, size
        while len(self._recent) > _MAX_RECENT or sum(size for _, size in self._recent.values()) > self._max_bytes // 10:
            self._recent.popitem(last=False)

    def _append(self, text: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # A model may write half a surrogate pair.
        with os.fdopen(descriptor, "a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def line_of(entry: LoggedAnswer) -> str:
    """The line of a log for an answer."""
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"


def read_answer_log(path: Path, manifest: Manifest, say: Callable[[str], None] = _LOG.warning) -> list[LoggedAnswer]:
    """The answers in a log of this bundle, each with its last correction, in the order of their first lines.

    `say` gets a sentence about lines that are left out because they are no JSON, as a part of a line that was not
    written to its end. A correction that is any other JSON value than a text counts as its JSON.

    NotFoundError if there is no log, VerificationError for a line that is not one of a log, UsageError for one of
    another bundle.
    """
    if not path.is_file():
        raise NotFoundError(f"no log {path}", "give the file of `edgetune-run serve --log-answers`")
    entries: dict[str, LoggedAnswer] = {}
    for where, entry in _entries(path, say):
        if (entry.bundle, entry.base) != (manifest.name, manifest.base.fingerprint):
            base = printable(entry.base[:12])
            message = f"{where} is of bundle {entry.bundle!r} on base {base}…, not of {manifest.name!r}"
            raise UsageError(f"{message} on {manifest.base.fingerprint[:12]}…", "give the log of this bundle")
        entries[entry.id] = entry
    return list(entries.values())


def _entries(path: Path, say: Callable[[str], None]) -> Iterator[tuple[str, LoggedAnswer]]:
    for file in (_before(path), path):
        left_out = list[str]()
        for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
            where = f"{file}:{number}"
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError):
                left_out += [where] if line.strip() else []
                continue
            try:
                yield where, _entry(raw)
            except (TypeError, UsageError, RecursionError) as error:
                raise VerificationError(f"{where} is not a line of a log: {error}", "correct or remove it") from error
        if left_out:
            say(f"left out what is not JSON, as a part of a line: {first_of(left_out)}")


def _entry(raw: Any) -> LoggedAnswer:  # noqa: ANN401 - any JSON value
    names = {field.name: field.default is MISSING for field in fields(LoggedAnswer)}
    needed = [name for name, is_needed in names.items() if is_needed]
    if not isinstance(raw, dict) or not raw.keys() >= {*needed}:
        raise TypeError(f"it does not have the keys {', '.join(needed)}")
    if more := raw.keys() - names:
        raise TypeError(f"it has a key {min(more)!r}; its keys are {', '.join(names)}")
    correction = raw.get("correction")
    if isinstance(correction, dict | list | int | float):
        # As people write it into a file of questions, and into rows.
        raw = {**raw, "correction": json.dumps(correction, ensure_ascii=False)}
    entry = dataclass_of(LoggedAnswer, raw)
    return replace(entry, messages=tuple(messages_for(entry.messages, None)))


def _calls(message: Message) -> Sequence[Mapping[str, Any]]:
    """The calls of a message."""
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    return calls


def _message(message: Message, content: str, arguments: Sequence[Mapping[str, Any]]) -> Message:
    """The message with another content and other arguments of its calls."""
    calls = [
        {**call, "function": {**call["function"], "arguments": each}}
        for call, each in zip(_calls(message), arguments, strict=True)
    ]
    kept = {key: message[key] for key in _ANSWERED if key in message}
    return {**kept, "content": content, **({"tool_calls": calls} if calls else {})}


def _is_log(path: Path) -> bool:
    """Whether one of the first lines begins as those of `line_of` do, or all that there is may be a part of one."""
    with path.open("rb") as file:
        lines = [line for line in file.read(1 << 16).splitlines() if line.strip(b"\0 ")]
    return any(line.startswith(_BEGINNING) for line in lines) or all(map(_BEGINNING.startswith, lines))


def _ends_with_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _before(path: Path) -> Path:
    """The file that the log was before it was full."""
    return path.with_name(f"{path.name}.1")

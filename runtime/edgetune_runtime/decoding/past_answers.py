"""Keeps the last answer to each prompt, as the draft of the next one: in memory, and in a file if it may.

SuffixDecoding (Oliaro et al., 2411.04975) grows a tree of past answers. Requests of a home come again word for word,
and then the whole last answer is a longer draft than what a tree is sure of (docs/measurements.md).
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgetune_runtime.errors import OutOfSpaceError
from edgetune_runtime.formats.checked_file import read_checked, write_checked
from edgetune_runtime.states.activation import Spans

KIND = "edgetune_past_answers"
MAX_BYTES = 4_000_000
"""Memory of all answers together: about 13,000 short ones."""

_FOLDER = "past-answers"
_GROUP_BYTES, _KEY_BYTES = 4, 16
"""Keys begin with a digest of the adapter, so that its answers can be forgotten."""
_SEVERAL = "several adapters"
_ENTRY_BYTES = 250
"""Memory of an answer besides its tokens: its key, and its place in the dictionary."""
_SAVE_EVERY_S = 3600.0
"""Rarely, as each time the whole file is written."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastAnswer:
    """The tokens of the last answer to a call's prompt, none if there is none, and the place to keep the next one."""

    answers: PastAnswers
    key: bytes
    tokens: Sequence[int]

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep these tokens in place of the last answer's."""
        if tokens:
            self.answers.put(self.key, tokens)


class PastAnswers:
    """Past answers up to `MAX_BYTES`, the least recently given dropped first. Thread-safe.

    With a `path` they are read from that file, and written to it about every hour and by `save`, without those of
    adapters that are not among the names of `adapters`. A damaged file counts as empty, and one that cannot be written
    is skipped with a warning. Prompts are kept as digests.
    """

    def __init__(
        self, vocab_size: int, path: Path | None = None, adapters: Callable[[], Collection[str]] | None = None
    ) -> None:
        self._path, self._adapters = path, adapters
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._answers: dict[bytes, array[int]] = {}
        self._bytes, self._is_saved, self._saved_s = 0, True, time.monotonic()
        if path is not None:
            for key, tokens in _read(path, vocab_size):
                self._put(key, tokens)

    def of(self, adapters: Collection[str], spans: Spans, tokens: Sequence[int]) -> PastAnswer:
        """The last answer to a prompt with these adapters, which are active in these spans."""
        rest = _digest(repr((sorted(adapters), spans, *tokens)), _KEY_BYTES - _GROUP_BYTES)
        key = _group(_SEVERAL if len(adapters) > 1 else next(iter(adapters), "")) + rest
        with self._lock:
            return PastAnswer(self, key, list(self._answers.get(key, ())))

    def put(self, key: bytes, tokens: Sequence[int]) -> None:
        """Keep an answer, dropping others where there are too many."""
        with self._lock:
            self._is_saved &= self._answers.get(key) == array("I", tokens)
            self._put(key, array("I", tokens))
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file if there is one, and an answer is new; other calls go on meanwhile."""
        with self._writing:
            with self._lock:
                self._saved_s = time.monotonic()
                if self._path is None or self._is_saved:
                    return
                self._drop_others()
                answers, self._is_saved = dict(self._answers), True
            is_written = _write(self._path, answers) if answers else _delete(self._path)
            with self._lock:
                self._is_saved &= is_written

    def forget(self, adapter: str) -> None:
        """Forget the answers of an adapter, and those of several adapters together, in the file too."""
        groups = _group(adapter), _group(_SEVERAL)
        with self._lock:
            forgotten = [key for key in self._answers if key.startswith(groups)]
            for key in forgotten:
                self._drop(key)
            self._is_saved &= not forgotten
        if self._answers:
            self.save()
        else:
            self.clear()

    def clear(self) -> None:
        """Forget all answers, in the file too."""
        with self._writing:
            with self._lock:
                self._answers.clear()
                self._bytes, self._is_saved = 0, True
            if self._path is not None:
                _delete(self._path)

    def _drop_others(self) -> None:
        """Drop the answers of adapters that are gone, such as with an update while nobody had the file open."""
        if self._adapters is not None:
            groups = {_group(name) for name in ("", _SEVERAL, *self._adapters())}
            for key in [key for key in self._answers if key[:_GROUP_BYTES] not in groups]:
                self._drop(key)

    def _put(self, key: bytes, tokens: array[int]) -> None:
        self._drop(key)
        self._answers[key] = tokens
        self._bytes += _size(tokens)
        while self._bytes > MAX_BYTES:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: bytes) -> None:
        if key in self._answers:
            self._bytes -= _size(self._answers.pop(key))


def _read(path: Path, vocab_size: int) -> list[tuple[bytes, array[int]]]:
    """The answers in the file; none if it is damaged, or has tokens that the base does not have."""
    stored, tokens = read_checked(path, KIND, max_bytes=MAX_BYTES, follows_links=False), array("I")
    try:
        if stored is None:
            raise ValueError("its checksum or length is wrong")
        tokens.frombytes(stored.data)
        entries = [(bytes.fromhex(key), int(length)) for key, length in stored.about["answers"]]
        lengths = [length for _, length in entries]
        if min(lengths) < 1 or sum(lengths) != len(tokens) or max(tokens) >= vocab_size:
            raise ValueError(f"it has {len(tokens)} tokens for answers of {sum(lengths)}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if os.path.lexists(path):
            _LOG.warning("ignored the past answers in %s: %s", path, error)
        return []
    rest = iter(tokens)
    return [(key, array("I", islice(rest, length))) for key, length in entries]


def _write(path: Path, answers: Mapping[bytes, array[int]]) -> bool:
    """Whether the answers are in the file; a warning if not."""
    about = {"answers": [[key.hex(), len(tokens)] for key, tokens in answers.items()]}
    data = array("I")
    for tokens in answers.values():
        data.extend(tokens)
    try:
        for folder in (path.parents[1], path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_checked(path, KIND, about, memoryview(data).cast("B"))
    except (OSError, OutOfSpaceError) as error:
        _LOG.warning("cannot save past answers: %s", error)
        return False
    return True


def path_of(cache_folder: Path, name: str, fingerprint: str) -> Path:
    """The file of the bundle with this name and base."""
    digest = hashlib.sha256(f"{fingerprint} {name}".encode()).hexdigest()[:40]
    return cache_folder / _FOLDER / f"{digest}.bin"


def clear_all(cache_folder: Path) -> int:
    """Delete the past answers of all bundles; returns the number of files."""
    return sum(map(_delete, (cache_folder / _FOLDER).glob("*.bin")))


def _delete(file: Path) -> bool:
    """Whether the file is gone; a warning if not."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("cannot delete past answers: %s", error)
        return False
    return True


def _group(adapter: str) -> bytes:
    """The beginning of the keys of an adapter's answers; "" is the base."""
    return _digest(adapter, _GROUP_BYTES)


def _digest(text: str, length: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=length).digest()


def _size(tokens: Sequence[int]) -> int:
    return _ENTRY_BYTES + 4 * len(tokens)

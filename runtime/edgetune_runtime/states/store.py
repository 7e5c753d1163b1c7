"""LRU store of prompt states on disk: a folder of checked files with a size limit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.formats.checked_file import read_about, read_checked, write_checked

from .daily import DailyBudget

SUFFIX = ".kv"
KIND = "edgetune_state"
"""The kind of a state's file; see `checked_file`."""
_ABANDONED_S = 600.0
"""A temporary file that was not written to for this long is a killed writer's: writing a state takes seconds."""
_VARIABLE = "EDGETUNE_CACHE"
_PRIVATE, _OTHERS, _WRITABLE = 0o700, 0o077, 0o022

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredState:
    """A state on disk: a readable label, its tokens and size in bytes, and its last use (seconds since the epoch)."""

    path: Path
    label: str
    tokens: int
    engine: str
    bytes: int
    used: float


def default_folder() -> Path:
    """The default folder for states: `$EDGETUNE_CACHE`, else edgetune/states in the user's cache folder.

    UsageError for an account without a home folder.
    """
    folder = os.environ.get(_VARIABLE)
    try:
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune" / "states"
    except RuntimeError as error:
        raise UsageError("this account has no home folder", f"give --cache-folder, or set {_VARIABLE}") from error


def _mark_used(path: Path) -> None:
    """Set when the file was used last, where it may be written."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _is_users(folder: Path) -> bool:
    """Whether it is the default folder, in the user's cache folder."""
    try:
        return not os.environ.get(_VARIABLE) and folder == default_folder()
    except UsageError:
        return False


def digest_of(identity: Mapping[str, Any]) -> str:
    """A digest of everything that determines a state, given as JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]


class StateStore:
    """A folder of states of up to `budget_mb` (10^6 bytes) in total; other processes may use it at the same time.

    With a budget of 0 it is read-only. Read and write errors are not raised, because a state can always be recomputed:
    an unreadable state counts as missing, and one that cannot be written is skipped.

    Calls write up to `mb_per_day`: whoever sends other prompts again and again would wear out an SD card. `verify`
    raises VerificationError for a file that is not as it should be.
    """

    def __init__(
        self,
        folder: Path,
        budget_mb: float,
        mb_per_day: float = math.inf,
        verify: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder, self._verify = folder, verify
        self._budget = budget_mb * 1e6
        self._daily = DailyBudget(folder, mb_per_day * 1e6)

    def path_of(self, identity: Mapping[str, Any]) -> Path:
        """The file of the state with this identity: everything that determines the state, as JSON values."""
        return self.folder / f"{digest_of(identity)}{SUFFIX}"

    def load(self, identity: Mapping[str, Any]) -> memoryview | None:
        """The state with exactly this identity, marked as recently used; a damaged file is deleted."""
        path = self.path_of(identity)
        if not os.path.lexists(path):
            return None
        try:
            if self._verify is not None:
                self._verify(path)
        except VerificationError as error:
            _LOG.warning("a saved state is not used: %s", error)
            return None
        stored = read_checked(path, KIND, max_bytes=self._budget or math.inf, follows_links=False)
        if stored is None or stored.about.get("identity") != json.loads(json.dumps(identity)):
            _LOG.warning("dropped a saved state that is damaged or does not match its file name: %s", path)
            self.drop(identity)
            return None
        if self._budget:
            _mark_used(path)
        return stored.data

    def drop(self, identity: Mapping[str, Any]) -> None:
        """Delete the state with this identity, if there is one."""
        if self._budget:
            with contextlib.suppress(OSError):
                self.path_of(identity).unlink(missing_ok=True)

    def drop_adapter(self, digest: str) -> None:
        """Delete the states that an adapter computed whose file has this digest; see `PromptStates.identity`."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            match read_about(path, KIND):
                # A merged adapter is the base of its states.
                case {"identity": {"base": base, "spans": list(spans)}} if digest in json.dumps([base, spans]):
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)

    def save(
        self, identity: Mapping[str, Any], state: memoryview, label: str, tokens: int, *, is_warmed: bool = False
    ) -> bool:
        """Save a state, evicting the least recently used ones if needed; returns whether it is on disk.

        Also deletes the temporary files that killed writers left. `label` is a readable description. States that
        `is_warmed` says were computed ahead of calls do not count as written by calls.
        """
        if len(state) > self._budget:
            level, mb = logging.WARNING if is_warmed else logging.DEBUG, len(state) / 1e6
            _LOG.log(level, "did not save a state of %.1f MB: the limit is %.1f MB", mb, self._budget / 1e6)
            return False
        path = self.path_of(identity)
        try:
            if path.is_file() and not path.is_symlink():
                # What determines a state is in its name, so it is the same. Those used last are evicted last.
                _mark_used(path)
                return True
            if not is_warmed and not self._daily.admits(len(state)):
                _LOG.debug("did not save a state of %.1f MB: calls wrote enough today", len(state) / 1e6)
                return False
            self._make_folder()
            self._drop_abandoned()
            self._evict(self._budget - len(state), path)
            if not is_warmed:
                # Before, as a write that fails wears the disk too.
                self._daily.count(len(state))
            write_checked(path, KIND, {"identity": identity, "label": label, "tokens": tokens}, state)
        except (OSError, OutOfSpaceError) as error:
            _LOG.warning("cannot save a state to disk: %s", error)
            return False
        return True

    def entries(self) -> list[StoredState]:
        """All states, most recently used first."""
        return sorted(self._entries(), key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Delete all states and the temporary files of killed writers; returns the number of states."""
        entries = self.entries()
        for path in [*(entry.path for entry in entries), *self._temporaries()]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return len(entries)

    def _make_folder(self) -> None:
        """Make the folder for this user only. One that was there keeps its rights, unless it is the default one."""
        self.folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        rights = stat.S_IMODE(self.folder.stat().st_mode)
        if rights & _OTHERS and _is_users(self.folder):
            self.folder.chmod(_PRIVATE)
        elif rights & _WRITABLE:
            _LOG.warning("others can write to %s, and what they write is read as states: use chmod go-w", self.folder)

    def _temporaries(self) -> Iterator[Path]:
        """The files of writers at work and of killed ones."""
        return self.folder.glob(f".*{SUFFIX}.tmp-*")

    def _drop_abandoned(self) -> None:
        oldest = time.time() - _ABANDONED_S
        for path in self._temporaries():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)

    def _entries(self) -> Iterator[StoredState]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            about = read_about(path, KIND)
            with contextlib.suppress(OSError):
                status = path.lstat()
                match about:
                    case {"label": str(label), "tokens": int(tokens), "identity": {"engine": str(engine)}}:
                        yield StoredState(path, label, tokens, engine, status.st_size, status.st_mtime)
                    case _:
                        yield StoredState(path, "damaged", 0, "", status.st_size, 0.0)

    def _evict(self, left: float, path: Path) -> None:
        """Delete the least recently used states until all except `path` take at most `left` bytes."""
        entries = [entry for entry in self.entries() if entry.path != path]
        total = sum(entry.bytes for entry in entries)
        while entries and total > left:
            oldest = entries.pop()
            total -= oldest.bytes
            _LOG.debug("evicted %s: %s, %d tokens", oldest.path, oldest.label, oldest.tokens)
            with contextlib.suppress(OSError):
                oldest.path.unlink(missing_ok=True)

"""States of fixed prompts on the disk: a folder of checked files within a budget, the longest unused out first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import OutOfSpaceError
from edgetune_runtime.formats.checked_file import read_about, read_checked, write_checked

SUFFIX = ".kv"
KIND = "edgetune_state"
"""What a file of a state begins with; see `formats.checked_file`."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A state on the disk: what it is of, in words, and how large and how old it is (seconds since the epoch)."""

    path: Path
    label: str
    tokens: int
    engine: str
    bytes: int
    used: float


def default_folder() -> Path:
    """Where states are kept unless a caller says otherwise: `EDGETUNE_CACHE`, or a folder in the user's cache."""
    given = os.environ.get("EDGETUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune" / "states"


def digest_of(identity: Mapping[str, Any]) -> str:
    """A digest of all that shapes a state, given as JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]


class StateStore:
    """A folder of states, at most `budget_mb` (10^6 bytes) in all; other processes may use it at the same time.

    With a budget of 0 it is only read. What cannot be read is as if it were not there, and what cannot be written is
    left out: a state can always be made again.
    """

    def __init__(self, folder: Path, budget_mb: float) -> None:
        self.folder = folder
        self._budget = int(budget_mb * 1e6)

    def path_of(self, identity: Mapping[str, Any]) -> Path:
        """The file of a state of this identity: JSON values, all that shapes the state."""
        return self.folder / f"{digest_of(identity)}{SUFFIX}"

    def load(self, identity: Mapping[str, Any]) -> memoryview | None:
        """The state of exactly this identity, which counts as use; a damaged file is deleted."""
        path = self.path_of(identity)
        found = read_checked(path, KIND)
        if found is None and not path.exists():
            return None
        if found is None or found.about.get("identity") != json.loads(json.dumps(identity)):
            _LOG.warning("dropped a saved state that is damaged or of something else: %s", path)
            self.drop(identity)
            return None
        if self._budget:
            with contextlib.suppress(OSError):
                os.utime(path)
        return found.data

    def drop(self, identity: Mapping[str, Any]) -> None:
        """Delete the state of this identity, if there is one."""
        if self._budget:
            with contextlib.suppress(OSError):
                self.path_of(identity).unlink(missing_ok=True)

    def save(self, identity: Mapping[str, Any], state: memoryview, label: str, tokens: int) -> bool:
        """Keep a state, dropping the longest unused ones where room is needed; whether it was kept.

        `label` says in words whose it is.
        """
        if len(state) > self._budget:
            _LOG.debug("a state of %.1f MB is larger than the folder may be", len(state) / 1e6)
            return False
        path = self.path_of(identity)
        try:
            self._make_room(self._budget - len(state), path)
            write_checked(path, KIND, {"identity": identity, "label": label, "tokens": tokens}, state)
        except (OSError, OutOfSpaceError) as error:
            _LOG.warning("a state cannot be kept on the disk: %s", error)
            return False
        return True

    def entries(self) -> list[Stored]:
        """All states, the last used first."""
        return sorted(self._entries(), key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Delete all states, and what writers that were killed have left; returns how many states there were."""
        entries = self.entries()
        leftovers = self.folder.glob(f".*{SUFFIX}.tmp-*")
        for path in [*(entry.path for entry in entries), *leftovers]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return len(entries)

    def _entries(self) -> Iterator[Stored]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            about = read_about(path, KIND)
            with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
                status = path.stat()
                if about is None:
                    yield Stored(path, "damaged", 0, "", status.st_size, 0.0)
                    continue
                label, engine = str(about["label"]), str(about["identity"]["engine"])
                yield Stored(path, label, int(about["tokens"]), engine, status.st_size, status.st_mtime)

    def _make_room(self, left: int, path: Path) -> None:
        """Delete the longest unused states until the others, but that of `path`, take at most `left` bytes."""
        entries = [entry for entry in self.entries() if entry.path != path]
        total = sum(entry.bytes for entry in entries)
        while entries and total > left:
            oldest = entries.pop()
            total -= oldest.bytes
            _LOG.debug("evicted %s: %s, %d tokens", oldest.path, oldest.label, oldest.tokens)
            oldest.path.unlink(missing_ok=True)

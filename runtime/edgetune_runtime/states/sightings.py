"""Counts how often the beginning of a prompt was seen, so that only recurring ones are kept on disk."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .cache import Key

_MAX = 256


class Sightings:
    """Counts how often each of the last beginnings, up to 256, was seen. Thread-safe."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, key: Key, tokens: Sequence[int]) -> int:
        """How often these tokens were seen with this key, now included."""
        digest = hashlib.sha256(repr(key).encode() + np.asarray(tokens, "<i4").tobytes()).digest()
        with self._lock:
            count = self._counts.pop(digest, 0) + 1
            while len(self._counts) >= _MAX:
                self._counts.popitem(last=False)
            self._counts[digest] = count
        return count

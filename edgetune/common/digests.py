"""Digests of everything that a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable


def key_of(state: object, rows: Iterable[object] = ()) -> str:
    """The sha256 of a JSON value and of rows of plain values."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()

"""The options with which a board opens a kit's bundle, where the defaults need too much memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_TYPE = re.compile("[a-z0-9_]+")


@dataclass(frozen=True)
class Opening:
    """Options of `edgetune-run` for the golden answers and the unit; None is the default of `Runtime.open`."""

    context_length: int | None = None
    kv: str | None = None
    cache_mb: float | None = None

    @property
    def changes(self) -> Mapping[str, Any]:
        """The options that differ from the defaults, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def words(self) -> list[str]:
        """The options on a command line of `edgetune-run`."""
        return [word for name, value in self.changes.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]


DEFAULTS = Opening()


def parse_opening(raw: Mapping[str, Any]) -> Opening:
    """The options in a kit.json; TypeError or ValueError for an invalid option."""
    opening = Opening(**raw)
    length, kv, cache = opening.context_length, opening.kv, opening.cache_mb
    if not (length is None or (type(length) is int and 0 < length < 2**31)):
        raise ValueError(f"context_length is {str(length)[:80]!r}")
    if not (kv is None or (isinstance(kv, str) and _TYPE.fullmatch(kv))):
        raise ValueError(f"kv is {str(kv)[:80]!r}")
    if not (cache is None or (type(cache) in {int, float} and 0 <= cache < math.inf)):
        raise ValueError(f"cache_mb is {str(cache)[:80]!r}")
    return opening

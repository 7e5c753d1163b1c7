"""The events that a runtime reports to an app's callback: loaded, switched, evicted, warmed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that a runtime did.

    `kind` is `loaded` (the bundle, or an adapter on its first use and whenever it is read again), `switched` (a call
    has other adapters than the call before it in the same context), `evicted` (a cached state, for lack of space)
    or `warmed` (the state of a fixed prompt). `name` is the bundle's or the adapter's, `base` for the plain base; a
    scale other than 1 is added, as in `lamp=0.5`. `tokens` are those of the state, `bytes` the memory of the state
    or the adapter.
    """

    kind: Literal["loaded", "switched", "evicted", "warmed"]
    name: str
    seconds: float = 0.0
    tokens: int = 0
    bytes: int = 0


Emit = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Do nothing."""


def safely(callback: Emit | None) -> Emit:
    """A callback whose errors are logged, so that they end no answer."""
    if callback is None:
        return ignore

    def emit(event: Event) -> None:
        try:
            callback(event)
        except Exception:
            _LOG.exception("on_event failed for the event %s", event.kind)

    return emit

"""What a build made: the bundle and the figures of each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shipping.exported import BuildBase, TrainedAdapter


@dataclass(frozen=True)
class BuildResult:
    """The bundle and the figures of each adapter, and of a base that was continued on text, as JSON values.

    `base` and `trained` are what a build exported; `prompts` has a short prompt of each adapter's task. `seconds` is
    the time of an export as a whole; a build has that of each adapter's training among its figures.
    """

    bundle: Path
    adapters: Mapping[str, Mapping[str, Any]]
    domain: Mapping[str, Any] = field(default_factory=dict)
    base: BuildBase | None = None
    trained: Mapping[str, TrainedAdapter] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        domain = {"domain": self.domain} if self.domain else {}
        whole = {} if self.seconds is None else {"seconds": self.seconds}
        return {"bundle": str(self.bundle), **whole, **domain, "adapters": self.adapters}

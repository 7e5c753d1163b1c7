"""The result of a build: the bundle, and the figures and losses of each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgetune_runtime

if TYPE_CHECKING:
    from edgetune.shipping.exported import BuildBase, TrainedAdapter
    from edgetune.training.job import Point


@dataclass(frozen=True)
class Build:
    """The bundle and the figures of each adapter, and of a base that was continued on text, as JSON values.

    `losses` has the training and validation loss of each adapter at each validation; an export has none. `base` and
    `trained` are what a build exported; `prompts` has a short prompt of each adapter's task without tools. `seconds` is
    the time of an export as a whole; a build has that of each adapter's training among its figures. `router` has the
    figures of the router.

    If a launcher runs a build in several processes, the first one exports, and the others have no figures.
    """

    bundle: Path
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    losses: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    domain: Mapping[str, Any] = field(default_factory=dict)
    base: BuildBase | None = field(default=None, repr=False)
    trained: Mapping[str, TrainedAdapter] = field(default_factory=dict, repr=False)
    prompts: Mapping[str, str] = field(default_factory=dict, repr=False)
    seconds: float | None = None
    router: Mapping[str, Any] | None = None

    def open(self, **options: Any) -> edgetune_runtime.Runtime:  # noqa: ANN401 - those of Runtime.open
        """Open the bundle with the runtime; the options are those of `edgetune_runtime.Runtime.open`."""
        return edgetune_runtime.Runtime.open(self.bundle, **options)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        domain = {"domain": self.domain} if self.domain else {}
        seconds = {} if self.seconds is None else {"seconds": self.seconds}
        router = {} if self.router is None else {"router": self.router}
        return {"bundle": str(self.bundle), **seconds, **domain, **router, "adapters": self.figures}

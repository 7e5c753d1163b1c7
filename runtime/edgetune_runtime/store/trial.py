"""Asks an installed version for its golden answers: the runtime of its own environment, in a confined process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, VerificationError, parsing
from edgetune_runtime.processes import child_process

from . import versions
from .kit import BUNDLE_FOLDER, Kit

_TIMEOUT_S = child_process.MAX_S + 60.0
"""The time that the process may compute on each core, and a minute to start."""


def golden_answers(prefix: Path, kit: Kit) -> dict[str, Any] | None:
    """The golden answers of each adapter as JSON values; None if the bundle has none.

    Raises VerificationError if one differs, or if the bundle cannot be opened on this machine.
    """
    folder = versions.path_of(prefix, kit.version)
    command = [str(folder / "venv/bin/python"), "-I", "-m", "edgetune_runtime", "check", str(folder / BUNDLE_FOLDER)]
    # The files were compared with their digests when the version was placed.
    command += ["--engine", kit.engines[0], *kit.opening.words(), "--json", "--no-verify", "--confined"]
    ended = child_process.run(command, timeout_s=_TIMEOUT_S)
    if ended.timeout_s is not None:
        message = f"version {kit.version} gave no golden answers in {_TIMEOUT_S:.0f} s"
        raise VerificationError(message, "see what slows the board down: edgetune-run doctor")
    if ended.code == NotFoundError.exit_code:
        return None
    if ended.code:
        reason = ended.last_line or "no reason is given"
        problem = f"it {ended.how}: {reason}" if ended.code < 0 else reason
        raise VerificationError(f"version {kit.version} fails its check: {problem}", "the previous version still runs")
    with parsing(f"version {kit.version} fails its check: it printed no answers", "the previous version still runs"):
        return dict(json.loads(ended.output))

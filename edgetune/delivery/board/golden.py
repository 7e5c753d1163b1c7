"""Asks an installed version for its golden answers, with the runtime in its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, VerificationError

from . import versions
from .kit import BUNDLE_FOLDER, Kit

_TIMEOUT_S = 600.0


def check(prefix: Path, kit: Kit) -> dict[str, Any] | None:
    """The golden answers of each adapter as JSON values; None if the bundle has none.

    Raises VerificationError if one differs, or if the bundle cannot be opened on this machine. NotFoundError if the
    kit has no bundle.
    """
    if kit.bundle is None:
        raise NotFoundError(f"version {kit.version} has no bundle", "make a kit without --no-bundle")
    folder = versions.path_of(prefix, kit.version)
    # The files were compared with their digests when the version was placed.
    command = [str(folder / "venv/bin/python"), "-I", "-m", "edgetune_runtime", "check", str(folder / BUNDLE_FOLDER)]
    try:
        done = subprocess.run(
            [*command, "--engine", kit.engines[0], *kit.opening.words(), "--json", "--no-verify"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        message = f"version {kit.version} gave no golden answers in {_TIMEOUT_S:.0f} s"
        raise VerificationError(message, "see what slows the board down: edgetune-run doctor") from error
    if done.returncode == NotFoundError.exit_code:
        return None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(f"version {kit.version} fails its check: {reason}", "the version before still runs")
    found: dict[str, Any] = json.loads(done.stdout)
    return found

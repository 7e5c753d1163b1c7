"""Chooses the release for a device: the newest that its runtime can run, and that is rolled out to it already.

A release can be for a share of the devices. A device is among them or not by a hash of its id and the bundle, so that
it stays so when the share grows, and other bundles are for others first.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime import __version__
from edgetune_runtime.bundle import SCHEMA_VERSION
from edgetune_runtime.store.kit import version_key

from .release import Release

_MACHINE_ID = Path("/etc/machine-id")
_ID_LENGTH = 32


@dataclass(frozen=True)
class Choice:
    """The release that a device takes, and why not the newest one; with `held_back` and not `fits`, there is none."""

    release: Release
    held_back: str | None = None
    fits: bool = True


def choose(newest: Release, read: Callable[[int], Release], device: str, floor: int) -> Choice:
    """The release for this device: `newest`, or one of the older ones that it names, which `read` gives by version.

    None before `floor` is taken.
    """
    reason = why_not_run(newest) or _why_not_yet(newest, device)
    if reason is None:
        return Choice(newest)
    for version in newest.older:
        if version < floor:
            break
        release = read(version)
        if why_not_run(release) is None and _why_not_yet(release, device) is None:
            return Choice(release, reason)
    return Choice(newest, reason, fits=False)


def why_not_run(release: Release) -> str | None:
    """Why this runtime cannot run a release; None if it can."""
    needs = f"release {release.version} of {release.name} needs edgetune-runtime"
    if version_key(release.min_runtime) > version_key(__version__):
        return f"{needs} {release.min_runtime}, this is {__version__}"
    if release.manifest_schema > SCHEMA_VERSION:
        return f"{needs} for manifests of schema {release.manifest_schema}"
    return None


def device_id(name: str, remembered: str) -> str:
    """The id of this device for a bundle: a hash of the system's id, which is not told to others; else a random one.

    `remembered` is a random one that was made before.
    """
    try:
        machine = _MACHINE_ID.read_text(encoding="utf-8").strip()
        bytes.fromhex(machine)
    except (OSError, ValueError):
        machine = ""
    if len(machine) != _ID_LENGTH:
        return remembered or secrets.token_hex(_ID_LENGTH // 2)
    return hashlib.sha256(f"edgetune {name} {machine}".encode()).hexdigest()[:_ID_LENGTH]


def _why_not_yet(release: Release, device: str) -> str | None:
    """Why a release is not for this device yet; None if it is."""
    place = int(hashlib.sha256(f"{device} {release.bundle}".encode()).hexdigest()[:8], 16) / 2**32
    if place < release.share:
        return None
    title = f"release {release.version} of {release.name}"
    return f"{title} is for {release.share:.0%} of the devices so far, and this is not one of them"

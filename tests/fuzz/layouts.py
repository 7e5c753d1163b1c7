"""Opens changed manifests of OCI artifacts, and changed indexes of image layouts, by pulling their bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from .names import LAYOUT

Open = Callable[[bytes], None]
INDEX = "index.json"
TAG = "v1"
_BLOBS = "blobs/sha256"


def artifact(folder: Path) -> Open:
    """Pulls an artifact whose manifest was changed, by the digest that it has then."""
    blobs = folder / LAYOUT / _BLOBS

    def open_changed(data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        _pull(folder, f"@sha256:{digest}")

    return open_changed


def index(folder: Path) -> Open:
    """Pulls by its tag from a layout whose index was changed."""

    def open_changed(data: bytes) -> None:
        (folder / LAYOUT / INDEX).write_bytes(data)
        _pull(folder, f":{TAG}")

    return open_changed


def only_artifact(layout: Path) -> bytes:
    """The artifact manifest in a layout."""
    (described,) = json.loads((layout / INDEX).read_bytes())["manifests"]
    return (layout / _BLOBS / described["digest"].removeprefix("sha256:")).read_bytes()


def _pull(folder: Path, version: str) -> None:
    from edgetune.common.progress import Progress  # noqa: PLC0415
    from edgetune.delivery.oci.transfer import open_store, pull  # noqa: PLC0415 - each worker imports what it needs

    with open_store(f"oci-layout:{folder / LAYOUT}{version}", None, insecure=False) as store:
        pull(store, folder / "pulled", Progress(quiet=True))

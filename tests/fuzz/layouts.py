"""Opens changed manifests of OCI artifacts, of what refers to them, and indexes of layouts, by pulling their bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .names import KEYS, LAYOUT, RELEASED

if TYPE_CHECKING:
    from edgetune.delivery.oci.release_metadata import TrustedChannel

Open = Callable[[bytes], None]
INDEX = "index.json"
TAG = "v1"
_BLOBS, _NAME = "blobs/sha256", "org.opencontainers.image.ref.name"


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


def released(find: Callable[[Path], Path], folder: Path) -> Open:
    """Pulls a bundle and checks its release, of which the file that `find` gives was changed."""
    from edgetune.delivery.oci.release_metadata import TrustedChannel  # noqa: PLC0415 - as below

    path = find(folder / RELEASED)
    trusted = TrustedChannel((folder / KEYS / "1.root.json").read_bytes(), "stable")

    def open_changed(data: bytes) -> None:
        path.write_bytes(data)
        _pull(folder, f":{TAG}", RELEASED, trusted)

    return open_changed


def read(find: Callable[[Path], Path], layout: Path) -> bytes:
    return find(layout).read_bytes()


def only_artifact(layout: Path) -> Path:
    """The artifact manifest in a layout."""
    return _blob_of(layout, lambda _: True)


def referrers(layout: Path) -> Path:
    """The list of what refers to the only bundle in a layout."""
    return _blob_of(layout, _listed)


def release_metadata(layout: Path) -> Path:
    """The manifest that lists the metadata of the only release in a layout."""
    (described,) = json.loads(referrers(layout).read_bytes())["manifests"]
    return layout / _BLOBS / str(described["digest"]).removeprefix("sha256:")


def _listed(described: Mapping[str, Any]) -> bool:
    return str(described["annotations"][_NAME]).startswith("sha256-")


def _blob_of(layout: Path, is_wanted: Callable[[Mapping[str, Any]], bool]) -> Path:
    (described,) = filter(is_wanted, json.loads((layout / INDEX).read_bytes())["manifests"])
    return layout / _BLOBS / str(described["digest"]).removeprefix("sha256:")


def _pull(folder: Path, version: str, layout: str = LAYOUT, trusted: TrustedChannel | None = None) -> None:
    from edgetune.common.progress import Progress  # noqa: PLC0415
    from edgetune.delivery.oci.transfer import open_store, pull  # noqa: PLC0415 - each worker imports what it needs

    with open_store(f"oci-layout:{folder / layout}{version}", None, insecure=False) as store:
        pull(store, folder / "pulled", Progress(quiet=True), trusted_channel=trusted)

"""An artifact in an OCI image layout: a folder with blobs by digest and an index of tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import FileEntry, entry_of
from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.update.fetch import limited
from edgetune_runtime.wording import first_of
from filelock import FileLock

from edgetune.common.files import is_whole, put_whole, write_file

from .artifact import (
    DIGEST,
    MANIFEST_TYPE,
    MOST_ARTIFACT_MANIFEST_BYTES,
    described_entry,
    descriptor,
    index_of,
)
from .reference import Reference

_LAYOUT_NAME, _INDEX_NAME = "oci-layout", "index.json"
_MOST_INDEX_BYTES = 16 << 20
_TAG = "org.opencontainers.image.ref.name"


class ImageLayout:
    """The artifact of a reference in a layout; the folder is made at the first write."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._folder = Path(reference.place)

    def at(self, reference: Reference) -> ImageLayout:
        """The place of another artifact in this layout."""
        return ImageLayout(reference)

    def has_blob(self, entry: FileEntry) -> bool:
        """Whether the layout has this file, undamaged."""
        return is_whole(self._blob(entry.sha256), entry)

    def put_blob(self, entry: FileEntry, source: Path | bytes) -> None:
        """Add a file; VerificationError if its digest is another one."""
        put_whole(self._blob(entry.sha256), entry, source)

    def blocks(self, entry: FileEntry, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file from an offset on, at most its size; NotFoundError if there is none."""
        path = self._blob(entry.sha256)
        try:
            with open_regular(path, follows_links=True) as file:
                file.seek(offset)
                yield from limited(file, entry.bytes - offset)
        except OSError as error:
            raise NotFoundError(
                f"cannot read {path}: {error.strerror or error}", "push the bundle there again"
            ) from error

    def read_manifest(self) -> bytes:
        """The artifact's manifest; NotFoundError if there is none; one that is too large is cut off."""
        digest = self.reference.digest or self._digest_of_tag()
        return b"".join(self.blocks(FileEntry(digest, MOST_ARTIFACT_MANIFEST_BYTES)))

    def read_referrers(self) -> list[bytes]:
        """The index of what refers to the artifact, which has a tag here; NotFoundError if there is none."""
        return [self.at(self.reference.of_referrers()).read_manifest()]

    def put_manifest(self, data: bytes, media_type: str = MANIFEST_TYPE) -> bool:
        """Add the artifact's manifest under its tag, if it has one, which may have been another artifact's; False."""
        entry = entry_of(data)
        self.put_blob(entry, data)
        _write(self._folder / _LAYOUT_NAME, {"imageLayoutVersion": "1.0.0"})
        if self.reference.tag is None:
            return False
        described = {**descriptor(media_type, entry), "annotations": {_TAG: self.reference.tag}}
        with FileLock(self._folder / ".lock"):
            others = [item for item in self._index() if _tag_of(item) != self.reference.tag]
            _write(self._folder / _INDEX_NAME, index_of(others, described))
        return False

    def _blob(self, digest: str) -> Path:
        return self._folder / "blobs/sha256" / digest

    def _digest_of_tag(self) -> str:
        tags = {_tag_of(item): item["digest"] for item in self._index()}
        if not (self._folder / _INDEX_NAME).exists():
            raise NotFoundError(f"there is no image layout {self._folder}", "check the path")
        if self.reference.tag not in tags:
            names = first_of(sorted(filter(None, tags)), 10, ", ") or "none"
            message = f"{self._folder} has no tag {self.reference.tag}"
            raise NotFoundError(message, f"its tags are: {names}")
        return str(tags[self.reference.tag]).removeprefix(DIGEST)

    def _index(self) -> list[dict[str, Any]]:
        """The artifacts of the layout, none if it is new; VerificationError if its index is damaged."""
        path = self._folder / _INDEX_NAME
        try:
            with open_regular(path, follows_links=True) as file:
                artifacts = json.loads(file.read(_MOST_INDEX_BYTES))["manifests"]
            for item in artifacts:
                described_entry(item)
                if not isinstance(_tag_of(item), str | None):
                    raise TypeError("a tag is not text")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise VerificationError(f"{path} is damaged: {error}", "restore it from a backup") from error
        return list(artifacts)


def _tag_of(described: dict[str, Any]) -> str | None:
    return (described.get("annotations") or {}).get(_TAG)


def _write(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=1) + "\n", is_durable=True)

"""Writes wheels and other zip files reproducibly: the same contents give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Mapping

# The earliest time that a zip file can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


def zip_bytes(contents: Mapping[str, bytes], *, compressed: bool = False) -> bytes:
    """A zip file of the contents by path, in this order; if compressed, its bytes also depend on zlib's version."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = 3, (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, data, archive.compression, 9)
    return out.getvalue()


def wheel_bytes(
    files: Mapping[str, bytes], metadata: Mapping[str, bytes], info: str, head: str, *, compressed: bool = False
) -> bytes:
    """A wheel of a package's files, and of its metadata in the folder `info` (NAME-VERSION.dist-info).

    `head` is the text of the file WHEEL after the version of the format.
    """
    # The specification recommends that the metadata come last in the archive.
    contents = dict(sorted(files.items()))
    contents |= {f"{info}/{name}": data for name, data in sorted(metadata.items())}
    contents[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\n{head}".encode()
    record = f"{info}/RECORD"
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    return zip_bytes(contents, compressed=compressed)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

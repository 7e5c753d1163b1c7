"""Reproducible zip files: the same contents give the same bytes, whenever and wherever they are written."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

_DATE = (1980, 1, 1, 0, 0, 0)


def zip_bytes(contents: Mapping[str, bytes]) -> bytes:
    """A zip file of the contents by path, in this order. Not compressed, as zlib's output depends on its version."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return out.getvalue()

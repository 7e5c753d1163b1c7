"""A store of versions as an install leaves it, without a kit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgetune_runtime.store.durable import replace_link
from edgetune_runtime.store.kit import KIT_NAME


def switch_to(prefix: Path, version: str, bundle: Path) -> Path:
    """Make a version of hard links to a bundle's files the current one; the bundle's path there."""
    shutil.copytree(bundle, prefix / "versions" / version / "bundle", copy_function=os.link)
    (prefix / "versions" / version / KIT_NAME).touch()
    replace_link(prefix / "current", f"versions/{version}")
    return prefix / "current/bundle"

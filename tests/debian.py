"""Debian systems for tests, made by mmdebstrap once and kept in the user's cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import platformdirs

SUITE = "trixie"
"""Debian 13, the system of Raspberry Pi OS, with Python 3.13."""


def lacking(programs: Mapping[str, str]) -> list[str]:
    """One line each for root's rights and for Debian's packages that are missing; `programs` maps names to packages."""
    rights = [] if os.geteuid() == 0 else ["root's rights: run it with sudo"]
    packages = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    return rights + ([f"Debian's packages: apt install {' '.join(packages)}"] if packages else [])


def cached(
    kind: str, version: int, packages: Sequence[str], *options: str, finish: Callable[[Path], None] = lambda root: None
) -> Path:
    """The folder of a system with these packages; made at the first call, which needs the network.

    `options` are those of mmdebstrap; `finish` completes the system before it is kept.
    """
    root = Path(platformdirs.user_cache_dir("edgetune")) / kind / f"{SUITE}-{version}"
    if not root.is_dir():
        partial = root.with_name(f"{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        command = ["mmdebstrap", *options, f"--include={','.join(packages)}", SUITE, str(partial)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        finish(partial)
        partial.rename(root)
    return root

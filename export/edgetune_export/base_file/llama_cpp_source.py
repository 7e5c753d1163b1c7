"""Downloads the source distribution of llama-cpp-python with pip, and checks its digest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import NotFoundError, VerificationError

# Digests of reviewed source distributions; for other versions only pip's own check against the index applies.
SDIST_SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}


def download_source(version: str, folder: Path, alternative: str = "") -> Path:
    """The .tar.gz of this version, downloaded to `folder`, or taken from pip's own cache.

    Raises NotFoundError if pip cannot download it, VerificationError if its digest is not the known one; `alternative`
    is what to do then, other than repairing the connection.
    """
    requirement = f"llama-cpp-python=={version}"
    # -P: a pip.py in the working folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary", "llama-cpp-python", requirement]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if process.returncode != 0 or not archives:
        message = f"pip could not download the source of {requirement}"
        raise NotFoundError(message, _or("connect to the network once", alternative))
    expected = SDIST_SHA256.get(version)
    if expected and sha256_of(archives[0]) != expected:
        message = f"the source of {requirement} does not have the expected sha256 {expected}"
        raise VerificationError(message, _or("check pip's index", alternative))
    return archives[0]


def _or(remedy: str, alternative: str) -> str:
    return f"{remedy}, or {alternative}" if alternative else remedy

"""Downloads the source distribution of llama-cpp-python with pip, which checks its digest, and unpacks parts of it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from edgetune_runtime.errors import NotFoundError, VerificationError

# Digests of reviewed source distributions; for other versions only pip's own check against the index applies.
SDIST_SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
_MISMATCH = "DO NOT MATCH THE HASHES"


def download_source(version: str, folder: Path, alternative: str = "") -> Path:
    """The .tar.gz of this version, downloaded to `folder`, or taken from pip's own cache.

    Raises NotFoundError if pip cannot download it, VerificationError if its digest is not the known one; `alternative`
    is what to do then, other than repairing the connection.
    """
    requirement, expected = f"llama-cpp-python=={version}", SDIST_SHA256.get(version)
    # pip runs code of the distribution to read its metadata, and checks a digest before that.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{expected}" if expected else requirement, encoding="utf-8")
    # -P: a pip.py in the working folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary", "llama-cpp-python", "--requirement", str(requirements)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if process.returncode == 0 and archives:
        return archives[0]
    if expected and _MISMATCH in process.stderr:
        message = f"the source of {requirement} does not have the expected sha256 {expected}"
        raise VerificationError(message, _or("check pip's index", alternative))
    message = f"pip could not download the source of {requirement}"
    raise NotFoundError(message, _or("connect to the network once", alternative))


def unpack_source(archive: Path, folder: Path, parts: Iterable[str]) -> Path:
    """Unpack the files whose paths in the distribution begin with one of `parts`; returns the distribution's folder.

    Links, and what would be outside the folder, are left out.
    """
    root = archive.name.removesuffix(".tar.gz")
    prefixes = tuple(f"{root}/{part}" for part in parts)
    # Not with extractall: its filters, which refuse such members, came with Python 3.11.4.
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() and member.name.startswith(prefixes) else None
            if file is not None and ".." not in PurePosixPath(member.name).parts:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
    return folder / root


def _or(remedy: str, alternative: str) -> str:
    return f"{remedy}, or {alternative}" if alternative else remedy

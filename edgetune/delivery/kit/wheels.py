"""Collects the wheels that a board needs: the runtime's own, that of llama.cpp, and what pip downloads."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, VerificationError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from edgetune.delivery.board.errors import UnreachableError
from edgetune.progress import Progress

from .platforms import Platform
from .runtime_wheel import DISTRIBUTION

LLAMA = "llama-cpp-python"
_PIP = "pip"
"""It installs the other wheels: Debian's Python comes without it."""
# Dependencies of parts that the runtime never imports: downloads from a model hub, and tools that change models.
_NEVER_IMPORTED = {
    "onnxruntime": {"flatbuffers", "packaging", "protobuf"},
    "tokenizers": {"huggingface-hub"},
}
_NO_MATCH = "No matching distribution found for "
_GLIBC = re.compile(r"manylinux_2_(\d+)_")


@dataclass(frozen=True)
class Wheel:
    """A wheel and its metadata."""

    path: Path
    metadata: Message

    @property
    def name(self) -> str:
        """The normalized name of the distribution."""
        return canonicalize_name(self.metadata["Name"])

    @property
    def glibc_minor(self) -> int:
        """The oldest glibc 2.N that the wheel runs with; 0 if it has no native code."""
        return min((int(minor) for minor in _GLIBC.findall(self.path.name)), default=0)

    @property
    def installed_bytes(self) -> int:
        """The size on disk once installed, with modules compiled, which doubles their size."""
        with zipfile.ZipFile(self.path) as archive:
            return sum(item.file_size * (2 if item.filename.endswith(".py") else 1) for item in archive.infolist())

    def text(self, name: str) -> str:
        """The texts of all files with this name in the wheel's metadata folder and below, joined."""
        with zipfile.ZipFile(self.path) as archive:
            found = [item for item in archive.namelist() if ".dist-info/" in item and name in item.upper()]
            return "\n".join(archive.read(item).decode(errors="replace") for item in found)


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's metadata; VerificationError if the file is no wheel."""
    try:
        parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            (name,) = (item for item in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", item))
            return Wheel(path, message_from_bytes(archive.read(name)))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise VerificationError(f"{path} is not a wheel: {error}", "download or build it again") from error


def require_wheel_of(name: str, path: Path, platform: Platform) -> None:
    """Raise IncompatibleError unless `path` is a wheel of `name` that runs on the platform.

    VerificationError if it is no wheel.
    """
    wheel = read_wheel(path)
    *_, tags = parse_wheel_filename(path.name)
    if wheel.name != name:
        raise IncompatibleError(f"{path.name} is a wheel of {wheel.name}", f"give one of {name}")
    if not any(map(platform.runs, tags)):
        message = f"{path.name} does not run with Python {platform.python} on {platform.name}"
        raise IncompatibleError(message, f"give a wheel of {name} for this, or leave out --wheel to build one")


def collect(
    extras: Sequence[str], platform: Platform, given: Sequence[Path], folder: Path, progress: Progress
) -> list[Wheel]:
    """The wheels of the runtime with `extras`, of all that they import, and of pip, sorted by name.

    `given` are the wheels that are not downloaded, of one name the last: the runtime's, llama-cpp-python's if an extra
    needs it, and those of an earlier kit. The others have the versions that are installed here, with which bundles
    were checked, or else the newest; they are downloaded into `folder`.
    """
    found = {wheel.name: wheel for wheel in map(read_wheel, given)}
    done: dict[str, set[str]] = {}
    pending = [Requirement(f"{DISTRIBUTION}[{','.join(extras)}]"), Requirement(_PIP)]
    while pending:
        _download([item for item in pending if canonicalize_name(item.name) not in found], platform, folder, progress)
        found |= {wheel.name: wheel for wheel in map(read_wheel, sorted(folder.glob("*.whl")))}
        following: list[Requirement] = []
        for requirement in pending:
            name = canonicalize_name(requirement.name)
            wheel = found[name]
            _require_version(wheel, requirement)
            if name not in done or not requirement.extras <= done[name]:
                done[name] = done.get(name, set()) | requirement.extras
                following += dependencies(wheel, done[name], platform)
        pending = following
    return [found[name] for name in sorted(done)]


def dependencies(wheel: Wheel, extras: set[str], platform: Platform) -> Iterator[Requirement]:
    """What a wheel with these extras requires on the platform; pip itself would ask for this machine's markers."""
    never = _NEVER_IMPORTED.get(wheel.name, set())
    for text in wheel.metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) in never:
            continue
        environments = [{**platform.markers(), "extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def _require_version(wheel: Wheel, requirement: Requirement) -> None:
    found = wheel.metadata["Version"]
    if not requirement.specifier.contains(found, prereleases=True):
        message = f"{wheel.path.name} does not meet {requirement}"
        raise IncompatibleError(message, f"install a fitting {requirement.name} here, then make the kit again")


def _download(requirements: Sequence[Requirement], platform: Platform, folder: Path, progress: Progress) -> None:
    wanted = {canonicalize_name(item.name): item for item in requirements}
    if not wanted:
        return
    progress.say(f"downloading wheels for {platform.name} and Python {platform.python}: {', '.join(sorted(wanted))}")
    pinned = {name: _pinned(item) for name, item in wanted.items()}
    try:
        _pip_download(list(pinned.values()), platform, folder)
    except IncompatibleError:
        # A release that is installed here may have no wheel for another Python.
        for name, item in wanted.items():
            try:
                _pip_download([pinned[name]], platform, folder)
            except IncompatibleError:
                _pip_download([f"{item.name}{item.specifier}"], platform, folder)


def _pinned(requirement: Requirement) -> str:
    try:
        installed = version(requirement.name).partition("+")[0]
    except PackageNotFoundError:
        return f"{requirement.name}{requirement.specifier}"
    fits = requirement.specifier.contains(installed, prereleases=True)
    return f"{requirement.name}=={installed}" if fits else f"{requirement.name}{requirement.specifier}"


def _pip_download(requirements: Sequence[str], platform: Platform, folder: Path) -> None:
    # Not by importlib.util: a look for the module pip makes setuptools give up its own distutils in this process.
    if not any(distributions(name=_PIP)):
        raise IncompatibleError("pip is not installed here", "run: python -m ensurepip")
    options = ("--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder))
    command = [sys.executable, "-P", "-m", _PIP, "download", *options, *platform.pip_options(), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    missing = next((line.removeprefix(_NO_MATCH) for line in lines if line.startswith(_NO_MATCH)), None)
    if missing is not None:
        message = f"there is no wheel of {missing} for Python {platform.python} on {platform.machine}"
        raise IncompatibleError(message, "choose another --python, or check the network")
    reason = (lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise UnreachableError(f"pip could not download {requirements[0]}: {reason}", "check the network")

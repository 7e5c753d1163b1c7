"""Collects the wheels that a board needs: the runtime's own, that of llama.cpp, and what pip downloads."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from edgetune_export.base_file.cache import make_in_cache
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UnreachableError, VerificationError
from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from edgetune.common.progress import Progress
from edgetune.common.waiting_lock import waiting_lock

from .runtime_wheel import DISTRIBUTION
from .target_python import TargetPython

LLAMA = "llama-cpp-python"
_PIP = "pip"
"""It installs the other wheels: Debian's Python comes without it."""
# Dependencies of parts that the runtime never imports: downloads from a model hub, and tools that change models.
_NEVER_IMPORTED = {
    "onnxruntime": {"flatbuffers", "packaging", "protobuf"},
    "tokenizers": {"huggingface-hub"},
}
_DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What zipfile raises at archives, also at parts that seem to be encrypted or compressed in another way."""
_IN_USE_S = 86_400
"""Seconds after which nobody copies a wheel any more that was collected."""
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

    def meets(self, requirement: Requirement) -> bool:
        """Whether this is a wheel of the required distribution, in a version that it allows."""
        is_same = self.name == canonicalize_name(requirement.name)
        return is_same and requirement.specifier.contains(self.metadata["Version"], prereleases=True)

    @property
    def glibc_minor(self) -> int:
        """The oldest glibc 2.N that the wheel runs with; 0 if it has no native code."""
        return min((int(minor) for minor in _GLIBC.findall(self.path.name)), default=0)

    @property
    def installed_bytes(self) -> int:
        """The size on disk once installed, with modules compiled, which doubles their size."""
        with zipfile.ZipFile(self.path) as archive:
            return sum(item.file_size * (2 if item.filename.endswith(".py") else 1) for item in archive.infolist())


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's metadata; NotFoundError without the file, VerificationError if it is not a wheel."""
    if not path.is_file():
        raise NotFoundError(f"no wheel {path}", "check the path")
    try:
        parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            (name,) = (item for item in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", item))
            return Wheel(path, message_from_bytes(archive.read(name)))
    except _DAMAGED as error:
        raise VerificationError(f"{path} is not a wheel: {error}", "download or build it again") from error


def require_llama_wheel(path: Path, target: TargetPython) -> None:
    """Raise IncompatibleError unless `path` is a wheel of llama-cpp-python that runs with the board's Python.

    VerificationError if it is not a wheel.
    """
    wheel = read_wheel(path)
    *_, tags = parse_wheel_filename(path.name)
    if wheel.name != LLAMA:
        raise IncompatibleError(f"{path.name} is a wheel of {wheel.name}", f"give one of {LLAMA}")
    if not any(map(target.runs, tags)):
        message = f"{path.name} does not run with Python {target.python} on {target.platform}"
        raise IncompatibleError(message, f"give a wheel of {LLAMA} for this, or leave out --wheel to build one")


def collect(
    extras: Sequence[str], target: TargetPython, local: Sequence[Path], cache: Path, progress: Progress
) -> list[Wheel]:
    """The wheels of the runtime with `extras`, of all that they import, and of pip, sorted by name.

    The `local` wheels are not downloaded: the runtime's, and llama-cpp-python's if an extra needs it. The others have
    the versions that are installed here, with which bundles were checked, or else the newest; they are downloaded into
    the folder `cache`, unless it has them. A second process waits for the first.
    """
    make_in_cache(cache)
    with waiting_lock(cache / ".lock", progress):
        return _collected(extras, target, local, cache, progress)


def _collected(
    extras: Sequence[str], target: TargetPython, local: Sequence[Path], cache: Path, progress: Progress
) -> list[Wheel]:
    wheels = {wheel.name: wheel for wheel in map(read_wheel, local)}
    extras_of: dict[str, set[str]] = {}
    pending = [Requirement(f"{DISTRIBUTION}[{','.join(extras)}]"), Requirement(_PIP)]
    while pending:
        missing = [item for item in pending if canonicalize_name(item.name) not in wheels]
        cached = [wheel for item in missing if (wheel := _cached(_pinned(item), cache)) is not None]
        wheels |= {wheel.name: wheel for wheel in cached}
        missing = [item for item in missing if canonicalize_name(item.name) not in wheels]
        wheels |= {wheel.name: wheel for wheel in _download(missing, target, cache, progress)}
        following: list[Requirement] = []
        for requirement in pending:
            name = canonicalize_name(requirement.name)
            wheel = wheels[name]
            if not wheel.meets(requirement):
                message = f"{wheel.path.name} does not meet {requirement}"
                raise IncompatibleError(message, f"install a fitting {requirement.name} here, then make the kit again")
            if name not in extras_of or not requirement.extras <= extras_of[name]:
                extras_of[name] = extras_of.get(name, set()) | requirement.extras
                following += dependencies(wheel, extras_of[name], target)
        pending = following
    return [wheels[name] for name in sorted(extras_of)]


def dependencies(wheel: Wheel, extras: set[str], target: TargetPython) -> Iterator[Requirement]:
    """What a wheel with these extras requires on the board; pip itself would ask for this machine's markers."""
    never = _NEVER_IMPORTED.get(wheel.name, set())
    for text in wheel.metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) in never:
            continue
        environments = [{**target.markers(), "extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def _pinned(requirement: Requirement) -> Requirement:
    """The requirement in the version that is installed here, if that meets it."""
    try:
        installed = version(requirement.name).partition("+")[0]
    except PackageNotFoundError:
        return requirement
    fits = requirement.specifier.contains(installed, prereleases=True)
    return Requirement(f"{requirement.name}=={installed}") if fits else requirement


def _project(path: Path) -> str | None:
    """The normalized name of a wheel's project; None for what others have put there under another name."""
    try:
        return parse_wheel_filename(path.name)[0]
    except InvalidWheelFilename:
        return None


def _cached(requirement: Requirement, cache: Path) -> Wheel | None:
    """The wheel in the cache that meets a requirement, used from now on; None if there is none, or if it is damaged."""
    for path in sorted(cache.glob("*.whl"), reverse=True):
        if _project(path) == canonicalize_name(requirement.name):
            with suppress(VerificationError, *_DAMAGED), zipfile.ZipFile(path) as archive:
                wheel = read_wheel(path)
                if wheel.meets(requirement) and archive.testzip() is None:
                    path.touch()
                    return wheel
    return None


def _download(
    requirements: Sequence[Requirement], target: TargetPython, cache: Path, progress: Progress
) -> list[Wheel]:
    """Download wheels into the cache, where they replace other versions that nobody copies any more."""
    names = sorted({canonicalize_name(item.name) for item in requirements})
    if not names:
        return []
    progress.say(f"downloading wheels for {target.platform} and Python {target.python}: {', '.join(names)}")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            _pip_download([_pinned(item) for item in requirements], target, folder)
        except IncompatibleError:
            # A release that is installed here may have no wheel for another Python.
            for item in requirements:
                try:
                    _pip_download([_pinned(item)], target, folder)
                except IncompatibleError:
                    _pip_download([item], target, folder)
        for old in cache.glob("*.whl"):
            if _project(old) in names and old.stat().st_mtime < time.time() - _IN_USE_S:
                old.unlink()
        return [read_wheel(path.replace(cache / path.name)) for path in Path(folder).glob("*.whl")]


def _pip_download(requirements: Sequence[Requirement], target: TargetPython, folder: str) -> None:
    # Not by importlib.util: a look for the module pip makes setuptools give up its own distutils in this process.
    if not any(distributions(name=_PIP)):
        raise IncompatibleError("pip is not installed here", "run: python -m ensurepip")
    options = ("--quiet", "--no-deps", "--disable-pip-version-check", "--dest", folder)
    words = [f"{item.name}{item.specifier}" for item in requirements]
    command = [sys.executable, "-P", "-m", _PIP, "download", *options, *target.pip_options(), *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return
    lines = [line.removeprefix("ERROR: ") for line in process.stderr.splitlines() if line.startswith("ERROR: ")]
    missing = next((line.removeprefix(_NO_MATCH) for line in lines if line.startswith(_NO_MATCH)), None)
    if missing is not None:
        message = f"there is no wheel of {missing} for Python {target.python} on {target.machine}"
        raise IncompatibleError(message, "choose another --python, or check the network")
    reason = (lines or process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    raise UnreachableError(f"pip could not download {words[0]}: {reason}", "check the network")

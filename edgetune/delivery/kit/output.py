"""Writes a kit as a folder or a tar file, with the list of its files; the same contents give the same bytes."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from edgetune_export.pack import check_not_current, check_not_in_bundle, folder_beside, require_own_files
from edgetune_runtime.bundle import entry_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.atomic import replacing, swap_in
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME, KitFile, read_kit

Contents = Mapping[str, Path | bytes]
"""Files by their path in the kit: where they are, or what is in them."""
_EXECUTABLE = "install.sh"


def size_of(source: Path | bytes) -> int:
    """The size of a file in bytes."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def opened(source: Path | bytes) -> IO[bytes]:
    """A file, open for reading."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def listed(contents: Contents) -> list[KitFile]:
    """Path, digest and size of each file, sorted by path."""
    entries = {path: entry_of(contents[path]) for path in sorted(contents)}
    return [KitFile(path, entry.sha256, entry.bytes) for path, entry in entries.items()]


def sums(files: list[KitFile], kit: bytes) -> bytes:
    """The text of SHA256SUMS."""
    digests = {file.path: file.sha256 for file in files} | {KIT_NAME: entry_of(kit).sha256}
    return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode()


def check_destination(out: Path) -> None:
    """UsageError unless `out` is a tar file, does not exist, is an empty folder, or is a kit without other files in it.

    UsageError for the current folder, and in a bundle, too.
    """
    if out.is_symlink() and not is_tar(out):
        raise UsageError(f"{out} is a link", "give the folder itself, or choose another --out")
    if out.exists() and is_tar(out) != out.is_file():
        raise UsageError(f"{out} exists and is not a {'file' if is_tar(out) else 'folder'}", "choose another --out")
    check_not_current(out)
    check_not_in_bundle(out)
    if is_tar(out) or not out.exists() or not any(out.iterdir()):
        return
    require_own_files(out, "kit", lambda kit: {KIT_NAME, SUMS_NAME, *(file.path for file in read_kit(kit).files)})


def is_tar(out: Path) -> bool:
    """Whether the kit is to be a tar file."""
    return out.suffix == ".tar"


def write(contents: Contents, out: Path, top: str) -> None:
    """Write the files to `out`, a folder, or a tar file with the folder `top`; it appears when it is complete.

    Replaces an existing kit. OutOfSpaceError if the disk is full.
    """
    if is_tar(out):
        with replacing(out) as temporary:
            _write_tar(contents, temporary, top)
        return
    with folder_beside(out) as temporary:
        _write_folder(contents, temporary)
        swap_in(temporary, out)


def _write_folder(contents: Contents, folder: Path) -> None:
    for name, source in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            shutil.copyfile(source, path)
        path.chmod(_mode(name))


def _write_tar(contents: Contents, path: Path, top: str) -> None:
    folders = {f"{top}/{parent}" for name in contents for parent in Path(name).parents if str(parent) != "."}
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in sorted({top, *folders}):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for name in sorted(contents):
            source = contents[name]
            info = tarfile.TarInfo(f"{top}/{name}")
            info.mode = _mode(name)
            info.size = size_of(source)
            with opened(source) as file:
                archive.addfile(info, file)


def _mode(name: str) -> int:
    return 0o755 if name == _EXECUTABLE else 0o644

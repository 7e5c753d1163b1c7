"""The files of a bundle: which belong to an adapter or a format, where they are, and the check of their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, printable

from .records import AdapterEntry, FileEntry, Manifest

_LONGEST_PATH_BYTES = 200
"""File systems have names of up to 255 bytes, also for what is written beside a file until it is complete."""
_DEEPEST_PATH = 16


def verify_files(bundle: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare size and sha256 of `names` (default: all files) with the manifest; VerificationError if one differs."""
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise VerificationError(f"the manifest has no digest for {name}", COPY_BUNDLE_AGAIN)
        entry = manifest.files[name]
        path = resolve(bundle, name)
        if not path.is_file():
            raise VerificationError(f"{name} is missing from bundle {bundle}", COPY_BUNDLE_AGAIN)
        size = path.stat().st_size
        if size != entry.bytes:
            message = f"{name} has {size} bytes, the manifest says {entry.bytes}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        if sha256_of(path) != entry.sha256:
            raise VerificationError(f"{name} does not match its digest in the manifest", COPY_BUNDLE_AGAIN)


@contextmanager
def unchanged(bundle: Path, names: Iterable[str]) -> Iterator[None]:
    """VerificationError if one of the files is another one, or was written to, by the end of the block.

    The engines open files by their paths, also those that were compared with their digests before.
    """
    before = {name: _identity(bundle / name) for name in names}
    yield
    for name, identity in before.items():
        if _identity(bundle / name) != identity:
            raise VerificationError(f"{name} was changed while it was read from {bundle}", "open the bundle again")


class VerifiedFiles:
    """Remembers which files match their digests, until they are written to or replaced. Thread-safe."""

    def __init__(self) -> None:
        self._identities: dict[tuple[Path, str], tuple[int, ...]] = {}

    @contextmanager
    def reading(self, bundle: Path, manifest: Manifest, name: str) -> Iterator[Path]:
        """The path of a file that the block reads; VerificationError if it is not, or not to the end, as its digest."""
        path, key = resolve(bundle, name), (bundle / name, manifest.files[name].sha256)
        with unchanged(bundle, [name]):
            identity = _identity(path)
            if identity is None or self._identities.get(key) != identity:
                verify_files(bundle, manifest, [name])
            yield path
        if identity is not None:
            self._identities[key] = identity


def _identity(path: Path) -> tuple[int, ...] | None:
    """What differs between two files, and of one file after it was written to or renamed; None for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def files_of(manifest: Manifest, entry: AdapterEntry) -> list[str]:
    """The files of an adapter: those that it names, and all in the folders of its merged models."""
    named = {*entry.files.values(), *entry.shared_files}
    folders = {PurePosixPath(file).parent for engine, file in entry.files.items() if entry.is_merged(engine)}
    return [name for name in manifest.files if name in named or PurePosixPath(name).parent in folders]


def without_adapter(manifest: Manifest, name: str) -> Manifest:
    """The manifest without an adapter, without the files that only it uses, and without a router that chooses it."""
    removed, router = {*files_only_of(manifest, manifest.adapter(name))}, manifest.router
    if router is not None and (name == router.below or any(name in call.adapters for call in router.calls.values())):
        removed, router = {*removed, router.file}, None
    adapters = {other: entry for other, entry in manifest.adapters.items() if other != name}
    files = {file: entry for file, entry in manifest.files.items() if file not in removed}
    return replace(manifest, adapters=adapters, files=files, router=router)


def of_formats(manifest: Manifest, formats: Iterable[str]) -> Manifest:
    """The manifest with these formats, and without the files that only the others use."""
    kept, unwanted = [*formats], [name for name in manifest.base.files if name not in {*formats}]
    used = {file for name in kept for file in files_of_format(manifest, name)}
    removed = {file for name in unwanted for file in files_of_format(manifest, name)} - used

    def only(by_format: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in by_format.items() if name not in unwanted}

    return replace(
        manifest,
        base=replace(manifest.base, files=only(manifest.base.files)),
        adapters={
            name: replace(entry, files=only(entry.files), shapes=only(entry.shapes))
            for name, entry in manifest.adapters.items()
        },
        files={file: entry for file, entry in manifest.files.items() if file not in removed},
    )


def with_present_formats(manifest: Manifest, is_present: Callable[[str], bool]) -> Manifest:
    """The manifest without the formats of which no file is present, as a device may have one format only.

    All formats if no file of any is. A format with some of its files is damaged, and not left out.
    """
    present = [
        name
        for name, file in manifest.base.files.items()
        if is_present(file) or any(map(is_present, files_of_format(manifest, name)))
    ]
    return of_formats(manifest, present) if 0 < len(present) < len(manifest.base.files) else manifest


def files_of_format(manifest: Manifest, name: str) -> list[str]:
    """The files of a format: the base's and the adapters', and the files beside one of them that nothing else names."""
    by_format = [manifest.base.files, *(adapter.files for adapter in manifest.adapters.values())]
    named = [files[name] for files in by_format if name in files]
    others = {file for files in by_format for other, file in files.items() if other != name}
    others |= {file for adapter in manifest.adapters.values() for file in adapter.shared_files}
    shared = folders_of(others)
    folders = {str(PurePosixPath(file).parent) for file in named} - shared
    beside = [file for file in manifest.files if folders & folders_of([file])]
    return list(dict.fromkeys([*named, *beside]))


def files_beside(manifest: Manifest, file: str) -> list[str]:
    """All files in the folder of a model and below it, which are all that the model can have."""
    folder = "".join(file.rpartition("/")[:2])
    return [name for name in manifest.files if name.startswith(folder)]


def bytes_of_model(files: Mapping[str, FileEntry], name: str) -> int:
    """The size of a base, a merged model or an adapter: that of its file, and of one with weights beside it."""
    return sum(part.bytes for part in _parts_of_model(files, name))


def digest_of_model(files: Mapping[str, FileEntry], name: str) -> str:
    """Hex sha256 of a base, a merged model or an adapter; graphs of models with other weights may be the same file."""
    first, *others = (part.sha256 for part in _parts_of_model(files, name))
    return hashlib.sha256(" ".join([first, *others]).encode()).hexdigest() if others else first


def files_only_of(manifest: Manifest, entry: AdapterEntry) -> list[str]:
    """The files of an adapter that nothing else in the bundle uses."""
    others = [other for other in manifest.adapters.values() if other is not entry]
    used = {file for other in others for file in (*other.files.values(), *other.shared_files)}
    used |= {*manifest.base.files.values()}
    folders = {PurePosixPath(file).parent for file in used}
    named = {*entry.files.values(), *entry.shared_files}
    return [
        name
        for name in files_of(manifest, entry)
        if name not in used and (name in named or PurePosixPath(name).parent not in folders)
    ]


def pinned(bundle: Path) -> Path:
    """The bundle's own folder, where it or the folder above it is a link that a switch of versions changes."""
    # Unlike `Path.resolve`, this does not raise for links that lead to each other.
    return Path(os.path.realpath(bundle)) if bundle.is_symlink() or bundle.parent.is_symlink() else bundle


def bundle_path(path: str) -> str:
    """`path`, if it can be one of a file in a bundle; ValueError for one that is outside, too long or too deep.

    What is made of the folders above a file grows with the square of its depth.
    """
    parts = path.split("/")
    if {"", ".", ".."} & {*parts} or "\\" in path or path != printable(path):
        raise ValueError(f"it names {path[:80]!r}, which is outside the bundle, or no plain path")
    if len(path.encode()) > _LONGEST_PATH_BYTES or len(parts) > _DEEPEST_PATH:
        raise ValueError(f"it names {path[:80]!r}, which is too long or in too many folders")
    return path


def folders_of(paths: Iterable[str]) -> set[str]:
    """The folders above these files, up to "."."""
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents}


def resolve(bundle: Path, name: str) -> Path:
    """The path of file `name` in the bundle; VerificationError when it points outside, even through a symbolic link."""
    try:
        root = bundle.resolve()
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:
        # Links that lead to each other.
        raise VerificationError(f"cannot find {name} in the bundle {bundle}: {error}", COPY_BUNDLE_AGAIN) from error
    if not path.is_relative_to(root):
        raise VerificationError(f"{name} points outside the bundle {bundle}", "do not use this bundle")
    return path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(source: Path | bytes) -> FileEntry:
    """Digest and size of a file, or of the bytes of one."""
    if isinstance(source, bytes):
        return FileEntry(hashlib.sha256(source).hexdigest(), len(source))
    return FileEntry(sha256_of(source), source.stat().st_size)


def _parts_of_model(files: Mapping[str, FileEntry], name: str) -> list[FileEntry]:
    return [files[part] for part in (name, f"{name}.data") if part in files]

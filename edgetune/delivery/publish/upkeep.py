"""Deletes releases of a repository that are no longer kept, and the files that only they need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.bundle.parts import Part, parse_part
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.formats.atomic import flush_to_disk
from edgetune_runtime.update.pieces import FOLDER as PIECES_FOLDER
from edgetune_runtime.update.pieces import cut
from edgetune_runtime.update.release import BLOBS_FOLDER, OF_PART, TARGETS_FOLDER, Release, parse_release

from .repository import Repository


def delete_old(repository: Repository, keep: int) -> int:
    """Delete all releases but the newest `keep` of each channel, and files that only they need; the bytes of both.

    What the signed metadata lists is kept in any case, also of authors. Before anything is deleted, a newer state must
    be committed. If this is killed at any point, devices see no difference, and the next call deletes the rest.
    VerificationError if a release or a part that is listed is damaged.
    """
    targets = repository.folder / TARGETS_FOLDER
    kept, parts = dict[Path, Release](), dict[Path, Part]()
    for target in repository.all_releases:
        path, data = repository.release_file(target), repository.read_release(target)
        if OF_PART in target.path:
            parts[path] = parse_part(data, str(path))
        else:
            kept[path] = parse_release(data)
    by_channel: dict[tuple[str, str], list[tuple[Path, Release]]] = defaultdict(list)
    for path in targets.glob("*/*.json"):
        # Somebody else may have put a file there, which counts as no release.
        with suppress(EdgetuneError):
            release = parse_release(path.read_bytes())
            by_channel[release.name, release.channel].append((path, release))
    for releases in by_channel.values():
        # One that is for some devices only is there twice.
        newest = sorted({release.version for _, release in releases})[-keep:]
        kept |= {path: release for path, release in releases if release.version in newest}
    # Releases first: one that is there has all of its files.
    freed = _delete_others(targets.glob("*/*"), {*kept, *parts})
    blobs, pieces = repository.folder / BLOBS_FOLDER, repository.folder / PIECES_FOLDER
    needed = {blobs / entry.sha256 for release in kept.values() for entry in release.files.values()}
    needed |= {blobs / entry.sha256 for part in parts.values() for entry in part.files.values()}
    needed |= {blobs / sha256_of(path) for path in parts}
    of_files = {piece for release in kept.values() for listed in release.pieces.values() for piece in listed}
    of_releases = {piece for path in (*kept, *parts) for piece, _ in cut(path.read_bytes())}
    needed |= {pieces / piece.digest for piece in of_files | of_releases}
    return freed + _delete_others([*blobs.glob("*"), *pieces.glob("*")], needed)


def _delete_others(paths: Iterable[Path], kept: Container[Path]) -> int:
    freed, folders = 0, set()
    for path in [path for path in paths if path not in kept]:
        freed += path.stat().st_size
        path.unlink()
        folders.add(path.parent)
    for folder in folders:
        flush_to_disk(folder)
    return freed

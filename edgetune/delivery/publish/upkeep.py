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

from .repository import Repository, contents_of


def delete_old(repository: Repository, keep: int) -> int:
    """Delete all releases but the newest `keep` of each channel, and files that only they need; the bytes of both.

    What the signed metadata lists is kept in any case, also of authors. Before anything is deleted, a newer state must
    be committed. If this is killed at any point, devices see no difference, and the next call deletes the rest.
    VerificationError if a release or a part that is listed is damaged.
    """
    targets = repository.folder / TARGETS_FOLDER
    kept: dict[Path, Release | Part] = {}
    for target in repository.all_releases:
        data = repository.read_release(target)
        is_part = OF_PART in target.path
        kept[repository.release_file(target)] = parse_part(data, target.path) if is_part else parse_release(data)
    by_channel: dict[tuple[str, str], list[tuple[Path, Release]]] = defaultdict(list)
    for path in targets.glob("*/*.json"):
        # Somebody else may have put a file there, which counts as no release.
        with suppress(EdgetuneError, OSError):
            release = parse_release(contents_of(path))
            by_channel[release.name, release.channel].append((path, release))
    for releases in by_channel.values():
        # One that is for some devices only is there twice.
        newest = sorted({release.version for _, release in releases})[-keep:]
        kept |= {path: release for path, release in releases if release.version in newest}
    # Releases first: one that is there has all of its files.
    freed = _delete_others(targets.glob("*/*"), set(kept))
    blobs, pieces = repository.folder / BLOBS_FOLDER, repository.folder / PIECES_FOLDER
    needed = {blobs / entry.sha256 for release in kept.values() for entry in release.files.values()}
    # The text of a part is a file of its bundle too.
    needed |= {blobs / sha256_of(path) for path in kept}
    of_files = {
        piece
        for release in kept.values() if isinstance(release, Release)
        for listed in release.pieces.values() for piece in listed
    }  # fmt: skip
    of_releases = {piece for path in kept for piece, _ in cut(contents_of(path))}
    needed |= {pieces / piece.digest for piece in of_files | of_releases}
    return freed + _delete_others([*blobs.glob("*"), *pieces.glob("*")], needed)


def _delete_others(paths: Iterable[Path], kept: Container[Path]) -> int:
    freed, folders = 0, set()
    # Servers and shares put folders of their own there.
    for path in [path for path in paths if path not in kept and not path.is_dir()]:
        freed += path.stat().st_size
        path.unlink()
        folders.add(path.parent)
    for folder in folders:
        flush_to_disk(folder)
    return freed

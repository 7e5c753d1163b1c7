"""Publishes a bundle in a repository: blobs first, then its release, then the metadata whose timestamp decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import (
    MANIFEST_NAME,
    entry_of,
    parse_manifest,
    read_manifest,
    resolve,
    verify_files,
)
from edgetune_runtime.bundle.parts import parts_in
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME, is_signature_file, signature_file
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.atomic import TEMPORARY, raising_disk_errors
from edgetune_runtime.store.kit import version_key
from edgetune_runtime.update.release import MOST_OLDER, Release, parse_release, path_of, role_of_part
from filelock import FileLock, Timeout
from securesystemslib.signer import Key

from edgetune.common.files import write_file
from edgetune.common.progress import Progress

from .external_keys import signing
from .key_folder import KeyFolder, missing_keys, require_name
from .repository import Repository, is_repository
from .upkeep import delete_old

_LOCK = ".lock"


@dataclass(frozen=True)
class Published:
    """The release of a bundle, what was copied for it, and what was deleted of old ones.

    `changed` is False if the channel had this bundle. `part` counts the parts of the author of `adapter`, the
    newest of which is in the release then; it is 0 for a release of the owner.
    """

    release: Release
    changed: bool
    copied_bytes: int
    deleted_bytes: int
    adapter: str = ""
    part: int = 0

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        release = self.release
        return {
            "name": release.name,
            "channel": release.channel,
            "version": release.version,
            "bundle": release.bundle,
            "changed": self.changed,
            "copied_bytes": self.copied_bytes,
            "deleted_bytes": self.deleted_bytes,
            **({"adapter": self.adapter, "part": self.part} if self.part else {}),
        }


def publish(
    bundle: Path,
    repo: Path,
    keys: KeyFolder,
    progress: Progress,
    *,
    channel: str,
    min_runtime: str,
    share: float,
    expires_days: int,
    keep: int | None = None,
) -> Published:
    """Make a bundle the newest release of its name in a channel, and sign the repository again.

    It is for a `share` of the devices; the older releases that the others can take stay in the repository. Devices
    accept it for `expires_days`. A repository is made if there is none. If `keep` is given, releases older than the
    newest `keep` of each channel are deleted, but not those. If this is killed at any point, the repository
    is valid as it was, and the next publish completes. Raises the errors of reading a bundle, of its keys, and of a
    damaged repository; UsageError for a name that cannot be a path, for a bundle with parts that authors have signed,
    or while another publish is at work.
    """
    parts = parts_in(bundle)
    if parts:
        # The keys of the bundle cannot sign for its authors.
        remedy = "publish the owner's bundle, or this one without its folder `authors`"
        raise UsageError(f"{bundle} has {parts[0]}, a part that an author publishes", remedy)
    manifest = read_manifest(bundle)
    require_name("the bundle's name", manifest.name)
    require_name("--channel", channel)
    progress.say(f"checking the files of {manifest.name}")
    verify_files(bundle, manifest)
    with locked(repo):
        repository = Repository(repo, keys)
        signature = sign(bundle, keys)
        sources = {name: resolve(bundle, name) for name in (*manifest.files, MANIFEST_NAME, signature.name)}
        # Those that were verified: a file may have been changed since.
        files = dict(manifest.files)
        for name in (MANIFEST_NAME, signature.name):
            files[name] = entry_of(sources[name])
        releases = repository.releases(manifest.name)
        newest = max((target.custom["version"] for target in releases.values()), default=0)
        # Of those that all adapters share, and each changed adapter changes.
        pieces = {name: repository.put_pieces(path.read_bytes()) for name, path in sources.items() if "/" not in name}
        release = Release(
            manifest.name, channel, newest + 1, files, tuple(manifest.base.files), manifest.schema, min_runtime, share,
            pieces={name: listed for name, listed in pieces.items() if listed}, base=manifest.base.fingerprint,
            authors=tuple(
                role_of_part(manifest.name, adapter, key.keyid)
                for adapter, own in keys.authors(manifest.name).items() for key in own
            ),
        )  # fmt: skip
        # What devices would refuse is not published.
        parse_release(release.to_json().encode())
        before = read_release(repository, manifest.name, channel)
        copied = sum(entry.bytes for name, entry in files.items() if repository.put_blob(sources[name], entry))
        changed = before is None or _content(before) != _content(release)
        if changed:
            _put(repository, release, before)
        deleted = commit(repository, expires_days, keep)
    return Published(release if changed or before is None else before, changed, copied, deleted)


def read_release(repository: Repository, name: str, channel: str, version: int | None = None) -> Release | None:
    """The newest release of a channel, or an older one; None if there is none."""
    target = repository.releases(name).get(path_of(name, channel, version))
    return None if target is None else parse_release(repository.read_release(target))


def _content(release: Release) -> tuple[object, ...]:
    return release.files, release.min_runtime, release.share, release.base, release.authors


def _put(repository: Repository, release: Release, before: Release | None) -> None:
    """Put a release before those of its channel, and keep the ones that devices may take which it is not for."""
    name, channel = release.name, release.channel
    versions = () if before is None else before.older
    older = [before, *(read_release(repository, name, channel, version) for version in versions)]
    kept: list[Release] = []
    for candidate in filter(None, older):
        path = path_of(name, channel, candidate.version)
        # The last place is for one that all devices can take.
        room = MOST_OLDER - (candidate.share < 1 and all(each.share < 1 for each in kept))
        if len(kept) == room or any(_is_in_place_of(newer, candidate) for newer in (release, *kept)):
            repository.drop_release(name, path)
        else:
            kept.append(candidate)
            repository.put_release(name, path, candidate.to_json().encode(), candidate.version)
    release = replace(release, older=tuple(candidate.version for candidate in kept))
    repository.put_release(name, path_of(name, channel), release.to_json().encode(), release.version)


def _is_in_place_of(newer: Release, older: Release) -> bool:
    """Whether a release is of the same bundle as an older one, or for all devices that could take that."""
    runs = version_key(newer.min_runtime) <= version_key(older.min_runtime)
    is_for_all = newer.share == 1 and runs and newer.manifest_schema <= older.manifest_schema
    return newer.bundle == older.bundle or is_for_all


def refresh(repo: Path, keys: KeyFolder, *, expires_days: int, keep: int | None = None) -> None:
    """Sign a repository again, as before its metadata expires or after a change of keys; `keep` as for `publish`.

    NotFoundError if nothing was published in it.
    """
    if not is_repository(repo):
        raise NotFoundError(f"{repo} is not a repository", "check --repo, or publish a bundle to make one")
    with locked(repo):
        commit(Repository(repo, keys), expires_days, keep)


def commit(repository: Repository, expires_days: int, keep: int | None) -> int:
    """Write what has changed, then delete old releases; how many bytes they had."""
    repository.commit(expires_days=expires_days)
    return 0 if keep is None else delete_old(repository, keep)


def sign(bundle: Path, keys: KeyFolder) -> Path:
    """Sign the manifest of a bundle, and put the signature beside it, unless it is there; the file of the signature.

    The manifest gets the keys of its authors. NotFoundError if no private key for it is in the folder.
    """
    name, path = read_manifest(bundle).name, bundle / SIGNATURE_NAME
    role = keys.role_of(name)
    signers = keys.signers(role, keys.keys(role))
    if not signers:
        raise missing_keys(role, keys)
    manifest = _with_authors(bundle, keys.authors(name))
    before, keys_here = path.read_bytes() if path.is_file() else b"", [signer.public_key for signer in signers]
    # Many keys sign with random numbers: another signature would make another release of the same bundle.
    if not is_signature_file(before, manifest, keys_here):
        with signing(role):
            write_file(path, signature_file(manifest, signers))
    return path


def _with_authors(bundle: Path, keys: Mapping[str, Sequence[Key]]) -> bytes:
    """Put the public keys of authors into the manifest of a bundle, unless they are there; its text."""
    path = bundle / MANIFEST_NAME
    text, authors = path.read_bytes(), {name: {key.keyid: key.to_dict() for key in own} for name, own in keys.items()}
    manifest = parse_manifest(text, path)
    if manifest.authors == authors:
        return text
    write_file(path, replace(manifest, authors=authors).to_json())
    return path.read_bytes()


@contextmanager
def locked(repo: Path) -> Iterator[None]:
    """Hold the lock of a repository in the block; UsageError if another has it, or if something cannot be written.

    The thread that holds it may take it again.
    """
    with raising_disk_errors(repo):
        repo.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(repo / _LOCK, blocking=False, is_singleton=True):
                # Of publishes that were killed.
                for depth in ("*", "*/*"):
                    for path in filter(Path.is_file, repo.glob(f"{depth}/.*{TEMPORARY}*")):
                        path.unlink()
                yield
        except Timeout as error:
            raise UsageError(f"another publish is using {repo}", "wait until it has ended") from error

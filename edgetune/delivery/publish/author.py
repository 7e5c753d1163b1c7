"""Publishes an adapter with the key of its author: a part, which replaces that adapter and nothing else."""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime.bundle import MANIFEST_NAME, parse_manifest, read_manifest, resolve, verify_files
from edgetune_runtime.bundle.parts import FOLDER, Part, part_path
from edgetune_runtime.bundle.parts import with_parts as with_parts_of_bundle
from edgetune_runtime.bundle.signatures import part_file, require_author
from edgetune_runtime.errors import IncompatibleError, NotFoundError
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from edgetune_runtime.inference.bundle_files import moved
from edgetune_runtime.update.release import (
    BLOBS_FOLDER,
    ROLE_PREFIX,
    Release,
    ReleasedPart,
    newest_parts,
    parse_released_part,
    path_of_part,
    role_of_part,
    with_parts,
)

from .external_keys import signing
from .key_folder import OF_ONE_BUNDLE, KeyFolder, require_name
from .one_adapter import require_formats
from .publish import Published, commit, locked, read_release
from .repository import Repository


def publish_part(
    bundle: Path,
    adapter: str,
    repo: Path,
    keys: KeyFolder,
    *,
    channel: str,
    expires_days: int,
    keep: int | None = None,
) -> Published:
    """Make an adapter of a bundle the newest part of its author in a channel, and sign the repository again.

    The bundle has the name of the one that gets the part, and needs no other adapter. Devices take a part with each
    release that has its base. `expires_days`, `keep` and a kill are as for `publish`. NotFoundError without a release,
    or a key that the release allows, IncompatibleError for an adapter of another base or without one of the formats;
    the errors of reading a bundle and a repository.
    """
    manifest = read_manifest(bundle)
    require_name("--channel", channel)
    new = chosen_adapter(manifest, bundle, adapter)
    verify_files(bundle, manifest, new.files)
    with locked(repo):
        repository = Repository(repo, keys)
        release = read_release(repository, manifest.name, channel)
        if release is None:
            message = f"{repo} has no release of {manifest.name!r} in the channel {channel!r}"
            raise NotFoundError(message, "its owner must publish the whole bundle first")
        require_formats(release, new.entry)
        if new.entry.base_fingerprint != release.base:
            message = f"adapter {adapter!r} was made for another base than release {release.version} has"
            raise IncompatibleError(message, "build it for this base, or ask the owner to publish the bundle again")
        entry, paths = moved(new, f"{FOLDER}/{adapter}")
        files = {paths[file]: about for file, about in new.files.items()}
        known = _published(repository, keys, manifest.name, adapter)
        newest = max((each.part.version for each in known.values()), default=0)
        of_channel = [each for path, each in known.items() if path == path_of_part(each.role, channel)]
        released = next(iter(newest_parts(release, of_channel)), None)
        copied = sum(
            about.bytes for file, about in new.files.items() if repository.put_blob(resolve(bundle, file), about)
        )
        changed = released is None or (released.part.adapter, released.part.files) != (entry, files)
        if released is None or changed:
            released = _signed(repository, keys, Part(manifest.name, newest + 1, entry, files), release)
            name, path = released.role.removeprefix(ROLE_PREFIX), path_of_part(released.role, channel)
            text = repository.put_release(name, path, released.data, newest + 1)
            repository.put_blob(text, with_parts(release, [released]).files[part_path(adapter)])
        deleted = commit(repository, expires_days, keep)
    return Published(with_parts(release, [released]), changed, copied, deleted, adapter, released.part.version)


def _published(repository: Repository, keys: KeyFolder, name: str, adapter: str) -> dict[str, ReleasedPart]:
    """The newest parts that the keys of an adapter's author have signed, by their paths among the targets."""
    roles = [role_of_part(name, adapter, key.keyid) for key in keys.authors(name).get(adapter, [])]
    return {
        path: parse_released_part(repository.read_release(target), role)
        for role in roles
        for path, target in repository.releases(role.removeprefix(ROLE_PREFIX)).items()
    }


def _signed(repository: Repository, keys: KeyFolder, part: Part, release: Release) -> ReleasedPart:
    """A part signed by the newest private key here that the repository and the release allow."""
    name, adapter = part.bundle, part.adapter.name
    allowed = [
        key
        for key in keys.authors(name)[adapter]
        if (role := role_of_part(name, adapter, key.keyid)) in release.authors and repository.delegates_to(role)
    ]
    holder = f"{OF_ONE_BUNDLE}{name}/{adapter}"
    signers = keys.signers(holder, allowed)
    if not signers:
        message = f"the published {name} allows none of the private keys of {holder} here to replace {adapter!r}"
        raise NotFoundError(message, "ask its owner to add the key and to publish the bundle")
    with signing(holder):
        data = part_file(part, signers[-1:])
    # What devices would refuse is not published.
    path = repository.folder / BLOBS_FOLDER / release.files[MANIFEST_NAME].sha256
    with_parts_of_bundle(parse_manifest(path.read_bytes(), path), {part_path(adapter): data}.get, require_author)
    return parse_released_part(data, role_of_part(name, adapter, signers[-1].public_key.keyid))

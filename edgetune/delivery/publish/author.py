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
from securesystemslib.signer import Signer

from .external_keys import signing
from .key_folder import OF_ONE_BUNDLE, KeyFolder, require_name
from .one_adapter import newest_release, require_formats
from .publish import Published, commit, locked
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
        release = newest_release(repository, manifest.name, channel, "its owner must publish the whole bundle first")
        require_formats(release, new.entry)
        if new.entry.base_fingerprint != release.base:
            message = f"adapter {adapter!r} was made for another base than release {release.version} has"
            raise IncompatibleError(message, "build it for this base, or ask the owner to publish the bundle again")
        entry, paths = moved(new, f"{FOLDER}/{adapter}")
        files = {paths[file]: about for file, about in new.files.items()}
        signer = _signer(repository, keys, release, adapter)
        role = role_of_part(manifest.name, adapter, signer.public_key.keyid)
        known = _published(repository, manifest.name)
        of_channel = [each for path, each in known.items() if path == path_of_part(each.role, channel)]
        parts = {each.part.adapter.name: each for each in newest_parts(release, of_channel)}
        copied = sum(
            about.bytes for file, about in new.files.items() if repository.put_blob(resolve(bundle, file), about)
        )
        before = parts.get(adapter)
        # One that another key has signed would go with that key.
        changed = before is None or (before.role, before.part.adapter, before.part.files) != (role, entry, files)
        if changed:
            version = 1 + max(
                (each.part.version for each in known.values() if each.part.adapter.name == adapter), default=0
            )
            parts[adapter] = _signed(repository, release, Part(manifest.name, version, entry, files), signer)
            name, data = role.removeprefix(ROLE_PREFIX), parts[adapter].data
            text = repository.put_release(name, path_of_part(role, channel), data, version)
            repository.put_blob(text, with_parts(release, [parts[adapter]]).files[part_path(adapter)])
        deleted = commit(repository, expires_days, keep)
    composed = with_parts(release, parts.values())
    return Published(composed, changed, copied, deleted, adapter, parts[adapter].part.version)


def _published(repository: Repository, name: str) -> dict[str, ReleasedPart]:
    """The newest parts that the authors of a bundle have signed, by their paths among the targets."""
    return {
        path: parse_released_part(repository.read_release(target), role)
        for role in repository.authors(name)
        for path, target in repository.releases(role.removeprefix(ROLE_PREFIX)).items()
    }


def _signer(repository: Repository, keys: KeyFolder, release: Release, adapter: str) -> Signer:
    """The newest private key here that the repository and the release allow to replace an adapter."""
    allowed = [
        key
        for key in keys.authors(release.name).get(adapter, ())
        if (role := role_of_part(release.name, adapter, key.keyid)) in release.authors and repository.delegates_to(role)
    ]
    holder = f"{OF_ONE_BUNDLE}{release.name}/{adapter}"
    signers = keys.signers(holder, allowed)
    if not signers:
        ask = (
            f"ask its owner to add yours, edgetune keys add KEYS {holder} --public-key FILE, and to publish the bundle"
        )
        if holder in keys.roles_here:
            raise NotFoundError(f"the published {release.name} allows none of the private keys of {holder} here", ask)
        message = f"{keys.folder} has no private key of {keys.role_of(release.name)}, and none of {holder}"
        raise NotFoundError(message, f"make one, edgetune keys add {keys.folder} {holder}, and {ask}")
    return signers[-1]


def _signed(repository: Repository, release: Release, part: Part, signer: Signer) -> ReleasedPart:
    name, adapter = part.bundle, part.adapter.name
    with signing(f"{OF_ONE_BUNDLE}{name}/{adapter}"):
        data = part_file(part, [signer])
    # What devices would refuse is not published.
    path = repository.folder / BLOBS_FOLDER / release.files[MANIFEST_NAME].sha256
    with_parts_of_bundle(parse_manifest(path.read_bytes(), path), {part_path(adapter): data}.get, require_author)
    return parse_released_part(data, role_of_part(name, adapter, signer.public_key.keyid))

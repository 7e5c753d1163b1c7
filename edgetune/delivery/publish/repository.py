"""A repository of static files: TUF's metadata, releases and blobs, changed by the rename of its timestamp."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edgetune_runtime.bundle import FileEntry
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats.atomic import flush_to_disk
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.update.pieces import FOLDER as PIECES_FOLDER
from edgetune_runtime.update.pieces import Piece, cut
from edgetune_runtime.update.release import (
    BLOBS_FOLDER,
    ISSUED,
    METADATA_FOLDER,
    OF_PART,
    PIECES,
    ROLE_PREFIX,
    ROOT_VERSION,
    TARGETS_FOLDER,
    author_of,
    path_of_part,
    role_of_part,
)
from edgetune_runtime.update.trust import issued_of
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    T,
    TargetFile,
    Targets,
    Timestamp,
)

from edgetune.common.files import is_whole, put_whole, write_file

from .external_keys import signing
from .key_folder import OF_ONE_BUNDLE, KeyFolder, missing_keys

_TARGETS_DAYS = 365
_PARTS_DAYS = 3650
"""The snapshot says which metadata of an author is the newest, and nobody's update must wait for the author."""
_TIMESTAMP_NAME = f"{Timestamp.type}.json"
_MOST_BYTES = 1 << 26
_OTHER_KEYS = "give the keys of this --repo"
_RESTORE = "restore the repository from a backup"

Delegator = Root | Targets


class Repository:
    """A repository and the keys that sign it; the metadata is checked before it is signed again.

    Changes are collected, and `commit` writes them: until it ends, the repository is as before.
    """

    def __init__(self, folder: Path, keys: KeyFolder) -> None:
        self.folder, self._keys = folder, keys
        self._metadata = folder / METADATA_FOLDER
        self._root = keys.root().signed
        if self._root.is_expired():
            message = f"the root in {keys.folder} expired on {self._root.expires:%Y-%m-%d}"
            signs = Root.type in keys.roles_here
            renew = f"sign the next one: edgetune keys rotate {keys.folder} root"
            raise UsageError(message, renew if signs else "copy the next *.root.json from whoever has the root keys")
        if issued_of(self._root) > _after(1):
            # The time of a root is one that has passed for devices: to those whose clocks are right, all would expire.
            message = f"the root in {keys.folder} was made on {issued_of(self._root):%Y-%m-%d}, which is still to come"
            remedy = f"set this machine's clock; if it is right: edgetune keys rotate {keys.folder} root"
            raise UsageError(message, remedy)
        self._published_root = self._read_published_root()
        self._roles: dict[str, Targets] = {}
        self._changed: set[str] = set()
        self._load()

    def releases(self, name: str) -> Mapping[str, TargetFile]:
        """The releases of a bundle by their paths."""
        role = self._roles.get(f"{ROLE_PREFIX}{name}")
        return {} if role is None else role.targets

    def authors(self, name: str) -> list[str]:
        """The roles of a bundle's authors that have signed a part."""
        return [role for role in self._roles if author_of(role)[0] == name]

    def delegates_to(self, role: str) -> bool:
        """Whether a bundle delegates to this role of an author, as published."""
        delegator = self._roles.get(_delegator_of(role))
        return delegator is not None and role in _delegations_of(delegator)

    def _is_granted(self, role: str) -> bool:
        """Whether a bundle delegates to this role of an author, and will do so when this is committed."""
        return self.delegates_to(role) and (bool(self._keys_of(role)) or not self._signers(_delegator_of(role)))

    @property
    def all_releases(self) -> list[TargetFile]:
        """The releases of all bundles, and the parts of their authors, that devices may take."""
        return [target for role in self._roles.values() for target in role.targets.values()]

    def release_file(self, target: TargetFile) -> Path:
        """The file of a release."""
        return self.folder / TARGETS_FOLDER / target.get_prefixed_paths()[0]

    def read_release(self, target: TargetFile) -> bytes:
        """The contents of a release; VerificationError if the file is missing or damaged."""
        path = self.release_file(target)
        try:
            data = contents_of(path)
            target.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise VerificationError(f"{path} is missing or damaged", "restore it from a backup") from error
        return data

    def put_blob(self, source: Path, entry: FileEntry) -> bool:
        """Copy a file of a bundle, unless it is there; whether it was copied."""
        blob = self.folder / BLOBS_FOLDER / entry.sha256
        if is_whole(blob, entry):
            return False
        put_whole(blob, entry, source)
        return True

    def put_pieces(self, text: bytes) -> tuple[Piece, ...]:
        """Write the pieces of a text that are not there; all of its pieces, none if it is small."""
        pieces, folder = cut(text), self.folder / PIECES_FOLDER
        for piece, part in pieces:
            path = folder / piece.digest
            if not (path.is_file() and path.stat().st_size == piece.bytes and path.read_bytes() == part):
                write_file(path, part)
        if pieces:
            flush_to_disk(folder)
        return tuple(piece for piece, _ in pieces)

    def put_release(self, name: str, path: str, data: bytes, version: int) -> Path:
        """Make `data` the release at a path among the targets; its file.

        `name` is what follows ROLE_PREFIX in the role: a bundle, or one of its authors. The version and the pieces are
        readable without the file.
        """
        target = TargetFile.from_data(path, data, ["sha256"])
        pieces = [str(piece) for piece in self.put_pieces(data)]
        target.unrecognized_fields["custom"] = {"version": version, PIECES: pieces}
        write_file(self.release_file(target), data, is_durable=True)
        role = self._roles.setdefault(f"{ROLE_PREFIX}{name}", _unwritten(Targets()))
        role.targets[path] = target
        self._changed.add(f"{ROLE_PREFIX}{name}")
        return self.release_file(target)

    def drop_release(self, name: str, path: str) -> None:
        """Remove the release at a path from the targets, if there is one."""
        if self._roles[f"{ROLE_PREFIX}{name}"].targets.pop(path, None) is not None:
            self._changed.add(f"{ROLE_PREFIX}{name}")

    def commit(self, *, expires_days: int) -> None:
        """Sign what has changed, snapshot and timestamp, and write them; the timestamp decides.

        The keys that the published root names sign too, so that devices accept the new timestamp whether they have the
        new root already or not.
        """
        self._delegate()
        self._changed |= {role for role, signed in self._roles.items() if self._must_renew(role, signed)}
        if self._published_root is not None and self._has_new_keys(Targets.type, self._published_root):
            self._changed.add(Targets.type)
        for role in sorted(self._changed):
            signed = self._roles[role]
            days = _PARTS_DAYS if OF_PART in role else _TARGETS_DAYS
            signed.version, signed.expires = signed.version + 1, _after(days)
            self._write(f"{signed.version}.{role}", signed, self._signers(role))
        snapshot = self._snapshot
        # Devices refuse a snapshot that has lost a role, also that of an author whose key was revoked.
        authors = {name: meta for name, meta in snapshot.meta.items() if OF_PART in name}
        snapshot.meta = authors | {f"{role}.json": MetaFile(signed.version) for role, signed in self._roles.items()}
        snapshot.version, snapshot.expires = snapshot.version + 1, _after(expires_days)
        data = self._write(f"{snapshot.version}.{Snapshot.type}", snapshot, self._signers(Snapshot.type))
        timestamp = self._timestamp
        hashes = {"sha256": hashlib.sha256(data).hexdigest()}
        timestamp.snapshot_meta = MetaFile(snapshot.version, len(data), hashes)
        timestamp.version, timestamp.expires = timestamp.version + 1, _after(expires_days)
        timestamp.unrecognized_fields |= {ISSUED: _after(0).isoformat(), ROOT_VERSION: self._root.version}
        # A new repository has no timestamp that a root could be at odds with; devices look for the root first.
        is_new = self._published_root is None
        if is_new:
            self._write_roots()
        self._write(Timestamp.type, timestamp, self._signers(Timestamp.type))
        if not is_new:
            self._write_roots()

    def _write_roots(self) -> None:
        for path in self._keys.roots:
            if not (self._metadata / path.name).exists():
                write_file(self._metadata / path.name, path.read_bytes(), is_durable=True)

    def _must_renew(self, role: str, signed: Targets) -> bool:
        """Whether metadata expires soon; of bundles only if their keys are here, as others renew theirs."""
        is_near = signed.expires < _after(_TARGETS_DAYS // 2)
        must_be_here = role == Targets.type and signed.is_expired()
        return is_near and (must_be_here or bool(self._signers(role)))

    def _delegate(self) -> None:
        """Make the targets role delegate each bundle to the keys of bundles, or to those that only this one has."""
        targets, keys, roles = self._roles[Targets.type], dict[str, Key](), dict[str, DelegatedRole]()
        before = _delegations_of(targets)
        for name in sorted(self._roles):
            if name == Targets.type or OF_PART in name:
                continue
            self._delegate_parts(name)
            own = {key.keyid: key for key in self._keys.keys(self._role_of(name))}
            paths = [f"{name.removeprefix(ROLE_PREFIX)}/*"]
            keys |= own
            roles[name] = DelegatedRole(name, list(own), 1, terminating=True, paths=paths)
        expected = Delegations(keys, roles)
        if targets.delegations is None or targets.delegations.to_dict() != expected.to_dict():
            self._changed |= {Targets.type, *(name for name, role in roles.items() if before.get(name) != role)}
            targets.delegations = expected

    def _delegate_parts(self, role: str) -> None:
        """Make a bundle's role delegate to the keys of its authors, if its own are here: others leave that as it is."""
        signed, keys, roles = self._roles[role], dict[str, Key](), dict[str, DelegatedRole]()
        bundle = role.removeprefix(ROLE_PREFIX)
        for adapter, granted in self._keys.authors(bundle).items():
            for key in granted:
                name = role_of_part(bundle, adapter, key.keyid)
                if keys.setdefault(key.keyid, key) != key:
                    message = f"{self._keys.folder} has two keys {key.keyid[:8]}, one of the author of {adapter}"
                    raise UsageError(message, "add keys of authors with: edgetune keys add --public-key")
                roles[name] = DelegatedRole(name, [key.keyid], 1, terminating=True, paths=[path_of_part(name, "*")])
        expected = Delegations(keys, roles) if roles else None
        if signed.delegations != expected and self._signers(role):
            revoked = [name for name in roles if not self.delegates_to(name) and f"{name}.json" in self._snapshot.meta]
            if revoked:
                # An older copy of the keys would bring back what the author has published.
                message = f"{self._keys.folder} has a key of {self._role_of(revoked[0])} that was revoked, {revoked[0]}"
                raise UsageError(message, "revoke it here too: edgetune keys revoke; the author can make a new one")
            signed.delegations = expected
            self._changed.add(role)
            for name in [name for name in self._roles if name.startswith(f"{role}{OF_PART}") and name not in roles]:
                del self._roles[name]
                self._changed.discard(name)

    def _role_of(self, name: str) -> str:
        """The role among the keys that signs a role of the repository."""
        if name in self._root.roles:
            return name
        bundle, adapter = author_of(name)
        return f"{OF_ONE_BUNDLE}{bundle}/{adapter}" if bundle else self._keys.role_of(name.removeprefix(ROLE_PREFIX))

    def _has_new_keys(self, role: str, before: Root) -> bool:
        return self._root.roles[role].keyids != before.roles[role].keyids

    def _signers(self, role: str) -> list[Signer]:
        """The private keys that sign a role, of the keys in the folder and in the published root."""
        if role in self._root.roles:
            roots = [root for root in (self._root, self._published_root) if root is not None]
            keys = {keyid: root.keys[keyid] for root in roots for keyid in root.roles[role].keyids}
            return self._keys.signers(role, keys.values())
        return self._keys.signers(self._role_of(role), self._keys_of(role))

    def _keys_of(self, role: str) -> list[Key]:
        """The keys in the folder that a role of a bundle trusts; each key of an author has a role of its own."""
        keys = self._keys.keys(self._role_of(role))
        return [key for key in keys if OF_PART not in role or role_of_part(*author_of(role), key.keyid) == role]

    def _write(self, name: str, signed: T, signers: Iterable[Signer]) -> bytes:
        """Sign and write a file of metadata; NotFoundError if too few private keys are in the folder."""
        metadata = Metadata(signed)
        role = name.partition(".")[2] or name
        with signing(self._role_of(role)):
            for signer in signers:
                metadata.sign(signer, append=True)
        is_top = role in self._root.roles
        delegator = self._root if is_top else self._roles[_delegator_of(role)]
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError as error:
            raise missing_keys(self._role_of(role), self._keys) from error
        data = metadata.to_bytes()
        write_file(self._metadata / f"{name}.json", data, is_durable=True)
        return data

    def _read_published_root(self) -> Root | None:
        """The newest published root; UsageError if the folder has not the same root of this version."""
        names = {path.name: path for path in self._keys.roots}
        published = [path for path in self._metadata.glob("*.root.json") if path.name in names]
        if not published and is_repository(self.folder):
            raise UsageError(f"{self.folder} has no root that {self._keys.folder} knows", _OTHER_KEYS)
        for path in published:
            if contents_of(path) != names[path.name].read_bytes():
                raise UsageError(f"{path} is not the one in {self._keys.folder}", _OTHER_KEYS)
        numbers = [path.name.split(".")[0] for path in self._metadata.glob("*.root.json")]
        newest_number = max((int(number) for number in numbers if number.isdecimal()), default=0)
        if newest_number > self._root.version:
            # Devices trust the keys of that one only.
            message = f"{self.folder} has root {newest_number}, and {self._keys.folder} only {self._root.version}"
            raise UsageError(message, "copy *.root.json and trusted-keys*.json from whoever has changed the keys")
        newest = max(published, key=lambda path: int(path.name.split(".")[0]), default=None)
        return None if newest is None else Metadata[Root].from_bytes(contents_of(newest)).signed

    def _load(self) -> None:
        """Read and verify what is published; expired metadata is fine, as it will be signed again."""
        self._roles = {Targets.type: _unwritten(Targets())}
        self._snapshot, self._timestamp = _unwritten(Snapshot()), _unwritten(Timestamp())
        if not is_repository(self.folder):
            # A publish that was cut off leaves only the first one without a timestamp, a copy that was cut off any.
            if any(path.name != f"1.{Snapshot.type}.json" for path in self._metadata.glob(f"*.{Snapshot.type}.json")):
                raise VerificationError(f"{self._metadata / _TIMESTAMP_NAME} is missing", _RESTORE)
            return
        delegator = self._published_root
        assert delegator is not None
        self._timestamp = self._read(Timestamp, Timestamp.type, Timestamp.type, delegator)
        version = self._timestamp.snapshot_meta.version
        self._snapshot = self._read(Snapshot, f"{version}.{Snapshot.type}", Snapshot.type, delegator)
        versions = {name.removesuffix(".json"): meta.version for name, meta in self._snapshot.meta.items()}
        targets = self._read(Targets, f"{versions[Targets.type]}.{Targets.type}", Targets.type, delegator)
        self._roles = {Targets.type: targets}
        # Bundles first, as these delegate to their authors.
        for role, number in sorted(versions.items(), key=lambda item: OF_PART in item[0]):
            # An author whose key was revoked is still in the snapshot, and may have put anything into the repository.
            if role == Targets.type or (OF_PART in role and not self._is_granted(role)):
                continue
            owner = self._roles[_delegator_of(role)]
            self._roles[role] = signed = self._read(Targets, f"{number}.{role}", role, owner)
            about = _delegations_of(owner)[role]
            foreign = [path for path in signed.targets if not about.is_delegated_path(path)]
            foreign += ["delegations"] if OF_PART in role and signed.delegations is not None else []
            if foreign:
                message = f"{number}.{role}.json has {foreign[0][:80]!r}, which this role may not sign"
                raise VerificationError(message, _RESTORE)

    def _read(self, kind: type[T], name: str, role: str, delegator: Delegator) -> T:
        path = self._metadata / f"{name}.json"
        try:
            metadata = Metadata[T].from_bytes(contents_of(path))
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (OSError, RepositoryError, LookupError, ValueError) as error:
            # Signed again without this check, what somebody else has put there would be trusted.
            message = f"{path} is missing, damaged or not signed by the keys: {error}"
            raise VerificationError(message, _RESTORE) from error
        if not isinstance(metadata.signed, kind):
            raise VerificationError(f"{path} has metadata of another kind", _RESTORE)
        return metadata.signed


def is_repository(folder: Path) -> bool:
    """Whether something was published in the folder."""
    return (folder / METADATA_FOLDER / _TIMESTAMP_NAME).exists()


def contents_of(path: Path) -> bytes:
    """A file of a repository, where others may have put anything; OSError if it is not a regular one.

    Only the beginning of one that is longer than any could be, which has another digest.
    """
    with open_regular(path, follows_links=True) as file:
        return file.read(_MOST_BYTES)


def _delegator_of(role: str) -> str:
    bundle, is_part, _ = role.partition(OF_PART)
    return bundle if is_part else Targets.type


def _delegations_of(signed: Targets) -> Mapping[str, DelegatedRole]:
    return (None if signed.delegations is None else signed.delegations.roles) or {}


def _unwritten(signed: T) -> T:
    """New metadata, whose first version will be 1."""
    signed.version = 0
    return signed


def _after(days: int) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)

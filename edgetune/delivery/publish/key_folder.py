"""The keys of a repository: which ones each role trusts, in versions of the root, and how they are replaced.

A folder has `N.root.json`, the versions of TUF's root metadata, `trusted-keys.json`, the keys of the role that signs
bundles, `trusted-keys-NAME.json` for each bundle that has keys of its own, `trusted-keys-NAME~ADAPTER.json` for each
adapter of it whose author has keys, and the private keys, which can be kept elsewhere while nobody signs with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle.records import AUTHOR_NAME, MOST_AUTHORS
from edgetune_runtime.bundle.signatures import read_trusted_keys, trusted_keys_text
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.update.release import ISSUED, NAME, OF_PART
from filelock import FileLock
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from edgetune.common.files import write_file

from .external_keys import ExternalKey, signing
from .key_files import Passphrase, load_signer, path_of, write_external_key, write_new_key

BUNDLES = "bundles"
"""The role that signs bundles and their releases; the targets role delegates to it."""
ROOT_ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
ROLES = (*ROOT_ROLES, BUNDLES)
OF_ONE_BUNDLE = f"{BUNDLES}/"
"""Before the name of a bundle: the role that signs it in place of BUNDLES, if it has keys.

NAME/ADAPTER is the role of an adapter's author, who signs parts of the bundle with this adapter.
"""
_TRUSTED_KEYS = "trusted-keys"
_ROOT = re.compile(r"([1-9]\d*)\.root\.json", re.ASCII)
_ROOT_DAYS = 730
_LOCK = ".lock"


class KeyFolder:
    """A folder with the keys of a repository."""

    def __init__(self, folder: Path, passphrase: Passphrase) -> None:
        self.folder = folder
        self._passphrase = passphrase

    @property
    def roots(self) -> list[Path]:
        """The versions of the root, oldest first; NotFoundError if there is none."""
        # A user may keep copies under other names.
        matches = [_ROOT.fullmatch(path.name) for path in self.folder.glob("*.root.json")]
        numbers = sorted(int(match[1]) for match in matches if match is not None)
        if not numbers:
            raise NotFoundError(f"{self.folder} has no keys", f"make them: edgetune keys init {self.folder}")
        return [self.folder / f"{number}.root.json" for number in numbers]

    def root(self) -> Metadata[Root]:
        """The newest root."""
        try:
            return Metadata[Root].from_file(str(self.roots[-1]))
        except RepositoryError as error:
            raise UsageError(f"{self.roots[-1]} is damaged: {error}", "restore it from a backup") from error

    @property
    def roles(self) -> list[str]:
        """The roles that have keys."""
        names = (path.stem.removeprefix(f"{_TRUSTED_KEYS}-") for path in self.folder.glob(f"{_TRUSTED_KEYS}-*.json"))
        return [*ROLES, *(f"{OF_ONE_BUNDLE}{name.replace(OF_PART, '/')}" for name in sorted(names))]

    def role_of(self, bundle: str) -> str:
        """The role that signs a bundle."""
        role = f"{OF_ONE_BUNDLE}{bundle}"
        return role if self.trusted_keys(role).is_file() else BUNDLES

    def trusted_keys(self, role: str) -> Path:
        """The file with the keys of a role that signs bundles, or of an author."""
        names = role.replace(BUNDLES, _TRUSTED_KEYS, 1).replace("/", "-", 1)
        return self.folder / f"{names.replace('/', OF_PART)}.json"

    def authors(self, bundle: str) -> dict[str, list[Key]]:
        """The keys of those who may replace an adapter of a bundle, by its name."""
        own = f"{OF_ONE_BUNDLE}{bundle}/"
        found = {role.removeprefix(own): self.keys(role) for role in self.roles if role.startswith(own)}
        return {adapter: keys for adapter, keys in found.items() if keys}

    @property
    def roles_here(self) -> list[str]:
        """The roles of which a private key is here."""
        return list(dict.fromkeys(row["role"] for row in self.listing() if row["is_here"]))

    def keys(self, role: str) -> list[Key]:
        """The keys of a role, oldest first; none for a bundle that has no keys of its own."""
        if role not in ROOT_ROLES:
            path = self.trusted_keys(role)
            if role != BUNDLES and not path.is_file():
                return []
            return list(read_trusted_keys(path, least=_least(role)).values())
        root = self.root().signed
        return [root.keys[keyid] for keyid in root.roles[role].keyids]

    def listing(self) -> list[dict[str, Any]]:
        """Role, id and file of each key, whether the file is here, and how many keys of the role must sign."""
        thresholds = {role: about.threshold for role, about in self.root().signed.roles.items()}
        rows = [(role, key, path_of(self.folder, role, key)) for role in self.roles for key in self.keys(role)]
        return [
            {
                "role": role,
                "key": key.keyid,
                "threshold": thresholds.get(role, 1),
                "file": path.name,
                "is_here": path.is_file(),
            }
            for role, key, path in rows
        ]

    def signers(self, role: str, keys: Iterable[Key]) -> list[Signer]:
        """The private halves of those keys of a role that are in the folder; errors as those of `load_signer`."""
        signers = []
        for key in keys:
            try:
                signers.append(load_signer(self.folder, role, key, self._passphrase))
            except NotFoundError:
                continue
        return signers

    def create(self, root_keys: int, threshold: int) -> None:
        """Make a key for each role, and `root_keys` for the root, of which `threshold` must sign a new one."""
        if not 1 <= threshold <= root_keys:
            raise UsageError(f"--threshold is {threshold} of {root_keys} root keys", f"use 1 to {root_keys}")
        if list(self.folder.glob("*.root.json")):
            raise UsageError(f"{self.folder} has keys already", "add one: edgetune keys add")
        root = Root(consistent_snapshot=True)
        keys = {role: [self._new_key(role)] for role in ROLES}
        keys[Root.type] += [self._new_key(Root.type) for _ in range(root_keys - 1)]
        for role in ROOT_ROLES:
            for key in keys[role]:
                root.add_key(key, role)
        root.roles[Root.type].threshold = threshold
        self._write_bundle_keys(BUNDLES, keys[BUNDLES])
        # Last: it makes the folder one of keys.
        self._write_root(root, None)

    def add(self, role: str, external: ExternalKey | None = None) -> None:
        """Make another key for a role, or use an external one. A role of one bundle, or of an author, may be new.

        UsageError for a bundle's or adapter's name that cannot be a path, or for too many keys of authors.
        """
        bundle, is_author, adapter = role.removeprefix(OF_ONE_BUNDLE).partition("/")
        require_name("the bundle's name", bundle)
        if is_author and not re.fullmatch(AUTHOR_NAME, adapter):
            raise UsageError(f"the adapter's name is {adapter!r}", "use up to 60 letters, digits, dots, - and _")
        if is_author and sum(map(len, self.authors(bundle).values())) >= MOST_AUTHORS:
            message = f"authors of adapters in {bundle} have {MOST_AUTHORS} keys already"
            raise UsageError(message, "revoke one first: edgetune keys revoke")
        before = self.keys(role)
        self._replace(role, before, before, lambda: self._new_key(role, external))

    def rotate(self, role: str, external: ExternalKey | None = None) -> None:
        """Make a key in place of the oldest one of a role, or use an external one; the old private key stays here."""
        before = self.keys(role)
        self._replace(role, before, before[1:], lambda: self._new_key(role, external))

    def revoke(self, keyid: str, role: str | None = None) -> str:
        """Trust a key, of which the first digits are given, no longer, in its role or in the only one; the role.

        UsageError if its role needs it; an author may lose the last one.
        """
        roles = self.roles if role is None else [role]
        matches = {(role, key.keyid) for role in roles for key in self.keys(role) if key.keyid.startswith(keyid)}
        if len(matches) != 1:
            raise NotFoundError(
                f"{len(matches)} keys have an id that begins with {keyid!r}",
                f"see: edgetune keys list {self.folder}; give more digits, or --role",
            )
        ((role, full),) = matches
        before = self.keys(role)
        rest = [key for key in before if key.keyid != full]
        least = self.root().signed.roles[role].threshold if role in ROOT_ROLES else _least(role)
        if len(rest) < least:
            message = f"{role} needs {least} keys, and {len(rest)} would be left"
            raise UsageError(message, f"replace it: edgetune keys rotate {self.folder} {role}")
        self._replace(role, before, rest)
        return role

    def _new_key(self, role: str, external: ExternalKey | None = None) -> Key:
        if external is not None:
            if external.key.keyid in {key.keyid for key in self.keys(role)}:
                message = f"{role} has the key {external.key.keyid[:8]} of {external.uri or 'its author'} already"
                raise UsageError(message, "use another one")
            return external.key if external.uri is None else write_external_key(self.folder, role, external)
        return write_new_key(self.folder, role, self._passphrase)

    def _replace(
        self, role: str, before: Sequence[Key], kept: Sequence[Key], make: Callable[[], Key] | None = None
    ) -> None:
        """Make a role that trusted the keys in `before` trust those in `kept`, and a new one.

        The new key is deleted if that cannot be signed, or if another command has changed the role's keys meanwhile.
        """
        new = [] if make is None else [make()]
        try:
            if role in ROOT_ROLES:
                self._write_next_root(role, [*kept, *new])
            else:
                # The passphrase of the new key may have been asked for since.
                with FileLock(self.folder / _LOCK):
                    if self.keys(role) != before:
                        raise UsageError(f"another command has written {self.trusted_keys(role)}", "run this one again")
                    self._write_bundle_keys(role, [*kept, *new])
        except BaseException:
            for key in new:
                path_of(self.folder, role, key).unlink(missing_ok=True)
            raise

    def _write_next_root(self, role: str, keys: Sequence[Key]) -> None:
        before, root = self.root().signed, self.root().signed
        root.version += 1
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        for key in keys:
            root.add_key(key, role)
        self._write_root(root, before)

    def _write_root(self, root: Root, before: Root | None) -> None:
        """Sign a root with its own keys and those of the root before, and write it.

        UsageError if too few private keys are in the folder, or if another command has written one meanwhile.
        """
        now = datetime.now(UTC).replace(microsecond=0)
        root.expires, root.unrecognized_fields[ISSUED] = now + timedelta(days=_ROOT_DAYS), now.isoformat()
        metadata = Metadata(root)
        delegators = [item for item in (before, root) if item is not None]
        keys = {keyid: item.keys[keyid] for item in delegators for keyid in item.roles[Root.type].keyids}
        with signing(Root.type):
            for signer in self.signers(Root.type, keys.values()):
                metadata.sign(signer, append=True)
        for delegator in delegators:
            result = delegator.get_verification_result(Root.type, metadata.signed_bytes, metadata.signatures)
            if not result.verified:
                message = f"{len(result.signed)} private root keys are in {self.folder}"
                raise UsageError(f"{message}, and {result.threshold} must sign", "copy more of root-*.pem there for it")
        path = self.folder / f"{root.version}.root.json"
        with replacing(path) as temporary:
            temporary.write_bytes(metadata.to_bytes())
            try:
                path.hardlink_to(temporary)
            except FileExistsError as error:
                raise UsageError(f"another command has written {path}", "run this one again") from error
            except OSError:
                # A file system without links, such as that of a stick.
                pass

    def _write_bundle_keys(self, role: str, keys: Sequence[Key]) -> None:
        # Also without keys: copied to others who publish, it takes an author's keys away there too.
        write_file(self.trusted_keys(role), trusted_keys_text(keys))


def _least(role: str) -> int:
    """How many keys a role that is not the root's needs: an author may lose the last one."""
    return 0 if is_of_author(role) else 1


def is_of_author(role: str) -> bool:
    """Whether a role is the one of an adapter's author."""
    return "/" in role.removeprefix(OF_ONE_BUNDLE)


def missing_keys(role: str, keys: KeyFolder) -> NotFoundError:
    """The error where too few private keys of a role are at hand."""
    message = f"the private keys of {role} are not in {keys.folder}"
    own = next(filter(is_of_author, keys.roles_here), None)
    if own is None:
        return NotFoundError(message, f"copy them there, or replace them: edgetune keys rotate {keys.folder} {role}")
    if role in ROOT_ROLES:
        return NotFoundError(message, "as an author, ask the owner of the bundle for one")
    return NotFoundError(message, f"as the author of {own}, publish with --adapter {own.rpartition('/')[2]}")


def require_name(field: str, name: str) -> None:
    """UsageError unless a name can be part of a repository's paths."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{field} is {name!r}", "use up to 100 letters, digits, dots, - and _")

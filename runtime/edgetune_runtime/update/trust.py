"""Finds the newest release of a bundle that the repository's keys have signed, with TUF's client workflow.

TUF refuses metadata that is older than what this device has seen, expired, mixed of several states of the repository,
or signed by others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.bundle.parts import LONGEST_PART
from edgetune_runtime.bundle.records import MOST_AUTHORS
from edgetune_runtime.errors import EdgetuneError, NotFoundError, UsageError, VerificationError, importing, parsing
from edgetune_runtime.wording import shortened

from .fetch import Location, MissingError
from .pieces import KnownPieces, Piece, assembled, known_pieces, parse_pieces
from .release import (
    ISSUED,
    LONGEST_RELEASE,
    METADATA_FOLDER,
    PIECES,
    ROLE_PREFIX,
    ROOT_VERSION,
    TARGETS_FOLDER,
    Release,
    ReleasedPart,
    author_of,
    parse_release,
    parse_released_part,
    path_of,
    path_of_part,
)

with importing("updates need", '"edgetune-runtime[update]"'):
    from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
    from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
    from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

if TYPE_CHECKING:
    from tuf.api.metadata import Signed

_REMEDY = "publish the bundle again"
_TIMESTAMP = "timestamp.json"
_MOST_TIMESTAMP_BYTES = 4000
_NEWEST, _OLDER, _PART = "release.json", "older-release.json", "part-of-{}.json"
"""Files of releases and parts that were read before."""
_CLOCK_ERROR = timedelta(days=1)
"""How far a clock may be behind what has passed and still count as right."""
_CONFIG = UpdaterConfig(max_root_rotations=256, timestamp_max_length=_MOST_TIMESTAMP_BYTES)


class TrustedRepository:
    """The view of a repository that a device trusts: metadata in `folder`, which begins with `root`.

    `not_before` is a time that has passed for certain, whatever the clock says; `issued` is a later one, after
    `refresh`. Pieces of a release that are in `known`, or in one that was read before, are not read again.
    """

    def __init__(
        self, location: Location, folder: Path, root: bytes, not_before: datetime, known: Sequence[bytes] = ()
    ) -> None:
        self._location, self._folder, self._known = location, folder, known
        self.issued = max(not_before, issued_of(read_root(root)))
        self._fetcher = _Fetcher(location)
        folder.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._updater = Updater(
                str(folder), f"{location.text}/{METADATA_FOLDER}", fetcher=self._fetcher, config=_CONFIG, bootstrap=root
            )
        # A clock that was reset to 1970 would accept what expired long ago.
        self._now = max(datetime.now(UTC), self.issued)
        self._updater._trusted_set.reference_time = self._now

    def refresh(self) -> None:
        """Bring the metadata up to date; one request if nothing has changed.

        UnreachableError if the repository cannot be reached, VerificationError if its metadata is not acceptable.
        """
        path = self._folder / _TIMESTAMP
        before = path.read_bytes() if path.is_file() else b""
        newest_root = _root_version_in(before)
        # Timestamps of other tools do not name it: there, TUF's order is kept, in which the root comes first.
        if newest_root is not None and self._fetcher.read_timestamp() == before:
            self._fetcher.newest_root = newest_root
        with self._errors():
            self._updater.refresh()
            timestamp = Metadata[Timestamp].from_file(str(path)).signed
            issued = issued_of(timestamp)
        clock = datetime.now(UTC)
        if clock >= self.issued - _CLOCK_ERROR:
            # Who has the key must not make all that is signed later look expired to a device whose clock is right.
            issued = min(issued, clock)
        self.issued = max(self.issued, issued)

    def names(self) -> list[str]:
        """The bundles of the repository, after `refresh`."""
        delegations = self._metadata(Targets.type).delegations
        roles = {} if delegations is None else delegations.roles or {}
        return [role.removeprefix(ROLE_PREFIX) for role in map(str, roles) if role.startswith(ROLE_PREFIX)]

    def _metadata(self, role: str) -> Targets:
        """The metadata of a role that was verified last."""
        with self._errors():
            return Metadata[Targets].from_file(str(self._folder / f"{role}.json")).signed

    def release(self, name: str, channel: str, version: int | None = None) -> Release:
        """The newest release of a bundle in a channel, or an older one, after `refresh`; NotFoundError without it."""
        path = path_of(name, channel, version)
        data = self.read_target(path, self._folder / (_NEWEST if version is None else _OLDER))
        if data is None:
            names = ", ".join(self.names()) or "none"
            message = f"the repository has no bundle {name!r} in the channel {channel!r}"
            raise NotFoundError(message, f"its bundles are: {names}")
        release = parse_release(data)
        if (release.name, release.channel) != (name, channel) or version not in {None, release.version}:
            message = f"the release {path} is {release.version} of {release.name} in {release.channel}"
            raise VerificationError(message, _REMEDY)
        return release

    def parts(self, name: str, channel: str) -> list[ReleasedPart]:
        """The newest part of each key of the bundle's authors in a channel, after `release`.

        VerificationError if the metadata of one is not acceptable, or its part is damaged.
        """
        delegations = self._metadata(f"{ROLE_PREFIX}{name}").delegations
        granted = (None if delegations is None else delegations.roles) or {}
        with self._errors():
            listed = Metadata[Snapshot].from_file(str(self._folder / "snapshot.json")).signed.meta
        # Who has not published anything yet has no metadata.
        roles = [role for role in granted if author_of(role)[0] == name and f"{role}.json" in listed]
        if len(roles) > MOST_AUTHORS:
            raise VerificationError(f"{name} has {len(roles)} keys of authors", _REMEDY)
        parts = []
        for role in roles:
            data = self.read_target(path_of_part(role, channel), self._folder / _PART.format(role), LONGEST_PART)
            if self._metadata(role).delegations is not None:
                # Python-tuf keeps metadata by its role, and would take that of another bundle or author from here.
                raise VerificationError(f"the author's role {role} delegates to others", _REMEDY)
            if data is not None:
                parts.append(parse_released_part(data, role))
        return parts

    def read_target(self, path: str, cached: Path, most_bytes: int = LONGEST_RELEASE) -> bytes | None:
        """The contents of a target, which the file `cached` keeps; None if there is none with this path."""
        with self._errors():
            target = self._updater.get_targetinfo(path)
            if target is None:
                return None
            if target.length > most_bytes:
                raise VerificationError(f"the release {path} has {target.length} bytes", _REMEDY)
            if self._updater.find_cached_target(target, str(cached)) is None:
                self._fetcher.pieces = _pieces_of(target)
                before = (path for path in {cached, self._folder / _NEWEST, self._folder / _OLDER} if path.is_file())
                self._fetcher.known = known_pieces([*self._known, *(path.read_bytes() for path in before)])
                self._updater.download_target(target, str(cached), f"{self._location.text}/{TARGETS_FOLDER}")
            return cached.read_bytes()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of TUF into ours."""
        where = self._location.text
        try:
            yield
        except ExpiredMetadataError as error:
            message = f"{where}: {error}, as it is {self._now:%Y-%m-%d %H:%M} UTC here"
            raise VerificationError(message, "sign it again (edgetune publish), or set the clock") from error
        except DownloadError as error:
            if isinstance(error.__cause__, EdgetuneError):
                raise error.__cause__ from None
            raise VerificationError(f"{where}: {error}", "check the address, or publish again") from error
        except RepositoryError as error:
            message = f"{where} is refused: {shortened(str(error)) or type(error).__name__}"
            raise VerificationError(message, "check the address; if it is right, ask who publishes it") from error


class _Fetcher(FetcherInterface):
    """Reads TUF's files from a repository, the timestamp once, and no root after `newest_root`.

    The `pieces` of the target to read next that are `known` are copied from there.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._timestamp: bytes | None = None
        self.newest_root: int | None = None
        self.pieces: tuple[Piece, ...] = ()
        self.known: KnownPieces = {}

    def read_timestamp(self) -> bytes:
        """The timestamp, as it was first read; UnreachableError if that fails."""
        if self._timestamp is None:
            self._timestamp = self._location.read(f"{METADATA_FOLDER}/{_TIMESTAMP}", _MOST_TIMESTAMP_BYTES)
        return self._timestamp

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(f"{self._location.text}/")
        if path == f"{METADATA_FOLDER}/{_TIMESTAMP}":
            return iter([self.read_timestamp()])
        if self.newest_root is not None and path == f"{METADATA_FOLDER}/{self.newest_root + 1}.root.json":
            raise DownloadHTTPError("the root is unchanged", 404)
        return self._blocks(path)

    def _blocks(self, path: str) -> Iterator[bytes]:
        try:
            if path.startswith(f"{TARGETS_FOLDER}/") and self.pieces:
                yield from assembled(self._location, path, self.pieces, self.known)
            else:
                # The caller ends a file that is longer than it may be.
                yield from self._location.blocks(path, LONGEST_RELEASE + 1)
        except MissingError as error:
            raise DownloadHTTPError(str(error), 404) from error
        except EdgetuneError as error:
            raise DownloadError(str(error)) from error


def read_root(data: bytes) -> Root:
    """The root metadata in a file; UsageError if it is not root metadata, or is damaged."""
    try:
        metadata = Metadata[Root].from_bytes(data)
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError, RecursionError) as error:
        remedy = "give a N.root.json of `edgetune keys init` with --root"
        raise UsageError("the trusted file has no root of a repository", remedy) from error
    return metadata.signed


def _pieces_of(target: TargetFile) -> tuple[Piece, ...]:
    """The pieces of a release that its metadata lists; VerificationError if the list is damaged."""
    custom = target.custom if isinstance(target.custom, dict) else {}
    with parsing(f"the metadata of the release {target.path} is damaged", _REMEDY):
        return parse_pieces(custom.get(PIECES, []), target.length)


def _root_version_in(timestamp: bytes) -> int | None:
    """The newest root that a timestamp names; None if it names none."""
    try:
        version = Metadata[Timestamp].from_bytes(timestamp).signed.unrecognized_fields.get(ROOT_VERSION)
    except RepositoryError:
        return None
    return version if isinstance(version, int) else None


def issued_of(signed: Signed) -> datetime:
    """When metadata was signed; 1970 if it does not say."""
    fields: Mapping[str, Any] = signed.unrecognized_fields
    try:
        return datetime.fromisoformat(fields[ISSUED]).astimezone(UTC)
    except (LookupError, TypeError, ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)

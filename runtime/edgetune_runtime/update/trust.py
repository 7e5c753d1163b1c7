"""Finds the newest release of a bundle that the repository's keys have signed, with TUF's client workflow.

TUF refuses metadata that is older than what this device has seen, expired, mixed of several states of the repository,
or signed by others. Roles of bundles have names that are unique in the repository, and may not delegate further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import EdgetuneError, NotFoundError, UsageError, VerificationError, importing

from .fetch import Location, MissingError
from .release import (
    ISSUED,
    LONGEST_RELEASE,
    METADATA_FOLDER,
    ROLE_PREFIX,
    TARGETS_FOLDER,
    Release,
    parse_release,
    path_of,
)

with importing("updates need", '"edgetune-runtime[update]"'):
    from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
    from tuf.api.metadata import Metadata, Root, Targets, Timestamp
    from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

if TYPE_CHECKING:
    from tuf.api.metadata import Signed

_TIMESTAMP = "timestamp.json"
_MOST_TIMESTAMP_BYTES = 4000
_CONFIG = UpdaterConfig(
    max_root_rotations=256,
    # The role of a bundle, below the targets role.
    max_delegations=1,
    timestamp_max_length=_MOST_TIMESTAMP_BYTES,
)


class TrustedRepository:
    """The view of a repository that a device trusts: metadata in `folder`, which begins with `root`.

    `not_before` is a time that has passed for certain, whatever the clock says; `issued` is a later one, after
    `refresh`.
    """

    def __init__(self, location: Location, folder: Path, root: bytes, not_before: datetime) -> None:
        self._location, self._folder = location, folder
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
        known = self._folder / _TIMESTAMP
        data = self._location.read(f"{METADATA_FOLDER}/{_TIMESTAMP}", _MOST_TIMESTAMP_BYTES)
        self._fetcher.timestamp = data
        # The same timestamp means the same state, of which all but the next root is here.
        self._fetcher.is_unchanged = known.is_file() and known.read_bytes() == data
        with self._errors():
            self._updater.refresh()
            timestamp = Metadata[Timestamp].from_file(str(known)).signed
            self.issued = max(self.issued, issued_of(timestamp))

    def names(self) -> list[str]:
        """The bundles of the repository, after `refresh`."""
        with self._errors():
            delegations = Metadata[Targets].from_file(str(self._folder / "targets.json")).signed.delegations
        roles = {} if delegations is None else delegations.roles or {}
        return [role.removeprefix(ROLE_PREFIX) for role in roles if role.startswith(ROLE_PREFIX)]

    def release(self, name: str, channel: str, version: int | None = None) -> Release:
        """The newest release of a bundle in a channel, or an older one, after `refresh`; NotFoundError without it."""
        path = path_of(name, channel, version)
        with self._errors():
            target = self._updater.get_targetinfo(path)
            if target is None:
                names = ", ".join(self.names()) or "none"
                message = f"the repository has no bundle {name!r} in the channel {channel!r}"
                raise NotFoundError(message, f"its bundles are: {names}")
            if target.length > LONGEST_RELEASE:
                raise VerificationError(f"the release {path} has {target.length} bytes", "publish the bundle again")
            cached = self._folder / ("release.json" if version is None else "older-release.json")
            if self._updater.find_cached_target(target, str(cached)) is None:
                self._updater.download_target(target, str(cached), f"{self._location.text}/{TARGETS_FOLDER}")
            release = parse_release(cached.read_bytes())
        if (release.name, release.channel) != (name, channel):
            message = f"the release {path} is of {release.name} in {release.channel}"
            raise VerificationError(message, "publish the bundle again")
        return release

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
                raise error.__cause__ from error
            raise VerificationError(f"{where}: {error}", "check the address, or publish again") from error
        except RepositoryError as error:
            message = f"{where} is refused: {str(error).splitlines()[0][:200]}"
            raise VerificationError(message, "check the address; if it is right, ask who publishes it") from error


class _Fetcher(FetcherInterface):
    """Reads TUF's files from a repository, but the timestamp, which was read before."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self.timestamp = b""
        self.is_unchanged = False

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(f"{self._location.text}/")
        if path == f"{METADATA_FOLDER}/{_TIMESTAMP}":
            return iter([self.timestamp])
        if self.is_unchanged and path.endswith(".root.json"):
            raise DownloadHTTPError("the root is unchanged", 404)
        return self._blocks(path)

    def _blocks(self, path: str) -> Iterator[bytes]:
        try:
            # The caller ends a file that is longer than it may be.
            yield from self._location.blocks(path, LONGEST_RELEASE + 1)
        except MissingError as error:
            raise DownloadHTTPError(str(error), 404) from error
        except EdgetuneError as error:
            raise DownloadError(str(error)) from error


def read_root(data: bytes) -> Root:
    """The root metadata in a file; UsageError if it is none."""
    try:
        return Metadata[Root].from_bytes(data).signed
    except (RepositoryError, ValueError, RecursionError) as error:
        remedy = "give a N.root.json of `edgetune keys init`"
        raise UsageError("the file of --root has no root of a repository", remedy) from error


def issued_of(signed: Signed) -> datetime:
    """When metadata was signed; 1970 if it does not say."""
    fields: Mapping[str, Any] = signed.unrecognized_fields
    try:
        return datetime.fromisoformat(fields[ISSUED]).astimezone(UTC)
    except (LookupError, TypeError, ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)

"""An artifact in a registry, over HTTP by the OCI distribution specification."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from http import HTTPStatus
from pathlib import Path

from edgetune_runtime.bundle import FileEntry
from edgetune_runtime.errors import EdgetuneError, NotFoundError, UnreachableError, UsageError, VerificationError
from edgetune_runtime.update.fetch import limited, range_from, skip_to
from edgetune_runtime.update.http_client import HttpClient, StatusError
from edgetune_runtime.wording import shortened
from urllib3 import BaseHTTPResponse

from .artifact import DIGEST, INDEX_TYPE, MANIFEST_TYPE, MOST_ARTIFACT_MANIFEST_BYTES
from .login import Credentials, answer
from .reference import Reference

_CHECK = "check the address and the network, and add --insecure for a registry without encryption"
_NEXT = re.compile(r"""<([^<>]*)>\s*;\s*rel="?next"?""")
"""In the header `Link`, the address of the next part of a list."""
_MOST_PARTS = 16


class Registry:
    """The artifact of a reference in its registry; over plain HTTP if that is on this machine or `insecure`.

    All functions raise UnreachableError if the registry cannot be reached or is not a registry, UsageError if it wants
    another login, NotFoundError if it lacks what is asked for.
    """

    def __init__(
        self, reference: Reference, credentials: Credentials | None, http: HttpClient, *, insecure: bool
    ) -> None:
        self.reference, self._http = reference, http
        scheme = "http" if insecure or reference.is_on_loopback else "https"
        self._api = f"{scheme}://{reference.host}/v2{reference.place.removeprefix(reference.host)}"
        self._credentials, self._authorization = credentials, ""

    def at(self, reference: Reference) -> Registry:
        """The place of another artifact with the same name."""
        other = copy(self)
        other.reference = reference
        return other

    def has_blob(self, entry: FileEntry) -> bool:
        """Whether the registry has this file."""
        try:
            with self._reply("HEAD", f"blobs/{DIGEST}{entry.sha256}") as reply:
                return reply.headers.get("Content-Length") == str(entry.bytes)
        except NotFoundError:
            return False

    def put_blob(self, entry: FileEntry, source: Path | bytes) -> None:
        """Send a file, of which the registry compares the digest."""
        with self._reply("POST", "blobs/uploads/", b"") as reply:
            place = self._uploads_to(reply)
        separator = "&" if "?" in place else "?"
        with self._reply("PUT", f"{place}{separator}digest={DIGEST}{entry.sha256}", source) as reply:
            self._require_created(reply, entry.sha256)

    def blocks(self, entry: FileEntry, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file from an offset on, at most its size."""
        with self._reply("GET", f"blobs/{DIGEST}{entry.sha256}", headers=range_from(offset)) as reply:
            skip_to(offset, reply)
            yield from limited(reply, entry.bytes - offset)

    def read_manifest(self) -> bytes:
        """The artifact's manifest; VerificationError if the registry says itself that it is another one."""
        headers = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}"}
        with self._reply("GET", f"manifests/{self._version}", headers=headers) as reply:
            data = b"".join(limited(reply, MOST_ARTIFACT_MANIFEST_BYTES))
            self._require_digest(reply, hashlib.sha256(data).hexdigest())
        return data

    def read_referrers(self) -> list[bytes]:
        """The index of what refers to the artifact, by its digest, as the registry divides it.

        NotFoundError if there is none, UnreachableError for more than `_MOST_PARTS`.
        """
        parts: list[bytes] = []
        place: str | None = f"referrers/{self._version}"
        try:
            while place is not None and len(parts) < _MOST_PARTS:
                with self._reply("GET", place) as reply:
                    parts.append(b"".join(limited(reply, MOST_ARTIFACT_MANIFEST_BYTES)))
                    found = _NEXT.search(reply.headers.get("Link", ""))
                    place = None if found is None else self._address(found[1])
        except NotFoundError:
            # A registry of before version 1.1 of the specification.
            return [self.at(self.reference.of_referrers()).read_manifest()]
        if place is not None:
            message = f"{self._api} lists too much that refers to {self.reference}"
            raise UnreachableError(message, "delete old referrers in the registry")
        return parts

    def put_manifest(self, data: bytes, media_type: str = MANIFEST_TYPE) -> bool:
        """Send the artifact's manifest for its tag, which may have been another artifact's, or by its digest.

        Whether the registry lists it as a referrer of its subject.
        """
        headers = {"Content-Type": media_type}
        with self._reply("PUT", f"manifests/{self._version}", data, headers) as reply:
            self._require_created(reply, hashlib.sha256(data).hexdigest())
            return reply.headers.get("OCI-Subject") is not None

    @property
    def _version(self) -> str:
        """The tag or the digest, as in an address."""
        reference = self.reference
        return f"{DIGEST}{reference.digest}" if reference.tag is None else reference.tag

    @contextmanager
    def _reply(
        self, method: str, path: str, body: Path | bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """The reply to a request; `path` may be a whole address."""
        url = path if "://" in path else f"{self._api}/{path}"
        where = f"{method} {url.partition('?')[0]}"
        try:
            with ExitStack() as stack:
                try:
                    reply = stack.enter_context(self._sent(method, url, body, headers or {}))
                except StatusError as error:
                    # Storage to which a registry redirects must not name a service that gets the password.
                    if error.status != HTTPStatus.UNAUTHORIZED or not self._is_of_registry(error.url):
                        raise
                    challenge = error.headers.get("WWW-Authenticate", "")
                    self._authorization = answer(challenge, self._credentials, self._api, self._http)
                    reply = stack.enter_context(self._sent(method, url, body, headers or {}))
                yield reply
        except StatusError as error:
            raise self._problem(error, where) from error
        except (OSError, ValueError) as error:
            raise UnreachableError(f"{where} failed: {shortened(str(error))}", _CHECK) from error

    @contextmanager
    def _sent(
        self, method: str, url: str, body: Path | bytes | None, headers: Mapping[str, str]
    ) -> Iterator[BaseHTTPResponse]:
        # Storage to which a registry redirects, or has files sent, gets no password.
        login = self._authorization if self._is_of_registry(url) else ""
        described = {"Authorization": login} if login else {}
        if body is not None:
            described["Content-Type"] = "application/octet-stream"
        with ExitStack() as stack:
            data = stack.enter_context(body.open("rb")) if isinstance(body, Path) else body
            if isinstance(body, Path):
                described["Content-Length"] = str(body.stat().st_size)
            yield stack.enter_context(self._http.reply(method, url, {**described, **headers}, data))

    def _is_of_registry(self, url: str) -> bool:
        return urllib.parse.urlsplit(url).netloc == self.reference.host

    def _uploads_to(self, reply: BaseHTTPResponse) -> str:
        """The address that an upload goes to; UnreachableError if there is none, or encryption would be given up."""
        place = reply.headers.get("Location")
        if place is None:
            raise UnreachableError(f"{self._api} takes no uploads", _CHECK)
        return self._address(place)

    def _address(self, place: str) -> str:
        """The address that a reply names; UnreachableError if encryption would be given up."""
        url = urllib.parse.urljoin(f"{self._api}/", place)
        scheme = urllib.parse.urlsplit(self._api).scheme
        if not url.startswith(("https://", f"{scheme}://")):
            raise UnreachableError(f"{self._api} names the address {shortened(url)}, not one of {scheme}", _CHECK)
        return url

    def _require_created(self, reply: BaseHTTPResponse, digest: str) -> None:
        if reply.status != HTTPStatus.CREATED:
            raise UnreachableError(f"{self._api} did not store what was sent: status {reply.status}", _CHECK)
        self._require_digest(reply, digest)

    def _require_digest(self, reply: BaseHTTPResponse, digest: str) -> None:
        """VerificationError if the registry names another digest."""
        named = reply.headers.get("Docker-Content-Digest", f"{DIGEST}{digest}")
        if named != f"{DIGEST}{digest}":
            message = f"{self._api} names the digest {named[:80]} for {DIGEST}{digest}"
            raise VerificationError(message, "try again; if it stays so, do not use this registry")

    def _problem(self, error: StatusError, where: str) -> EdgetuneError:
        """What a status of the registry means."""
        host, text = self.reference.host, ""
        is_refused = error.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
        try:
            first = json.loads(error.body)["errors"][0]
            text = f": {shortened(str(first.get('message') or first['code']), 200)}"
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            if not is_refused and "html" in error.headers.get("Content-Type", ""):
                return UnreachableError(f"{host} is not a registry: {where} gave a page, status {error.status}", _CHECK)
        if is_refused:
            return UsageError(f"{host} refuses {where}{text}", f"check the rights of the user: docker login {host}")
        if error.status == HTTPStatus.NOT_FOUND:
            return NotFoundError(f"{host} has no {where.partition('/v2/')[2]}{text}", "check the name and the tag")
        return UnreachableError(f"{where} failed with status {error.status}{text}", _CHECK)

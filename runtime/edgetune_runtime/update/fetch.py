"""Reads files of a repository over HTTP or from a folder, within limits of size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import IO

from edgetune_runtime import __version__
from edgetune_runtime.errors import UnreachableError, UsageError
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.wording import shortened

from .slow_replies import HANDLERS, is_too_slow

SILENT_S = 30.0
"""Limit of connecting, and of the pause between two bytes."""
_CHUNK_BYTES = 1 << 16
_MOST_REDIRECTS = 3
_PARTIAL = 206
"""The status of a reply with a part of a file."""
_CHECK = "check the address and the network"


class MissingError(UnreachableError):
    """The repository has no such file."""


class Location:
    """Where a repository is: an address of HTTP or HTTPS, or a folder, as on a USB stick."""

    def __init__(self, text: str) -> None:
        scheme = urllib.parse.urlsplit(text).scheme
        if "://" in text and scheme not in {"http", "https"}:
            raise UsageError(f"--repo {text!r} is not an address", "use http:// or https://, or a folder")
        self._is_folder = "://" not in text
        if self._is_folder and not _is_folder(text):
            raise UnreachableError(
                f"{shortened(text)} is not a folder", "give the address of a repository, or its folder"
            )
        # A folder is remembered, and this process need not start in the same one.
        self.text = str(Path(text).absolute()) if self._is_folder else text.rstrip("/")

    def read(self, path: str, most: int) -> bytes:
        """A whole file, whose path is as in an address.

        MissingError if there is none, UnreachableError if the connection is lost or the file too long.
        """
        data = b"".join(self.blocks(path, most + 1))
        if len(data) > most:
            raise UnreachableError(f"{self.text}/{path} has more than {most} bytes", "check the address")
        return data

    def blocks(self, path: str, most: int, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file from an offset on, at most `most`; errors as those of `read`."""
        where = f"{self.text}/{path}"
        try:
            with self._opened(path, offset) as source:
                yield from limited(source, most, where)
        except FileNotFoundError as error:
            raise MissingError(f"there is no {where}", _CHECK) from error
        except urllib.error.HTTPError as error:
            error.close()
            kind = MissingError if error.code in {403, 404, 410} else UnreachableError
            raise kind(f"cannot read {where}: status {error.code}", _CHECK) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            # It may be what the server has sent.
            raise UnreachableError(f"cannot read {where}: {shortened(str(reason))}", _CHECK) from error

    def _opened(self, path: str, offset: int) -> IO[bytes] | http.client.HTTPResponse:
        """A file from an offset on."""
        if self._is_folder:
            file = open_regular(Path(self.text, path), follows_links=True)
            file.seek(offset)
            return file
        headers = {"User-Agent": f"edgetune-run/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        request = urllib.request.Request(f"{self.text}/{path}", headers=headers)
        reply: http.client.HTTPResponse = OPENER.open(request, timeout=SILENT_S)
        skip_to(offset, reply, path)
        return reply


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        # Such as a name that is too long.
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, and none that gives up encryption."""

    max_redirections = _MOST_REDIRECTS

    def redirect_request(  # noqa: PLR0917 - as its base
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Refuse a change from HTTPS to HTTP, and to anything else."""
        # urllib would read the body, which may be endless.
        fp.close()
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and new.type not in {req.type, "https"}:
            raise urllib.error.URLError(f"it is redirected to {new.full_url[:200]}")
        return new


OPENER = urllib.request.build_opener(_Redirects, *HANDLERS)
"""Opens addresses of HTTP and HTTPS within these limits."""


def skip_to(offset: int, reply: http.client.HTTPResponse, where: str) -> None:
    """Read a reply up to an offset that was asked for, where the server ignores ranges."""
    begin = f"bytes {offset}-" if reply.status == _PARTIAL else ""
    if offset and not (begin and reply.headers.get("Content-Range", "").startswith(begin)):
        for _ in limited(reply, offset, where):
            pass


def limited(source: IO[bytes] | http.client.HTTPResponse, most: int, where: str) -> Iterator[bytes]:
    """At most `most` bytes of `source`; UnreachableError if they come too slowly."""
    begin, count = time.monotonic(), 0
    while count < most:
        data = source.read1(min(_CHUNK_BYTES, most - count))  # type: ignore[union-attr]
        if not data:
            return
        count += len(data)
        yield data
        if is_too_slow(begin, count):
            message = f"{where} came too slowly: {count} bytes in {time.monotonic() - begin:.0f} s"
            raise UnreachableError(message, "try again later")

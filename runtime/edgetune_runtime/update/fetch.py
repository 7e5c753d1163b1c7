"""Reads files of a repository over HTTP or from a folder, within limits of size and time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgetune_runtime.errors import UnreachableError, UsageError
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.wording import shortened

from .http_client import HttpClient, StatusError
from .state import refuse_login

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

_CHUNK_BYTES = 1 << 16
_PARTIAL = 206
"""The status of a reply with a part of a file."""
_CHECK = "check the address and the network"


class MissingError(UnreachableError):
    """The repository has no such file."""


class Location:
    """Where a repository is: an address of HTTP or HTTPS without a login, or a folder, as on a USB stick."""

    def __init__(self, text: str) -> None:
        refuse_login("--repo", text)
        scheme, separator, _ = text.partition("://")
        if separator and scheme.lower() not in {"http", "https"}:
            raise UsageError(f"--repo {text!r} is not an address", "use http:// or https://, or a folder")
        self._is_folder = not separator
        if self._is_folder and not _is_folder(text):
            raise UnreachableError(
                f"{shortened(text)} is not a folder", "give the address of a repository, or its folder"
            )
        # A folder is remembered, and this process need not start in the same one.
        self.text = str(Path(text).absolute()) if self._is_folder else text.rstrip("/")
        self._http = HttpClient("edgetune-run")

    def close(self) -> None:
        """Close the connection, which is kept from one file to the next."""
        self._http.close()

    def read(self, path: str, most: int) -> bytes:
        """A whole file, whose path is as in an address.

        MissingError if there is none, UnreachableError if the connection is lost or the file too long.
        """
        data = b"".join(self.blocks(path, most + 1))
        if len(data) > most:
            where = shortened(f"{self.text}/{path}")
            raise UnreachableError(f"{where} has more than {most} bytes", "check the address")
        return data

    def blocks(self, path: str, most: int, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file from an offset on, at most `most`; errors as those of `read`."""
        where = shortened(f"{self.text}/{path}")
        try:
            with self._opened(path, offset) as source:
                yield from limited(source, most)
        except FileNotFoundError as error:
            raise MissingError(f"there is no {where}", _CHECK) from error
        except StatusError as error:
            kind = MissingError if error.status in {403, 404, 410} else UnreachableError
            raise kind(f"cannot read {where}: {error}", _CHECK) from error
        except (OSError, ValueError) as error:
            # The reason may be what the server has sent.
            raise UnreachableError(f"cannot read {where}: {shortened(str(error))}", _CHECK) from error

    @contextmanager
    def _opened(self, path: str, offset: int) -> Iterator[IO[bytes] | BaseHTTPResponse]:
        """A file from an offset on."""
        if self._is_folder:
            with open_regular(Path(self.text, path), follows_links=True) as file:
                file.seek(offset)
                yield file
            return
        with self._http.reply("GET", f"{self.text}/{path}", range_from(offset)) as reply:
            skip_to(offset, reply)
            yield reply


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        # Such as a name that is too long.
        return False


def range_from(offset: int) -> dict[str, str]:
    """The header of a request for a file from an offset on."""
    return {"Range": f"bytes={offset}-"} if offset else {}


def skip_to(offset: int, reply: BaseHTTPResponse) -> None:
    """Read a reply up to an offset that was asked for, where the server ignores ranges."""
    begin = f"bytes {offset}-" if reply.status == _PARTIAL else ""
    if offset and not (begin and reply.headers.get("Content-Range", "").startswith(begin)):
        for _ in limited(reply, offset):
            pass


def limited(source: IO[bytes] | BaseHTTPResponse, most: int) -> Iterator[bytes]:
    """At most `most` bytes of `source`."""
    count = 0
    while count < most:
        data = source.read1(min(_CHUNK_BYTES, most - count))  # type: ignore[union-attr]
        if not data:
            return
        count += len(data)
        yield data

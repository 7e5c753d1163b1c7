"""Files are read within limits of size and time, whatever the server or the folder does."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from edgetune_runtime.errors import UnreachableError
from edgetune_runtime.update import fetch, slow_replies
from edgetune_runtime.update.fetch import Location, MissingError

MOST = 1000
OK = b"HTTP/1.1 200 OK\r\n"
FOUND = b"HTTP/1.1 302 Found\r\nLocation: "


@contextmanager
def sending(parts: Iterable[bytes], pause_s: float = 0.0) -> Iterator[str]:
    """The address of a server that answers the first request with these parts, and sends until it is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of patience instead of a minute."""
    monkeypatch.setattr(slow_replies, "_GRACE_S", 1.0)
    monkeypatch.setattr(fetch, "SILENT_S", 0.5)


def test_a_whole_file_is_read() -> None:
    with sending([OK, b"Content-Length: 4\r\n\r\n", b"data"]) as url:
        assert Location(url).read("x", MOST) == b"data"


@pytest.mark.parametrize(
    ("head", "dripping"),
    [
        (OK, b"x"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (OK + b"\r\n", b"x"),
    ],
    ids=["head", "size of a chunk", "chunks", "body"],
)
def test_a_reply_that_comes_in_drops_is_given_up(head: bytes, dripping: bytes) -> None:
    parts = itertools.chain([head], itertools.repeat(dripping))
    problem = "came too slowly"
    with sending(parts, pause_s=0.02) as url, pytest.raises(UnreachableError, match=problem):
        Location(url).read("x", MOST)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([b""], "timed out"),
        ([b"SSH-2.0-OpenSSH\r\n", b"\r\n"], "SSH-2.0"),
        ([OK, b"Content-Length: 999999999999\r\n\r\n", b"x" * (MOST + 1)], "more than 1000 bytes"),
        (itertools.chain([OK], itertools.repeat(b"A: b\r\n" * 100)), "more than 100 headers"),
        (itertools.chain([OK, b"\r\n"], itertools.repeat(b"x" * 1000)), "more than 1000 bytes"),
        (itertools.chain([FOUND, b"http://127.0.0.1:1/\r\n\r\n"], itertools.repeat(b"x" * 1000)), "refused"),
        ([FOUND, b"ftp://127.0.0.1/x\r\n\r\n"], "redirected to ftp"),
        ([FOUND, b"file:///etc/passwd\r\n\r\n"], "status 302"),
        ([b"HTTP/1.1 500 Oops\r\n\r\n"], "status 500"),
    ],
    ids=["silent", "no HTTP", "long", "headers", "endless", "endless redirect", "to FTP", "to a file", "status"],
)  # fmt: skip
def test_what_is_no_file_of_a_repository_is_given_up_in_one_line(parts: Iterable[bytes], problem: str) -> None:
    pause_s = 0.6 if parts == [b""] else 0.0
    with sending(parts, pause_s) as url, pytest.raises(UnreachableError, match=problem) as caught:
        Location(url).read("x", MOST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["none", "folder", "pipe", "loop", "endless", "long"])
def test_what_is_no_file_in_a_folder_is_given_up_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "loop":
        path.symlink_to(path)
    if kind == "endless":
        path.symlink_to("/dev/zero")
    if kind == "long":
        path.write_bytes(b"x" * (MOST + 1))
    with pytest.raises(MissingError if kind == "none" else UnreachableError) as caught:
        Location(str(tmp_path)).read("x", MOST)
    assert "\n" not in str(caught.value)

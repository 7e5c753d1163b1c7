"""Files are read within limits of size and time, whatever the server or the folder does."""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from certificates import self_signed
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from edgetune_runtime.errors import UnreachableError, UsageError
from edgetune_runtime.update import http_client, slow_replies
from edgetune_runtime.update.fetch import Location, MissingError
from ports import http_server

MOST = 1000
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LONG_HEADER = b"A: " + b"b" * 1000 + b"\r\n"
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


@contextmanager
def answering(
    replies: int = 100, protocol: str = "HTTP/1.1", tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[list[str]]]]:
    """A server's address, and the paths asked for on each connection, which it closes after so many replies."""
    connections: list[list[str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def setup(self) -> None:
            self.asked: list[str] = []
            connections.append(self.asked)
            super().setup()

        def do_GET(self) -> None:
            if len(self.asked) == replies:
                self.close_connection = True
                return
            self.asked.append(self.path)
            body = b"x" * (100_000 if self.path == "/long" else 4)
            self.send_response(404 if self.path == "/missing" else 200)
            if self.path == "/chunked":
                self.send_header("Transfer-Encoding", "chunked")
                body = b"4\r\nxxxx\r\n0\r\n\r\n"
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http_server(Handler, tls=tls) as url:
        yield url, connections


def read(where: str) -> bytes:
    with closing(Location(where)) as location:
        return location.read("x", MOST)


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of patience instead of a minute."""
    monkeypatch.setattr(slow_replies, "_GRACE_S", 1.0)
    monkeypatch.setattr(http_client, "SILENT_S", 0.5)


def test_a_whole_file_is_read() -> None:
    with sending([OK, b"Content-Length: 4\r\n\r\n", b"data"]) as url:
        assert read(url) == b"data"


def read_often(url: str) -> None:
    """Read a file, two that need not be read to their end, one that is missing, and a file again."""
    with closing(Location(url)) as location:
        assert location.read("x", 4) == b"xxxx"
        for path in ("x", "chunked"):
            assert b"".join(location.blocks(path, 4)) == b"xxxx"
        with pytest.raises(MissingError, match="status 404"):
            location.read("missing", MOST)
        assert location.read("x", MOST) == b"xxxx"


@pytest.mark.parametrize(
    ("replies", "protocol", "connections"),
    [(100, "HTTP/1.1", 1), (2, "HTTP/1.1", 3), (100, "HTTP/1.0", 5)],
    ids=["kept", "closed meanwhile", "never kept"],
)
def test_a_connection_is_kept_until_the_server_closes_it(replies: int, protocol: str, connections: int) -> None:
    with answering(replies, protocol) as (url, asked):
        read_often(url)
    assert len(asked) == connections
    assert [path for paths in asked for path in paths] == ["/x", "/x", "/chunked", "/missing", "/x"]


def test_a_connection_is_not_kept_if_much_of_a_reply_is_not_wanted() -> None:
    with answering() as (url, asked), closing(Location(url)) as location:
        for _ in range(2):
            assert b"".join(location.blocks("long", MOST)) == b"x" * MOST
        assert asked == [["/long"], ["/long"]]


def test_a_server_needs_a_certificate_that_the_system_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "server.pem").write_bytes(self_signed(key).public_bytes(Encoding.PEM))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem", tmp_path / "key.pem")
    with answering(tls=tls) as (url, asked):
        with pytest.raises(UnreachableError, match="certificate verify failed"):
            read(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
        read_often(url)
    assert [len(paths) for paths in asked] == [5]


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as (url, asked):
        monkeypatch.setenv("http_proxy", url.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for where in ("http://repository.invalid", url):
            assert read(where) == b"xxxx"
    assert asked == [["http://repository.invalid/x"], ["/x"]]


@pytest.mark.parametrize(
    ("head", "dripping", "problem"),
    [
        (OK, b"x", "came too slowly"),
        (b"", b"HTTP/1.1 100 Continue\r\n" + LONG_HEADER + b"\r\n", "came too slowly"),
        (OK + CHUNKED, b"0", "came too slowly"),
        (OK + CHUNKED, b"1\r\nx\r\n", "came too slowly"),
        (OK + CHUNKED + b"0\r\n", LONG_HEADER, "came too slowly"),
        (b"HTTP/1.1 404 Not Found\r\n" + CHUNKED, b"1;" + LONG_HEADER + b"x\r\n", "status 404"),
        (OK + b"\r\n", b"x", "came too slowly"),
    ],
    ids=["head", "continue", "size of a chunk", "chunks", "trailers", "missing", "body"],
)
def test_a_reply_whose_content_comes_in_drops_is_given_up(
    head: bytes, dripping: bytes, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_replies, "_GRACE_S", 0.5)
    drops = itertools.repeat(dripping, 500)
    parts = itertools.chain([head], drops)
    with sending(parts, pause_s=0.02) as url, pytest.raises(UnreachableError, match=problem):
        read(url)
    assert next(drops, None), "the server was read to its end"


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
        ([FOUND, b"file:///etc/passwd\r\n\r\n"], "redirected to file"),
        ([b"HTTP/1.1 500 Oops\r\n\r\n"], "status 500"),
        ([], "closed connection without response"),
    ],
    ids=["silent", "no HTTP", "long", "headers", "endless", "endless redirect", "to FTP", "to a file", "status", "end"],
)  # fmt: skip
def test_what_is_no_file_of_a_repository_is_given_up_in_one_line(parts: Iterable[bytes], problem: str) -> None:
    pause_s = 0.6 if parts == [b""] else 0.0
    with sending(parts, pause_s) as url, pytest.raises(UnreachableError, match=problem) as caught:
        read(url)
    assert "\n" not in str(caught.value)


def test_an_address_with_a_login_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError, match="login in its address") as caught:
        Location("https://user:secret@127.0.0.1/repository")
    assert "secret" not in str(caught.value)


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
        read(str(tmp_path))
    assert "\n" not in str(caught.value)

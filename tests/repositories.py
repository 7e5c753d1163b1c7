"""Signed repositories of tiny bundles, and web servers for them that can misbehave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import Release
from edgetune_runtime.update.trust import TrustedRepository
from kits import write_bundle
from ports import http_server

from edgetune.common.progress import Progress
from edgetune.delivery.publish.key_folder import KeyFolder
from edgetune.delivery.publish.publish import Published
from edgetune.delivery.publish.publish import publish as publish_bundle

PASSPHRASE = "correct horse"
START = datetime.fromtimestamp(0, UTC)
"""The time of a device that knows none."""


def open_keys(folder: Path) -> KeyFolder:
    """The keys in a folder."""
    return KeyFolder(folder, lambda: PASSPHRASE)


def make_keys(folder: Path, root_keys: int = 1, threshold: int = 1) -> KeyFolder:
    """New keys, by default with one root key."""
    folder.mkdir(parents=True)
    keys = open_keys(folder)
    keys.create(root_keys, threshold)
    return keys


def publish(
    bundle: Path,
    repo: Path,
    keys: KeyFolder,
    *,
    min_runtime: str = "",
    share: float = 1.0,
    expires_days: int = 90,
    channel: str = "stable",
    keep: int | None = None,
) -> Published:
    """Publish a bundle without a word."""
    options = {"channel": channel, "min_runtime": min_runtime, "share": share}
    options |= {"expires_days": expires_days, "keep": keep}
    return publish_bundle(bundle, repo, keys, Progress(quiet=True), **options)


def seen_by_device(repo: Path, root: Path, folder: Path, name: str = "home") -> Release:
    """The newest release that a device with this root and metadata folder accepts."""
    trusted = TrustedRepository(Location(str(repo)), folder, root.read_bytes(), START)
    trusted.refresh()
    return trusted.release(name, "stable")


class Publisher:
    """A repository of a bundle "home" that answers with a text, in `formats`, and has `adapters`."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bundle = folder / "repo", folder / "home"
        self.keys = make_keys(folder / "keys")
        self.formats = ["gguf"]
        self.adapters: dict[str, AdapterEntry] = {}

    @property
    def root(self) -> Path:
        """The first root."""
        return self.keys.folder / "1.root.json"

    def __call__(self, answer: str, **options: object) -> Published:
        """Publish the bundle with another answer."""
        bundle = write_bundle(self.bundle, answer, self.formats, self.adapters)
        return publish(bundle, self.repo, self.keys, **options)  # type: ignore[arg-type]


class Server:
    """A web server for a folder: `requests` has what it was asked for, `sent` the bytes of each body.

    `connections` counts those that were opened.

    `cut_after` ends a connection after so many bytes of a blob, `ignores_ranges` sends whole files, `replies` has the
    body for some paths, `redirects` where others are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.sent: list[int] = []
        self.connections = 0
        self.cut_after: int | None = None
        self.ignores_ranges = False
        self.replies: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.url = ""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder on loopback in the block."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are sent apart, and the second would wait 40 ms for an acknowledgement of the first.
        disable_nagle_algorithm = True

        def setup(self) -> None:
            server.connections += 1
            super().setup()

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            server.requests.append(path)
            file, place = server.folder / path, server.redirects.get(path)
            if place or (path not in server.replies and not file.is_file()):
                self.send_response(302 if place else 404)
                if place:
                    self.send_header("Location", place)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(server.replies.get(path) or file.read_bytes(), is_blob=path.startswith("blobs/"))

        def _send(self, data: bytes, *, is_blob: bool) -> None:
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            offset = 0 if found is None or server.ignores_ranges else int(found[1])
            self.send_response(206 if offset else 200)
            if offset:
                self.send_header("Content-Range", f"bytes {offset}-{len(data) - 1}/{len(data)}")
            body = data[offset:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if server.cut_after is not None and is_blob:
                body, self.close_connection = body[: server.cut_after], True
            server.sent.append(len(body))
            self.wfile.write(body)

    with http_server(Handler) as server.url:
        yield server

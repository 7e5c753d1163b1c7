"""Signed repositories of tiny bundles, and web servers for them that can misbehave."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry, NewAdapter, read_manifest
from edgetune_runtime.bundle.parts import Part, part_path
from edgetune_runtime.bundle.signatures import part_file
from edgetune_runtime.inference.bundle_files import moved
from edgetune_runtime.update import update
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import Release, newest_parts, role_of_part, with_parts
from edgetune_runtime.update.trust import TrustedRepository
from edgetune_runtime.update.update import DeviceRelease, UpdateSource
from kits import write_bundle
from ports import http_server

from edgetune.common.progress import Progress
from edgetune.delivery.publish import author
from edgetune.delivery.publish.key_folder import OF_ONE_BUNDLE, KeyFolder
from edgetune.delivery.publish.publish import Published
from edgetune.delivery.publish.publish import publish as publish_bundle
from edgetune.delivery.publish.repository import Repository

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
    """The newest release, with the parts of authors, that a device with this root and metadata folder accepts."""
    trusted = TrustedRepository(Location(str(repo)), folder, root.read_bytes(), START)
    trusted.refresh()
    release = trusted.release(name, "stable")
    return with_parts(release, newest_parts(release, trusted.parts(name, "stable")))


def with_adapters(bundle: Path, *names: str, answer: str = "one", base: str = "ab" * 32) -> Path:
    """A bundle of adapters whose files have a text of their own each time."""
    entries = {}
    for name in names:
        file = f"adapters/{name}/adapter.gguf"
        (bundle / file).parent.mkdir(parents=True, exist_ok=True)
        (bundle / file).write_text(f"{name} of {bundle}: {answer}")
        entries[name] = AdapterEntry(name, "lora", {"gguf": "low_rank"}, {"gguf": file}, base)
    return write_bundle(bundle, answer, adapters=entries)


def keys_of_author(publisher: Publisher, folder: Path, adapter: str = "reply") -> KeyFolder:
    """A copy of the keys for an adapter's author, whose key is new; nobody else has it."""
    publisher.keys.add(f"bundles/home/{adapter}")
    shutil.copytree(publisher.keys.folder, folder)
    for kept, pattern in ((publisher.keys.folder, f"bundles-home-{adapter}-*.pem"), (folder, "*.pem")):
        for path in kept.glob(pattern):
            if kept != folder or not path.name.startswith((f"bundles-home-{adapter}-", "snapshot", "timestamp")):
                path.unlink()
    return open_keys(folder)


def author_of(publisher: Publisher, folder: Path) -> KeyFolder:
    """Publish "home" with "command" and "reply"; returns the keys of the author of "reply"."""
    keys = keys_of_author(publisher, folder)
    publish(with_adapters(publisher.bundle, "command", "reply"), publisher.repo, publisher.keys)
    return keys


def sign_as_author(publisher: Publisher, keys: KeyFolder, change: Callable[[Repository, str], None]) -> None:
    """Let the author of "reply" sign what no command of ours would: `change` gets the role."""
    (key,) = keys.keys("bundles/home/reply")
    repository = Repository(publisher.repo, keys)
    change(repository, role_of_part("home", "reply", key.keyid))
    repository.commit(expires_days=90)


def add_part(bundle: Path, keys: KeyFolder, new: NewAdapter) -> Path:
    """Put an adapter into a bundle's folder as a part that its author has signed, with the keys in `keys`; its file."""
    entry, name = new.entry, read_manifest(bundle).name
    path, holder = bundle / part_path(entry.name), f"{OF_ONE_BUNDLE}{name}/{entry.name}"
    entry, paths = moved(new, path.parent.relative_to(bundle).as_posix())
    for file, placed in paths.items():
        (bundle / placed).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new.folder / file, bundle / placed)
    part = Part(name, 1, entry, {paths[file]: about for file, about in new.files.items()})
    path.write_bytes(part_file(part, keys.signers(holder, keys.keys(holder))))
    return path


def publish_part(
    bundle: Path,
    repo: Path,
    keys: KeyFolder,
    adapter: str = "reply",
    *,
    channel: str = "stable",
    keep: int | None = None,
) -> Published:
    """Publish an adapter of a bundle with the key of its author."""
    return author.publish_part(bundle, adapter, repo, keys, channel=channel, expires_days=90, keep=keep)


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


def silent(_: str) -> None:
    """What says nothing of an update."""


def apply(prefix: Path, publisher: Publisher) -> tuple[DeviceRelease, bool]:
    """Update a device from a publisher's repository without a word."""
    return update.apply(prefix, UpdateSource(repo=str(publisher.repo), root=publisher.root), silent)


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

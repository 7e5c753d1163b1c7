"""A web server for a static repository, of whose replies some are cut off, damaged or an error; it counts its load."""

from __future__ import annotations

import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEAD_BYTES = 300
"""About what a request and the head of its reply have together: they count as bytes too."""


@dataclass
class Load:
    """What a server has been asked for since `reset`."""

    url: str = ""
    requests: int = 0
    bytes: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Begin to count again."""
        with self._lock:
            self.requests = self.bytes = self.failed = 0

    def add(self, count: int, *, failed: bool) -> None:
        """Count a request and the bytes of its reply."""
        with self._lock:
            self.requests += 1
            self.bytes += count + _HEAD_BYTES
            self.failed += failed

    def figures(self) -> dict[str, Any]:
        """The counts."""
        return {"requests": self.requests, "bytes": self.bytes, "failed": self.failed}


@contextmanager
def serving(folder: Path, failures: float) -> Iterator[Load]:
    """Serve a folder on loopback in the block; this part of the replies fails."""
    load, rng = Load(), random.Random(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            failure = rng.choice(("cut", "error", "damage")) if rng.random() < failures else None
            if failure == "error" or not path.is_file():
                load.add(0, failed=failure is not None)
                self.send_error(500 if failure else 404)
                return
            data = path.read_bytes()
            offset = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            body = bytearray(data[offset:])
            if failure == "damage" and body:
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            self.send_response(206 if offset else 200)
            if offset:
                self.send_header("Content-Range", f"bytes {offset}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = body[: rng.randrange(len(body) + 1)] if failure == "cut" else body
            load.add(len(sent), failed=failure is not None)
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        # Devices come in bursts.
        request_queue_size = 256
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        load.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield load
        finally:
            server.shutdown()
            thread.join()

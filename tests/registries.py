"""A real OCI registry on loopback, Debian's docker-registry, and registries that answer wrongly."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from certificates import self_signed
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from ports import free_port, http_server, wait_for_port

DOCKER_REGISTRY = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(
    DOCKER_REGISTRY is None, reason="docker-registry is not installed; Debian: apt install docker-registry"
)
_SETTINGS = """\
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {folder}/storage}}}}
http: {{addr: "127.0.0.1:{port}", secret: secret}}
{auth}
"""


@contextmanager
def docker_registry(folder: Path, auth: str = "") -> Iterator[str]:
    """HOST:PORT of a registry whose files are in `folder`, in the block; `auth` is that part of its settings."""
    assert DOCKER_REGISTRY is not None
    folder.mkdir(exist_ok=True)
    port = free_port()
    (folder / "config.yml").write_text(_SETTINGS.format(folder=folder, port=port, auth=auth))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([DOCKER_REGISTRY, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        wait_for_port(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def replying(reply: Callable[[str, str, dict[str, str]], Reply]) -> Iterator[str]:
    """HOST:PORT of a server that answers a method, a path and headers with a status, headers and a body."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = reply(self.command, self.path, dict(self.headers))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = _answer  # noqa: N815 - names of http.server

    with http_server(Handler) as address:
        yield address.removeprefix("http://")


class TokenService:
    """Gives tokens to whom knows the password, as a registry with these `settings` wants; `scopes` has those asked for.

    It signs a token for nothing without the password, as such services do.
    """

    def __init__(self, folder: Path, password: bytes) -> None:
        self.scopes: list[str] = []
        self._expected = "Basic " + base64.b64encode(password).decode()
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = self_signed(self._key)
        self._certificate = folder / "tokens.pem"
        self._certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        self._chain = [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()]

    def settings(self, host: str) -> str:
        """The part `auth` of a registry's settings, where the service is at HOST:PORT."""
        return (
            f"auth: {{token: {{realm: http://{host}/token, service: registry, issuer: tokens, "
            f"rootcertbundle: {self._certificate}}}}}"
        )

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        """Answer a request for a token."""
        (scope,) = parse_qs(urlsplit(path).query)["scope"]
        self.scopes.append(scope)
        kind, name, actions = scope.split(":")
        allowed = actions.split(",") if headers.get("Authorization") == self._expected else []
        now = int(time.time())
        claims = {"iss": "tokens", "sub": "me", "aud": "registry", "iat": now, "nbf": now - 5, "exp": now + 60}
        claims |= {"jti": "1", "access": [{"type": kind, "name": name, "actions": allowed}]}
        return 200, {}, json.dumps({"token": self._signed(claims)}).encode()

    def _signed(self, claims: dict[str, object]) -> str:
        parts = [{"typ": "JWT", "alg": "ES256", "x5c": self._chain}, claims]
        text = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
        r, s = decode_dss_signature(self._key.sign(text, ec.ECDSA(SHA256())))
        signature = base64.urlsafe_b64encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")).rstrip(b"=")
        return b".".join([text, signature]).decode()

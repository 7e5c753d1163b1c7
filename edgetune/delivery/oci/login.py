"""Logs in to a registry: credentials of Docker's settings or of the user, answers to challenges, tokens."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import UnreachableError, UsageError
from edgetune_runtime.update.fetch import limited
from edgetune_runtime.update.http_client import HttpClient

from edgetune.common.secret import secret_of_user

PASSWORD = "EDGETUNE_REGISTRY_PASSWORD"
_MOST_TOKEN_BYTES = 1 << 20
_HELPER_S = 30.0
# From the beginning of a word only: from each letter of a long one would take quadratic time.
_FIELD = re.compile(r'\b(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Credentials:
    """A user's name and password."""

    username: str
    password: str

    @property
    def basic(self) -> str:
        """The header of HTTP's basic authentication."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def credentials_for(host: str, username: str | None) -> Credentials | None:
    """The credentials for a registry: of `username`, whose password is in the environment or asked for, or Docker's.

    None without any. UsageError if there is no password, or Docker's settings are damaged.
    """
    if username is None:
        return _of_docker(host)
    need = f"--username {username} needs a password"
    return Credentials(username, secret_of_user(PASSWORD, f"Password of {username}: ", need))


def answer(challenge: str, credentials: Credentials | None, api: str, http: HttpClient) -> str:
    """The header `Authorization` for a registry's challenge: basic, or a token that its service gives.

    UsageError if the registry asks for credentials and there are none, UnreachableError if the service gives no token.
    """
    scheme, _, rest = challenge.partition(" ")
    fields = dict(_FIELD.findall(rest))
    if scheme.lower() == "bearer" and "realm" in fields:
        return "Bearer " + _token(fields, credentials, api, http)
    if credentials is None or scheme.lower() != "basic":
        host = urllib.parse.urlsplit(api).netloc
        raise UsageError(f"{host} asks for a login", f"run: docker login {host}; or give --username and {PASSWORD}")
    return credentials.basic


def _token(fields: dict[str, str], credentials: Credentials | None, api: str, http: HttpClient) -> str:
    realm = fields["realm"]
    # A registry must not make us send a password without encryption.
    if not realm.startswith(("https://", f"{urllib.parse.urlsplit(api).scheme}://")):
        raise UnreachableError(f"the registry's tokens are at {realm[:200]!r}, without encryption", "check the address")
    query = urllib.parse.urlencode([(key, fields[key]) for key in ("service", "scope") if key in fields])
    login = {} if credentials is None else {"Authorization": credentials.basic}
    with http.reply("GET", f"{realm}?{query}", login) as reply:
        data = b"".join(limited(reply, _MOST_TOKEN_BYTES))
    try:
        raw = json.loads(data)
        token = raw.get("token") or raw["access_token"]
        return re.fullmatch(r"[\x21-\x7e]+", token)[0]  # type: ignore[index]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnreachableError(f"{realm[:200]} gave no token", "check the registry's address") from error


def _of_docker(host: str) -> Credentials | None:
    """What `docker login` has stored, in its settings or with a program for credentials."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        raw = json.loads(path.read_bytes())
        helper = (raw.get("credHelpers") or {}).get(host) or raw.get("credsStore")
        if helper:
            return _of_helper(f"docker-credential-{helper}", host)
        stored = ((raw.get("auths") or {}).get(host) or {}).get("auth")
        if not stored:
            return None
        username, _, password = base64.b64decode(stored).decode().partition(":")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be used: {error}", f"run: docker login {host}; or give --username") from error
    return Credentials(username, password)


def _of_helper(program: str, host: str) -> Credentials | None:
    """What a program of Docker's has stored for a registry; None if it knows nothing of it."""
    try:
        process = subprocess.run(
            [program, "get"], input=host, capture_output=True, text=True, timeout=_HELPER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{program} of Docker's settings cannot be run: {error}", "give --username") from error
    if process.returncode != 0:
        return None
    stored = json.loads(process.stdout)
    return Credentials(stored["Username"], stored["Secret"])

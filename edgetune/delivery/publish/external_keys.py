"""Private keys that stay in a token or a service, which signs with them: a key folder has their URIs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.wording import shortened
from securesystemslib.signer import Key, Signer, SSlibKey

from edgetune.common.secret import secret_of_user

PIN = "EDGETUNE_KEYS_PIN"
_TRIAL = b"edgetune trial\n"


@dataclass(frozen=True)
class ExternalKey:
    """A private key by its URI, as securesystemslib names it (`hsm:…`, `awskms:…` …), and its public half.

    The URI is None where somebody else has the private key.
    """

    uri: str | None
    key: Key


def external_key(uri: str | None, public_key: Path) -> ExternalKey:
    """A key whose public half is in a PEM file; UsageError if that cannot be read, or does not fit what `uri` signs."""
    try:
        key = SSlibKey.from_crypto(load_pem_public_key(public_key.read_bytes()))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        message = f"{public_key} has no public key that can be used: {error}"
        raise UsageError(message, "give a PEM file with a key for ECDSA on P-256, RSA or Ed25519") from error
    if uri is None:
        return ExternalKey(uri, key)
    with signing(uri):
        key.verify_signature(open_external(uri, key).sign(_TRIAL), _TRIAL)
    return ExternalKey(uri, key)


def open_external(uri: str, key: Key) -> Signer:
    """What signs with the private key of a URI; UsageError if its library is missing."""
    with signing(uri):
        return Signer.from_priv_key_uri(uri, key, _pin_of_user)


@contextmanager
def signing(holder: str) -> Iterator[None]:
    """Turn the errors of signing in the block into a UsageError; `holder` is the role or the URI that has the key."""
    try:
        yield
    except EdgetuneError:
        raise
    except Exception as error:
        # Each library of tokens and services has errors of its own, some without a text; TUF wraps them.
        cause = error.__cause__ or error
        message = f"a key of {holder} cannot sign: {shortened(str(cause)) or type(cause).__name__}"
        raise UsageError(message, f"check the token or service, its settings and {PIN}") from error


@cache
def _pin_of_user(secret: str) -> str:
    """The PIN of a token: in the environment, or else asked for once."""
    return secret_of_user(PIN, f"The {secret} of the keys: ", f"the keys have a {secret}")

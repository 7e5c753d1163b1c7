"""Private keys in encrypted files, which only their owner may read, or files with the URIs of keys elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from getpass import getpass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from edgetune.common.files import write_file
from edgetune.common.secret import secret_of_user

from .external_keys import ExternalKey, open_external

PASSPHRASE = "EDGETUNE_KEYS_PASSPHRASE"
_MIN_CHARACTERS = 8
_EXTERNAL = ".uri"
_PRIVATE = re.compile(r".+-[0-9a-f]{8}\.pem")
_CANNOT_OPEN = (ValueError, TypeError, UnsupportedAlgorithm)
_OTHERS = 0o077
"""The rights that nobody but the owner may have."""

Passphrase = Callable[[], str]
"""Gives the passphrase of the key files when it is needed."""


def passphrase_of_user(folder: Path) -> Passphrase:
    """The passphrase in the environment, or else asked for once, and twice if it is new; UsageError without either.

    It is new where `folder` has no private key yet.
    """
    is_new = not _private_keys(folder)

    @cache
    def ask() -> str:
        passphrase = secret_of_user(PASSPHRASE, "Passphrase of the keys: ", "the keys have a passphrase")
        if is_new and len(passphrase) < _MIN_CHARACTERS:
            message = f"the passphrase has {len(passphrase)} characters"
            raise UsageError(message, f"use {_MIN_CHARACTERS} or more")
        if is_new and PASSPHRASE not in os.environ and getpass("Again: ") != passphrase:
            raise UsageError("the two passphrases differ", "run the command again")
        return passphrase

    return ask


def write_new_key(folder: Path, role: str, passphrase: Passphrase) -> Key:
    """Make an Ed25519 key and write its private half into `folder`; the public half.

    UsageError if the passphrase opens none of the private keys that are there: one opens all.
    """
    before = _private_keys(folder)
    if before and not any(_opens(path, passphrase()) for path in before):
        raise UsageError(f"the passphrase opens no private key in {folder}", f"correct {PASSPHRASE}, or type it again")
    signer = CryptoSigner.generate_ed25519()
    private = load_pem_private_key(signer.private_bytes, None)
    encryption = BestAvailableEncryption(passphrase().encode())
    data = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    write_file(path_of(folder, role, signer.public_key), data, is_private=True)
    return signer.public_key


def _private_keys(folder: Path) -> list[Path]:
    """The files of private keys, by their names: those of `path_of`."""
    return [path for path in folder.glob("*.pem") if _PRIVATE.fullmatch(path.name)]


def _opens(path: Path, passphrase: str) -> bool:
    try:
        load_pem_private_key(path.read_bytes(), passphrase.encode())
    except (*_CANNOT_OPEN, OSError):
        return False
    return True


def write_external_key(folder: Path, role: str, external: ExternalKey) -> Key:
    """Write the URI of a key into `folder`; the public half."""
    path = path_of(folder, role, external.key).with_suffix(_EXTERNAL)
    write_file(path, f"{external.uri}\n")
    return external.key


def path_of(folder: Path, role: str, key: Key) -> Path:
    """The file of a private key, or that of its URI if there is one."""
    path = folder / f"{role.replace('/', '-')}-{key.keyid[:8]}.pem"
    external = path.with_suffix(_EXTERNAL)
    return external if external.is_file() else path


def load_signer(folder: Path, role: str, key: Key, passphrase: Passphrase) -> Signer:
    """The private half of a key.

    NotFoundError if its file is not in the folder, UsageError if others may read it, the passphrase is wrong or what
    has the key cannot be used, VerificationError if it is damaged or of another key.
    """
    path = path_of(folder, role, key)
    if path.suffix == _EXTERNAL:
        return open_external(path.read_text(encoding="utf-8").strip(), key)
    try:
        mode, data = path.stat().st_mode & 0o777, path.read_bytes()
    except FileNotFoundError as error:
        message = f"the private key {path.name} is not in {folder}"
        raise NotFoundError(message, f"copy it there, or replace it: edgetune keys rotate {folder} {role}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check its owner and rights") from error
    if mode & _OTHERS:
        raise UsageError(f"others may read the private key {path} (mode {mode:04o})", f"run: chmod 600 {path}")
    try:
        private = load_pem_private_key(data, passphrase().encode())
    except _CANNOT_OPEN as error:
        message = f"the passphrase does not open {path}, or the file is damaged"
        raise UsageError(message, f"correct {PASSPHRASE}, or restore the file from a backup") from error
    assert isinstance(key, SSlibKey)
    try:
        return CryptoSigner(private, key)
    except (ValueError, SigningError) as error:
        raise VerificationError(f"{path} is not the private key {key.keyid[:8]}", "restore it from a backup") from error

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME, require_signed
from edgetune_runtime.errors import NotFoundError, UsageError
from kits import write_bundle
from repositories import PASSPHRASE, Publisher, publish, seen_by_device

from edgetune.cli.main import main
from edgetune.delivery.publish import external_keys
from edgetune.delivery.publish.external_keys import PIN, external_key
from edgetune.delivery.publish.key_files import PASSPHRASE as PASSPHRASE_VARIABLE
from edgetune.delivery.publish.key_folder import BUNDLES, ROOT_ROLES

SOFTHSM = shutil.which("softhsm2-util")
LIBRARY = next((path for path in map(Path, ("/usr/lib/softhsm/libsofthsm2.so",)) if path.is_file()), None)
needs_softhsm = pytest.mark.skipif(
    SOFTHSM is None or LIBRARY is None or importlib.util.find_spec("pkcs11") is None,
    reason="SoftHSM or python-pkcs11 is not installed; Debian: apt install softhsm2; pip install 'edgetune[hsm]'",
)


def write_pair(folder: Path) -> tuple[str, Path]:
    """The URI of a private key in a file, and the file of its public half."""
    private, public = folder / "private.pem", folder / "public.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return f"file2:{private}", public


@pytest.mark.parametrize("role", [*ROOT_ROLES, BUNDLES, "bundles/home"])
def test_a_key_elsewhere_signs_in_place_of_one_in_the_folder(role: str, publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    key = external_key(*write_pair(tmp_path))
    if role == "bundles/home":
        publisher.keys.add(role, key)
    else:
        publisher.keys.rotate(role, key)
        (old,) = publisher.keys.folder.glob(f"{role}-????????.pem")
        if role != "root":
            old.unlink()
    (row,) = [row for row in publisher.keys.listing() if row["key"] == key.key.keyid]
    assert (row["role"], row["is_here"], Path(row["file"]).suffix) == (role, True, ".uri")
    done = publisher("two")
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device") == done.release
    require_signed(publisher.bundle, publisher.keys.trusted_keys(publisher.keys.role_of("home")))


def test_a_key_with_random_signatures_makes_no_new_release_of_an_unchanged_bundle(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.keys.rotate(BUNDLES, external_key(*write_pair(tmp_path)))
    publisher("one")
    signature = publisher.bundle / SIGNATURE_NAME
    before = signature.read_bytes()
    assert not publish(publisher.bundle, publisher.repo, publisher.keys).changed
    assert signature.read_bytes() == before
    # It is of the keys that the role has now, and of no others.
    publisher.keys.rotate(BUNDLES)
    assert publish(publisher.bundle, publisher.repo, publisher.keys).changed
    signature.write_text("{")
    assert not publish(publisher.bundle, publisher.repo, publisher.keys).changed


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("nothing:1", r"a key of nothing:1 cannot sign: Unsupported private key scheme"),
        ("file2:/none", r"a key of file2:/none cannot sign: .*No such file"),
        ("hsm:2", r"a key of hsm:2 cannot sign: .*(PYKCS11LIB|python-pkcs11)"),
        ("", "cannot sign"),
    ],
)
def test_a_key_that_cannot_sign_is_not_added(
    uri: str, problem: str, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIN, "1234")
    monkeypatch.delenv("PYKCS11LIB", raising=False)
    _, public = write_pair(tmp_path)
    with pytest.raises(UsageError, match=problem) as caught:
        external_key(uri, public)
    assert "\n" not in str(caught.value)


def test_a_public_key_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    uri, public = write_pair(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = write_pair(tmp_path / "other")
    with pytest.raises(UsageError, match=r"a key of file2:.* cannot sign"):
        external_key(uri, other)
    public.write_text("nothing")
    with pytest.raises(UsageError, match="has no public key that can be used"):
        external_key(uri, public)


def test_a_key_that_is_gone_is_said_in_one_line_and_the_repository_stays(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    publisher.keys.rotate("timestamp", external_key(*write_pair(tmp_path)))
    next(publisher.keys.folder.glob("timestamp-*.pem")).unlink()
    (tmp_path / "private.pem").unlink()
    with pytest.raises(UsageError, match=r"a key of file2:.* cannot sign: .*No such file.*; check the token") as caught:
        publisher("two")
    assert "\n" not in str(caught.value)
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 1


def test_a_key_of_two_roles_is_revoked_in_one_and_is_in_a_role_once(publisher: Publisher, tmp_path: Path) -> None:
    key = external_key(*write_pair(tmp_path))
    publisher.keys.add("snapshot", key)
    publisher.keys.add("timestamp", key)
    with pytest.raises(UsageError, match=r"snapshot has the key [0-9a-f]{8} of file2:.* already"):
        publisher.keys.rotate("snapshot", key)
    publisher("one")
    with pytest.raises(NotFoundError, match=r"2 keys have an id .* or --role"):
        publisher.keys.revoke(key.key.keyid)
    assert publisher.keys.revoke(key.key.keyid, "snapshot") == "snapshot"
    assert key.key in publisher.keys.keys("timestamp") and key.key not in publisher.keys.keys("snapshot")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`token(id)`: makes a key on a token of SoftHSM; the file of its public half."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm.conf"))
    monkeypatch.setenv("PYKCS11LIB", str(LIBRARY))
    monkeypatch.setenv(PIN, "1234")
    external_keys._pin_of_user.cache_clear()
    assert SOFTHSM is not None
    words = [SOFTHSM, "--init-token", "--free", "--label", "edgetune", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run(words, check=True, capture_output=True)

    def make(number: str) -> Path:
        uri, public = write_pair(tmp_path)
        words = [SOFTHSM, "--import", uri.removeprefix("file2:"), "--token", "edgetune", "--label", f"key-{number}"]
        subprocess.run([*words, "--id", number, "--pin", "1234"], check=True, capture_output=True)
        Path(uri.removeprefix("file2:")).unlink()
        return public

    return make


@needs_softhsm
def test_a_token_signs_a_repository(
    token: Callable[[str], Path],
    publisher: Publisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    publisher("one")
    keys = str(publisher.keys.folder)
    for number, role in (("02", "targets"), ("03", "bundles")):
        words = ["keys", "rotate", keys, role, "--uri", f"hsm:{int(number)}?label=edgetune"]
        assert main([*words, "--public-key", str(token(number))]) == 0
        assert "devices need the package cryptography" in capsys.readouterr().err
        next(publisher.keys.folder.glob(f"{role}-*.pem")).unlink()
    words = ["publish", str(write_bundle(publisher.bundle, "two")), "--repo", str(publisher.repo), "--keys", keys]
    assert main([*words, "--json", "--quiet"]) == 0
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 2
    external_keys._pin_of_user.cache_clear()
    monkeypatch.setenv(PIN, "wrong")
    write_bundle(publisher.bundle, "three")
    capsys.readouterr()
    assert main([*words, "--quiet"]) == UsageError.exit_code
    assert "a key of bundles cannot sign: PinIncorrect; check the token" in capsys.readouterr().err
    assert seen_by_device(publisher.repo, publisher.root, tmp_path / "device").version == 2

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import MANIFEST_NAME
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME
from edgetune_runtime.cli import main
from edgetune_runtime.errors import UsageError, VerificationError
from repositories import make_keys

from edgetune.delivery.publish.key_folder import BUNDLES
from edgetune.delivery.publish.publish import sign


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "home"))


def test_only_a_signed_bundle_opens_where_keys_are_trusted(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(tmp_path / "keys")
    trusted = keys.trusted_keys(BUNDLES)
    words = ["generate", str(copy), "--prompt", "hello", "--max-tokens", "2", "--trusted-keys", str(trusted)]
    with pytest.raises(VerificationError, match="is not signed"):
        Runtime.open(copy, trusted_keys=trusted)
    assert main(words) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1
    sign(copy, keys)
    with Runtime.open(copy, trusted_keys=trusted) as runtime:
        assert runtime.generate("hello", max_tokens=2).text is not None
        (copy / SIGNATURE_NAME).unlink()
        with pytest.raises(VerificationError, match="is not signed"):
            runtime.reload()
        with pytest.raises(VerificationError, match="is not signed"):
            runtime.add_adapter(copy, "tone")
    sign(copy, keys)
    assert main(words) == 0
    with pytest.raises(UsageError, match="trusted_keys is given, and verify is False"):
        Runtime.open(copy, trusted_keys=trusted, verify=False)


@pytest.mark.parametrize("command", ["info", "check", "serve", "doctor"])
def test_commands_read_nothing_of_a_bundle_whose_signature_is_wrong(
    command: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(tmp_path / "keys")
    sign(copy, keys)
    # What no reader would get past.
    (copy / MANIFEST_NAME).write_text("{")
    assert main([command, str(copy), "--trusted-keys", str(keys.trusted_keys(BUNDLES))]) == 4
    assert "or its manifest was changed" in capsys.readouterr().err

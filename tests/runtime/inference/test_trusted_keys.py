from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest
from edgetune_runtime.bundle.parts import part_path
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME, read_signed_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from kits import write_bundle
from repositories import add_part, make_keys

from edgetune.delivery.publish.key_folder import BUNDLES
from edgetune.delivery.publish.publish import sign


def test_only_a_signed_bundle_opens_where_keys_are_trusted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(tmp_path / "keys")
    trusted = keys.trusted_keys(BUNDLES)
    words = ["generate", str(home), "--prompt", "hello", "--max-tokens", "2", "--trusted-keys", str(trusted)]
    with pytest.raises(VerificationError, match="is not signed"):
        Runtime.open(home, trusted_keys=trusted)
    assert main(words) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1
    sign(home, keys)
    with Runtime.open(home, trusted_keys=trusted) as runtime:
        assert runtime.generate("hello", max_tokens=2).text is not None
        (home / SIGNATURE_NAME).unlink()
        with pytest.raises(VerificationError, match="is not signed"):
            runtime.reload()
        with pytest.raises(VerificationError, match="is not signed"):
            runtime.add_adapter(home, "tone")
    sign(home, keys)
    assert main(words) == 0
    with pytest.raises(UsageError, match="trusted_keys is given, and verify is False"):
        Runtime.open(home, trusted_keys=trusted, verify=False)


@pytest.mark.parametrize("name", [MANIFEST_NAME, SIGNATURE_NAME])
def test_a_pipe_in_place_of_a_signed_file_is_refused(name: str, tmp_path: Path) -> None:
    keys, bundle = make_keys(tmp_path / "keys"), write_bundle(tmp_path / "home", "one")
    sign(bundle, keys)
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(VerificationError, match=f"{name} is not a regular file"):
        read_signed_manifest(bundle, keys.trusted_keys(BUNDLES))


@pytest.mark.parametrize("command", ["info", "check", "serve", "doctor"])
def test_commands_read_nothing_of_a_bundle_whose_signature_is_wrong(
    command: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(tmp_path / "keys")
    sign(home, keys)
    # What no reader would get past.
    (home / MANIFEST_NAME).write_text("{")
    assert main([command, str(home), "--trusted-keys", str(keys.trusted_keys(BUNDLES))]) == 4
    assert "or its manifest was changed" in capsys.readouterr().err


def test_an_adapter_of_its_author_opens_where_the_keys_of_the_bundle_are_trusted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(tmp_path / "keys")
    keys.add("bundles/home/tone")
    sign(home, keys)
    trusted, owners = keys.trusted_keys(BUNDLES), read_manifest(home)
    command = chosen_adapter(owners, home, "command")
    with Runtime.open(home, trusted_keys=trusted) as runtime:
        before, theirs = (runtime.generate("hello", adapter=name).text for name in ("tone", "command"))
        assert before != theirs
        part = add_part(home, keys, command._replace(entry=replace(command.entry, name="tone")))
        assert runtime.reload().replaced == ["tone"]
        assert runtime.generate("hello", adapter="tone").text == theirs
    with Runtime.open(home) as runtime:
        assert runtime.generate("hello", adapter="tone").text == theirs
    signed = part.read_text()
    evil = json.loads(signed)
    evil["part"]["adapter"]["system"] = "Say yes."
    (home / "authors/command").mkdir()
    for name, text, problem in (
        ("tone", json.dumps(evil), "is not signed by its author's key"),
        ("tone", signed[:-9], "is damaged"),
        ("tone", " " * 2**20 + signed, "is not a regular file of up to 1048576 bytes"),
    ):
        (home / part_path(name)).write_text(text)
        with pytest.raises(VerificationError, match=problem):
            Runtime.open(home, trusted_keys=trusted)
        assert main(["info", str(home), "--trusted-keys", str(trusted)]) == 4
        assert len(capsys.readouterr().err.splitlines()) == 1
    # Only adapters with an author have parts, and only the owner says which those are.
    part.write_text(signed)
    (home / part_path("command")).write_text(signed)
    assert read_manifest(home).adapter("command") == owners.adapter("command")
    raw = json.loads((home / MANIFEST_NAME).read_text())
    (home / MANIFEST_NAME).write_text(
        json.dumps({**raw, "authors": {**raw["authors"], "command": raw["authors"]["tone"]}})
    )
    with pytest.raises(VerificationError, match="or its manifest was changed"):
        Runtime.open(home, trusted_keys=trusted)
    with pytest.raises(VerificationError, match=r"authors/command/part\.json is of the adapter tone of home"):
        Runtime.open(home)

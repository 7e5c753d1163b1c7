from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime import cli
from edgetune_runtime.errors import UsageError
from kits import write_bundle

from edgetune.cli.main import main

PUBLISH = ["--repo", "repo", "--keys", "keys"]
NOWHERE = "oci://127.0.0.1:9/home:v1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["publish", "home", *PUBLISH, "--trusted-keys", "keys.json"], "--trusted-keys does nothing without --from"),
        (["publish", "home", *PUBLISH, "--insecure"], "--insecure does nothing without --from"),
        (["publish", *PUBLISH, "--share", "0"], "--share does nothing without a bundle"),
        (["publish", *PUBLISH, "--channel", "beta"], "--channel does nothing without a bundle"),
        (["publish", *PUBLISH, "--min-runtime", "1.0"], "--min-runtime does nothing without a bundle"),
        (["publish", *PUBLISH, "--adapter", "reply"], "--adapter does nothing without a bundle"),
        (["deploy", "home", "pi@host", "--rollback", "--service", "home"], "--service does nothing with --rollback"),
        (["deploy", "home", "pi@host", "--list", "--cache-mb", "8"], "--cache-mb does nothing with --list"),
        (["deploy", "home", "pi@host", "--prefix", "/opt/x\ny"], r"--prefix '/opt/x\ny' is not an absolute path"),
        (["push", "home", NOWHERE, "--channel", "beta"], "--channel does nothing without --repo"),
        (["pull", NOWHERE, "--out", "out", "--channel", "beta"], "--channel does nothing without --root"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(tmp_path / "home", "one")
    assert main(words) == UsageError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edgetune: {told}; ")


@pytest.mark.parametrize("option", [("--repo", "repo"), ("--report", "off"), ("--quota-mb", "0")])
def test_what_an_update_would_not_remember_is_refused(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["update", "--status", "--prefix", str(tmp_path), *option]
    assert cli.main(words) == UsageError.exit_code
    assert f"{option[0]} does nothing without --check or --apply; " in capsys.readouterr().err

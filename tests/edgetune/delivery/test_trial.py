"""The check of a version for golden answers, with stand-ins for the Python of its environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.processes import child_process
from edgetune_runtime.store import trial, versions
from edgetune_runtime.store.kit import read_kit
from kits import KitMaker


@pytest.mark.parametrize(("printed", "problem"), [("{", "Expecting property name"), ("5", "not iterable")])
def test_a_version_that_prints_no_answers_fails_its_check(
    printed: str, problem: str, make: KitMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = read_kit(make("one"))
    python = versions.path_of(tmp_path, kit.version) / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{printed}'\n")
    python.chmod(0o755)
    run, limits = child_process.run, []

    def recorded(command: Sequence[str], *, timeout_s: float) -> child_process.ProcessResult:
        limits.append(timeout_s)
        return run(command, timeout_s=timeout_s)

    monkeypatch.setattr(child_process, "run", recorded)
    with pytest.raises(VerificationError, match=rf"fails its check: it printed no answers: .*{problem}"):
        trial.golden_answers(tmp_path, kit)
    assert limits[0] > child_process.MAX_S

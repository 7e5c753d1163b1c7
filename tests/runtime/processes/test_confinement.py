"""What a confined process can no longer do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.bundle import BaseEntry, FileEntry, Manifest
from edgetune_runtime.processes import confinement
from edgetune_runtime.processes.confinement import ProcessLimits, limits_of

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limits")
CODE = """
import json, os, resource, socket, sys
from pathlib import Path
from edgetune_runtime.processes.confinement import ProcessLimits, confine

def rights():
    return int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)

def tried(action):
    try:
        action()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return ""

before = rights()
confine(ProcessLimits(200_000_000, 60.0))
print(json.dumps({
    "account": os.getuid(),
    "rights": [before, rights()],
    "memory": tried(lambda: bytearray(10**9)),
    "new file": tried(lambda: Path(sys.argv[1]).write_text("x")),
    "private": tried(lambda: Path(sys.argv[2]).read_text()),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "cpu_s": resource.getrlimit(resource.RLIMIT_CPU)[1],
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
}))
"""


def confined(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "private").write_text("x", encoding="utf-8")
    (tmp_path / "private").chmod(0o600)
    command = [sys.executable, "-c", CODE, str(tmp_path / "new"), str(tmp_path / "private")]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


@LINUX
def test_memory_files_and_time_are_limited(tmp_path: Path) -> None:
    found = confined(tmp_path)
    assert (found["memory"], found["new file"] != "", found["private"]) == ("MemoryError", True, "")
    assert (found["cpu_s"], found["core"]) == (60 * (os.cpu_count() or 1), 0)


@LINUX
def test_root_becomes_an_account_that_may_only_read(tmp_path: Path) -> None:
    found = confined(tmp_path)
    before, after = found["rights"]
    if os.geteuid() == 0 and before & 4:
        assert (found["account"], after) == (65534, 4)
        assert found["interfaces"] == ["lo"]
    elif os.geteuid() == 0:
        assert (found["account"], after) == (0, before)
    else:
        assert after == 0


def limits(file_bytes: int, context_length: int) -> ProcessLimits:
    base = BaseEntry("", "", "llama", None, 1, 100, 1, 250, "", "", {"gguf": "base"})
    return limits_of(Manifest("home", base, {}, {"base": FileEntry("", file_bytes)}, 100), context_length)


def test_limits_are_those_of_the_files_and_the_context_within_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "free_mb", lambda: None)
    assert limits(10**8, 10**4) == ProcessLimits(1_440_000_000, 160.0)
    monkeypatch.setattr(confinement, "free_mb", lambda: 500.0)
    assert limits(10**8, 10**4).memory_bytes == 1_440_000_000
    assert limits(10**400, 10**400) == ProcessLimits(1_500_000_000, 3600.0)

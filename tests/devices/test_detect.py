from __future__ import annotations

import platform
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_devices import boards, detect
from edgetune_runtime.errors import UsageError
from edgetune_runtime.threads.machine import free_mb, usable_cores
from runtime.bundles import write_bundle


@pytest.mark.skipif(free_mb() is None, reason="the system does not report its free memory")
def test_the_board_file_of_this_machine_is_a_board(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text(detect.board_file(), encoding="utf-8")
    board = boards.read(path)
    assert (board.name, board.cores) == ("here", usable_cores())
    assert board.instruction_sets[0] in ("x86-64", "armv8-a")
    assert board.sources["bandwidth_gb_per_s"].startswith("measured here on 20")
    assert "--bundle" in board.sources["layer_us"]


def test_a_32_bit_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "armv7l")
    with pytest.raises(UsageError, match="the processor is armv7l, which is not supported; use a 64-bit system"):
        detect.board_file()


def test_a_32_bit_system_on_a_64_bit_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(struct, "calcsize", lambda _form: 4)
    with pytest.raises(UsageError, match="this system has 32 bits on aarch64, which is not supported; use a 64-bit"):
        detect.board_file()


@pytest.mark.skipif(free_mb() is None, reason="the system does not report its free memory")
def test_with_a_bundle_the_speed_is_that_of_its_engine(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    bundle = write_bundle(tmp_path / "bundle", tiny_gguf("llama"), {})
    path = tmp_path / "here.toml"
    path.write_text(detect.board_file(bundle), encoding="utf-8")
    assert "with bundle bundle and engine gguf" in boards.read(path).sources["layer_us"]

"""A bundle is opened in a child process first: a crash there is an error here, and what passed is remembered."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import EdgetuneError, Runtime, VerificationError, engines
from edgetune_runtime.inference import preflight
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from edgetune_runtime.processes import child_process, confinement
from edgetune_runtime.states.store import default_folder
from runtime.bundles import change_manifest

ENGINES = """
from edgetune_runtime.bundle import GENERATION

ENGINES = {GENERATION: "engine"}
KV_TYPES = ("f16",)
"""
ENGINE = """
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.errors import UsageError


class ToyEngine(GgufEngine):
    def __init__(self, path, **options):
        super().__init__(path, **options)
        if os.getpid() != PARENT:
            INSTRUCTION


ENGINE = ToyEngine
"""
NOT_A_PYTHON = "/nowhere/python3"


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(preflight.VARIABLE)
    child_process.has_python.cache_clear()


@pytest.fixture
def toy(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`toy(instruction)`: a bundle for an engine that does so in other processes than this one."""

    def make(instruction: str) -> Path:
        folder = tmp_path / "engines/toy"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(ENGINES, encoding="utf-8")
        text = ENGINE.replace("PARENT", str(os.getpid())).replace("INSTRUCTION", instruction)
        (folder / "engine.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(folder.parent)])
        for name in [name for name in sys.modules if name.startswith("edgetune_runtime.engines.toy")]:
            monkeypatch.delitem(sys.modules, name)
        copy = Path(shutil.copytree(bundle, tmp_path / "home"))

        def rename(raw: dict[str, dict[str, object]]) -> None:
            for entry in (raw["base"], *raw["adapters"].values()):
                for values in entry.values():
                    if isinstance(values, dict) and "gguf" in values:
                        values["toy"] = values.pop("gguf")

        change_manifest(copy, rename)
        return copy

    return make


def open_and_close(path: Path, **options: object) -> None:
    with Runtime.open(path, contexts=1, **options) as runtime:  # type: ignore[arg-type]
        runtime.generate("turn on the light", max_tokens=1)


def error_of(path: Path, **options: object) -> EdgetuneError:
    with pytest.raises(EdgetuneError) as raised:
        open_and_close(path, **options)
    return raised.value


def remembered() -> list[Path]:
    return sorted((default_folder() / preflight.FOLDER).glob("*"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    names = (preflight.__name__, child_process.__name__)
    return [record.getMessage() for record in caplog.records if record.name in names]


def test_an_abort_of_native_code_is_one_line(toy: Callable[[str], Path]) -> None:
    home = toy(r"os.write(2, b'x.cpp:7: \x1b[2JGGML_ASSERT(n > 0) failed\n'); os.abort()")
    error = error_of(home)
    assert isinstance(error, VerificationError)
    assert str(error) == (
        f"bundle {home} cannot be opened safely: while opening it, a child process was ended by SIGABRT "
        "(x.cpp:7:  [2JGGML_ASSERT(n > 0) failed); free some memory if it is short, or do not use this bundle"
    )
    assert not remembered()


def test_a_file_that_may_not_be_read_does_not_make_the_bundle_unsafe(toy: Callable[[str], Path]) -> None:
    error = error_of(toy("raise PermissionError(13, 'Permission denied', str(path))"))
    assert str(error).endswith("/base/model.gguf: Permission denied; check the path and its permissions")


def test_an_abort_of_a_merged_model_is_found_before_its_first_use(toy: Callable[[str], Path]) -> None:
    home = toy("'whole' in str(path) and os.abort()")
    assert "while computing with adapter 'whole', a child process was ended by SIGABRT" in str(error_of(home))


def test_a_bundle_that_hangs_is_given_up(toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "_MIN_S", 3)
    assert "while opening it, a child process was killed after 3 s" in str(error_of(toy("time.sleep(60)")))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limits")
def test_the_child_has_a_limit_of_memory(toy: Callable[[str], Path]) -> None:
    assert "MemoryError" in str(error_of(toy("np.ones(10**10)")))


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_the_child_can_write_no_files_and_keeps_no_rights(toy: Callable[[str], Path], tmp_path: Path) -> None:
    writes = f"Path('{tmp_path}/new').write_text('x')"
    message = str(error_of(toy(writes)))
    assert "File too large" in message or "Permission denied" in message
    shutil.rmtree(tmp_path / "engines")
    shutil.rmtree(tmp_path / "home")
    rights = "raise UsageError(Path('/proc/self/status').read_text().split('CapEff:')[1].split()[0])"
    # The right to read, as root; a container may keep root as it is.
    assert int(error_of(toy(rights)).message, 16) in ({0x4, _own_rights()} if os.geteuid() == 0 else {0})


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_no_library_starts_threads_before_the_child_is_confined() -> None:
    libraries = {"numpy", "llama_cpp", "onnxruntime"}
    code = f"import sys, edgetune_runtime.inference.preflight_child; print(*{libraries} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def _own_rights() -> int:
    return int(Path("/proc/self/status").read_text(encoding="ascii").split("CapEff:")[1].split()[0], 16)


def test_errors_are_those_of_opening_it_here(bundle: Path, home: Path) -> None:
    (home / "base/model.gguf").write_bytes(b"GGUF" * 100)
    for path, options in (
        (home, {}),
        (home, {"verify": False}),
        (bundle, {"kv": "q3"}),
        (bundle, {"threads": 0}),
    ):
        error, same = error_of(path, **options), error_of(path, **options, preflight=False)
        assert (type(error), str(error)) == (type(same), str(same))
    assert not remembered()


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_bundle_that_passed_is_remembered(
    both_of: Callable[[str], Path], engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = both_of("llama")
    open_and_close(home, engine=engine)
    assert len(remembered()) == 1
    assert stat.S_IMODE(remembered()[0].parent.stat().st_mode) == 0o700
    # A child would be a warning now.
    monkeypatch.setattr(sys, "executable", NOT_A_PYTHON)
    open_and_close(home, engine=engine)
    assert not warnings(caplog)
    open_and_close(home, engine=engine, context_length=60)
    assert "cannot check" in caplog.text


def test_a_file_that_changed_is_checked_again_although_digests_are_not_compared(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_and_close(home, verify=False)
    monkeypatch.setattr(sys, "executable", NOT_A_PYTHON)
    open_and_close(home, verify=False)
    assert not warnings(caplog)
    model = home / "base/model.gguf"
    model.write_bytes(model.read_bytes())
    open_and_close(home, verify=False)
    assert "cannot check" in caplog.text


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_adapters_that_are_added_and_replaced_pass(both_of: Callable[[str], Path], engine: str, tmp_path: Path) -> None:
    home = Path(shutil.copytree(both_of("llama"), tmp_path / "home"))
    remove_from_bundle(home, "command")
    with Runtime.open(home, engine=engine, contexts=1) as runtime:
        assert runtime.add_adapter(both_of("llama"), "command") == "command"
        change_manifest(home, lambda raw: [raw["adapters"][name].update(system="play") for name in ("tone", "whole")])
        changes = runtime.reload()
        assert (sorted(changes.replaced), changes.refused) == (["tone", "whole"], {})
    assert len(remembered()) == 4


def test_an_encoder_passes(encoder_bundle: Path) -> None:
    with Runtime.open(encoder_bundle) as runtime:
        runtime.embed("turn on the light")
    assert len(remembered()) == 1


def test_a_prompt_that_does_not_fit_is_an_error_of_calls_only(home: Path) -> None:
    change_manifest(home, lambda raw: raw["adapters"]["command"].update(system="light " * 9999))
    open_and_close(home)
    assert len(remembered()) == 1


@pytest.mark.usefixtures("no_home")
def test_an_account_without_a_home_opens_bundles_and_keeps_nothing(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_and_close(bundle)
    (warning,) = warnings(caplog)
    assert "so it is checked at each start: this account has no home folder" in warning
    assert "states of prompts are not saved on disk: this account has no home folder" in caplog.text


def test_a_few_bundles_are_remembered(bundle: Path) -> None:
    folder = default_folder() / preflight.FOLDER
    folder.mkdir(parents=True)
    for number in range(1030):
        (folder / f"{number:04}").touch()
        os.utime(folder / f"{number:04}", (number, number))
    open_and_close(bundle)
    assert len(remembered()) == 1024
    assert not (folder / "0006").exists()
    assert (folder / "0007").exists()


def test_a_cache_folder_that_cannot_be_written_is_a_warning(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    open_and_close(bundle, cache_folder=tmp_path / "file/states", disk_mb=0)
    assert "it is checked at each start" in caplog.text


def test_without_a_python_to_start_the_preflight_is_skipped_with_one_warning(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    open_and_close(bundle)
    open_and_close(bundle)
    assert len(warnings(caplog)) == 1
    assert not remembered()


@pytest.mark.parametrize("switch", ["variable", "option"])
def test_the_check_can_be_turned_off(
    bundle: Path, switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", NOT_A_PYTHON)
    if switch == "variable":
        monkeypatch.setenv(preflight.VARIABLE, "0")
    open_and_close(bundle, preflight=switch == "variable")
    assert not warnings(caplog)
    assert not remembered()

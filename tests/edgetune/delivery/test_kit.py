"""Kits of tiny bundles for this machine, with wheels of what is installed here."""

from __future__ import annotations

import json
import os
import platform as this_machine
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import GoldenAnswer
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.golden import ask
from kits import PYTHON, install_sh
from packaging.requirements import Requirement
from runtime.bundles import Adapter, add_onnx, change_manifest, low_rank, write_bundle
from wheels import repack

from edgetune.cli.main import main
from edgetune.delivery.kit.make import make_kit
from edgetune.delivery.kit.platforms import Platform, platform_of
from edgetune.delivery.kit.program import RUNTIME_MODULES, board_program
from edgetune.delivery.kit.runtime_wheel import runtime_wheel
from edgetune.delivery.kit.sbom import license_of
from edgetune.delivery.kit.wheels import Wheel, dependencies, read_wheel
from edgetune.progress import Progress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")
BOARD = "laptop" if this_machine.machine() == "x86_64" else "pi-5"
QUIET = Progress(quiet=True)
LLAMA = "llama-cpp-python"
NEEDED = (
    *("anyio", "click", "diskcache", "h11", "idna", "jinja2", "llguidance", "markupsafe", "numpy", "onnxruntime"),
    *("pip", "prometheus-client", "starlette", "tokenizers", "typing-extensions", "uvicorn", LLAMA),
)


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels of all that a kit needs."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    for name in NEEDED:
        repack(name, folder)
    return folder


@pytest.fixture
def _offline(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find wheels in the folder only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))


@pytest.fixture(scope="module")
def home(tiny_source: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both formats with the golden answers of this machine."""
    source = tiny_source("llama")
    adapters = {"command": Adapter(low_rank(source.path, seed=1))}
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "home", source.path, adapters)
    add_onnx(bundle, source, adapters)
    question = GoldenAnswer(({"role": "user", "content": "turn on the light"},), "", 8)
    golden = {}
    for engine in ("gguf", "onnx"):
        with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
            golden[engine] = {"prompt": question.prompt, "answer": ask(runtime, "command", question), "max_tokens": 8}
    change_manifest(bundle, lambda raw: raw["adapters"]["command"].update(golden=golden))
    return bundle


def make(bundle: Path, out: Path, wheelhouse: Path, *options: str) -> int:
    """Run `edgetune kit` for this machine."""
    (llama,) = wheelhouse.glob("llama_cpp_python-*")
    words = ["kit", str(bundle), "--board", BOARD, "--python", PYTHON, "--wheel", str(llama), "--out", str(out)]
    return main([*words, "--quiet", *options])


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_kit_installs_offline_and_answers_as_built(
    engine: str, home: Path, wheelhouse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert make(home, tmp_path / "kit.tar", wheelhouse, "--engine", engine, "--json") == 0
    made = json.loads(capfd.readouterr().out)
    with tarfile.open(tmp_path / "kit.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    kit, prefix = tmp_path / f"home-{BOARD}", tmp_path / "board"
    assert sum(path.stat().st_size for path in kit.rglob("*") if path.is_file()) == made["bytes"]
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nowhere", "PYTHONPATH": "/nowhere"}
    done = install_sh(kit, "--prefix", str(prefix), variables=variables)
    assert done.returncode == 0, done.stderr
    assert "1 adapters answer as built" in done.stderr
    command = [str(prefix / "bin/edgetune-run"), "serve", "--help"]
    assert "--port" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    checked = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=kit, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, b"")


@pytest.mark.usefixtures("_offline")
def test_the_same_bundle_gives_the_same_bytes(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "copied-later"))
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    for out, bundle in (("a.tar", home), ("b.tar", copy), ("folder", home)):
        assert make(bundle, tmp_path / out, wheelhouse, "--engine", "gguf") == 0
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "from-tar", filter="data")
    compared = ["diff", "-r", str(tmp_path / "folder"), str(tmp_path / f"from-tar/home-{BOARD}")]
    assert subprocess.run(compared, check=False).returncode == 0
    # A kit may be replaced, other folders not.
    assert make(home, tmp_path / "folder", wheelhouse, "--no-bundle") == 0
    assert not (tmp_path / "folder/bundle").exists()
    assert make(home, tmp_path / "from-tar", wheelhouse) == UsageError.exit_code


@pytest.mark.usefixtures("_offline")
def test_the_list_of_parts_has_each_wheel_with_its_licence(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    assert make(home, tmp_path / "kit", wheelhouse, "--engine", "onnx", "--no-bundle") == 0
    raw = json.loads((tmp_path / "kit/sbom.cdx.json").read_text())
    found = {part["name"]: part for part in raw["components"]}
    assert len(found) == len(list((tmp_path / "kit/wheels").iterdir()))
    assert found["edgetune-runtime"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert found["jinja2"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert found["tokenizers"]["purl"].startswith("pkg:pypi/tokenizers@")
    assert {part["name"] for part in raw["components"] if "expression" not in part["licenses"][0]} == set()
    assert "huggingface-hub" not in found and "protobuf" not in found


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"board": "pi4"}, NotFoundError, "did you mean 'pi-4'"),
        ({"python": "3.10"}, UsageError, "needs Python 3.11 or newer"),
        ({"python": "3"}, UsageError, "'3' is no version"),
        ({"python": "3.99"}, IncompatibleError, "for Python 3.99 on "),
        ({"engine": "torch"}, IncompatibleError, "no files for --engine torch"),
        ({"wheel": Path(__file__)}, VerificationError, "is not a wheel"),
    ],
)
def test_a_wrong_request_is_one_line(
    changes: dict[str, Any], error: type[EdgetuneError], told: str, home: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    (llama,) = wheelhouse.glob("llama_cpp_python-*")
    options = {"board": BOARD, "python": PYTHON, "wheel": llama, **changes}
    with pytest.raises(error, match=told):
        make_kit(home, options.pop("board"), tmp_path / "kit", progress=QUIET, **options)
    assert not (tmp_path / "kit").exists()


def test_a_damaged_bundle_is_refused(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    with (copy / "base/model.gguf").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert make(copy, tmp_path / "kit", wheelhouse) == VerificationError.exit_code


def test_markers_are_those_of_the_board_and_not_of_this_machine(tmp_path: Path) -> None:
    wheel = read_wheel(repack("starlette", tmp_path))
    required = {python: names(wheel, Platform("aarch64", python)) for python in ("3.11", "3.13")}
    assert required["3.11"] - required["3.13"] == {"typing-extensions"}


def names(wheel: Wheel, platform: Platform) -> set[str]:
    found: list[Requirement] = list(dependencies(wheel, set(), platform))
    return {requirement.name for requirement in found}


def test_pip_is_told_all_older_glibcs() -> None:
    options = list(Platform("aarch64", "3.13").pip_options())
    assert {"manylinux_2_36_aarch64", "manylinux_2_31_aarch64", "manylinux2014_aarch64"} <= set(options)
    assert "manylinux_2_37_aarch64" not in options


def test_boards_have_their_machine_and_the_python_of_their_system() -> None:
    from edgetune_devices import boards  # noqa: PLC0415

    machines = {name: platform_of(boards.load(name), "system").machine for name in ("pi-4", "laptop")}
    assert machines == {"pi-4": "aarch64", "laptop": "x86_64"}
    assert platform_of(boards.load("pi-4"), "system") == Platform("aarch64", "3.13", system_python=True)


def test_the_runtime_wheel_is_that_of_the_imported_package(tmp_path: Path) -> None:
    name, data = runtime_wheel()
    assert (name, data) == runtime_wheel()
    (tmp_path / name).write_bytes(data)
    wheel = read_wheel(tmp_path / name)
    assert license_of(wheel) == "Apache-2.0"
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(tmp_path / name)], check=True)
    assert (target / "edgetune_runtime/cli.py").is_file()


def test_the_program_needs_the_standard_library_only(tmp_path: Path) -> None:
    (tmp_path / "board.pyz").write_bytes(board_program())
    command = [sys.executable, "-I", "-S", str(tmp_path / "board.pyz"), "check", "--json", "--prefix", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits"] == 64
    assert "errors" in RUNTIME_MODULES

"""Kits of tiny bundles for this machine, with wheels of what is installed here."""

from __future__ import annotations

import filecmp
import json
import math
import os
import platform as this_machine
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from damage import flip
from edgetune_devices import boards, fit
from edgetune_export.backends.base import EncoderSource
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from edgetune_runtime.sizing.needs import needs_of_bundle
from edgetune_runtime.sizing.options import with_options
from edgetune_runtime.store.kit import read_kit
from edgetune_runtime.store.opening import Opening
from kits import PYTHON, KitMaker, install_sh, with_fields
from packaging.requirements import Requirement
from packaging.tags import parse_tag
from repositories import add_part, make_keys
from runtime.bundles import LIGHT_ON, Adapter, add_golden, change_manifest, low_rank, write_both, write_bundle
from runtime.encoders import write_encoder_bundle
from wheels import repack

from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.delivery.kit import output, rehearsal, sbom, wheels
from edgetune.delivery.kit.make import KitOptions, make_kit
from edgetune.delivery.kit.program import board_program
from edgetune.delivery.kit.runtime_wheel import runtime_wheel
from edgetune.delivery.kit.sbom import license_of
from edgetune.delivery.kit.target_python import TargetPython, target_python
from edgetune.delivery.kit.wheels import Wheel, collect, dependencies, read_wheel
from edgetune.delivery.publish.publish import sign

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")]
BOARD = "laptop" if this_machine.machine() == "x86_64" else "pi-5"
QUIET = Progress(quiet=True)
LLAMA = "llama-cpp-python"
NEEDED = (
    *(
        "anyio",
        "click",
        "diskcache",
        "flatbuffers",
        "h11",
        "idna",
        "jinja2",
        "llguidance",
        "markupsafe",
        "numpy",
        "onnxruntime",
    ),
    *("pip", "prometheus-client", "securesystemslib", "starlette", "tokenizers", "tuf", "typing-extensions", "urllib3"),
    *("uvicorn", LLAMA),
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
    set_offline(monkeypatch, wheelhouse)


def set_offline(patch: pytest.MonkeyPatch, wheelhouse: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(wheelhouse / "cache"))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheelhouse))


@pytest.fixture(scope="module")
def home(tiny_source: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both formats with the golden answers of this machine, whose adapter its author has signed."""
    source = tiny_source("llama")
    adapters = {"command": Adapter(low_rank(source.path, seed=1))}
    bundle = write_both(tmp_path_factory.mktemp("bundle") / "home", source, adapters)
    add_golden(bundle, ("gguf", "onnx"), {"command": LIGHT_ON})
    keys = make_keys(bundle.parent / "keys")
    keys.add("bundles/home/command")
    sign(bundle, keys)
    add_part(bundle, keys, chosen_adapter(read_manifest(bundle), bundle, "command"))
    return bundle


@pytest.fixture(scope="module")
def wide(wide_gguf: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose keys and values can be in q8_0."""
    base = wide_gguf(128)
    adapters = {"command": Adapter(low_rank(base, seed=1))}
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "wide", base, adapters)
    return add_golden(bundle, ("gguf",), {"command": LIGHT_ON})


def make(bundle: Path, out: Path, wheelhouse: Path, *options: str) -> int:
    """Run `edgetune kit` for this machine."""
    (llama,) = wheelhouse.glob("llama_cpp_python-*")
    words = ["kit", str(bundle), "--python", PYTHON, "--wheel", str(llama), "--out", str(out), "--quiet"]
    return main([*words, *(() if "--board" in options else ("--board", BOARD)), *options])


@pytest.fixture(scope="module")
def kit_of(home: Path, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`kit_of(engine)`: the tar file of the bundle's kit, made once."""
    folder = tmp_path_factory.mktemp("kits")

    @cache
    def kit(engine: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            set_offline(patch, wheelhouse)
            assert make(home, folder / f"{engine}.tar", wheelhouse, "--engine", engine) == 0
        return folder / f"{engine}.tar"

    return kit


def unpacked(kit: Path, folder: Path) -> Path:
    """The folder that was packed into a tar file."""
    with tarfile.open(kit) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"home-{BOARD}"


def assert_installs_offline_and_answers_as_built(kit: Path, prefix: Path) -> None:
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nowhere", "PYTHONPATH": "/nowhere"}
    done = install_sh(kit, "--prefix", str(prefix), variables=variables)
    assert done.returncode == 0, done.stderr
    assert "1 adapters answer as built" in done.stderr
    # The server's parts are there too.
    command = "import edgetune_runtime.server.listening, llguidance"
    subprocess.run([str(prefix / "current/venv/bin/python"), "-I", "-c", command], check=True)
    checked = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=kit, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, b"")


def test_a_kit_of_onnx_files_installs_offline_and_answers_as_built(
    kit_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert_installs_offline_and_answers_as_built(unpacked(kit_of("onnx"), tmp_path), tmp_path / "board")


@pytest.mark.usefixtures("_offline")
def test_the_same_bundle_gives_the_same_bytes(
    home: Path, wheelhouse: Path, kit_of: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "copied-later"))
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    kit_of("onnx")
    capfd.readouterr()
    assert make(copy, tmp_path / "other.tar", wheelhouse, "--engine", "onnx", "--json") == 0
    assert filecmp.cmp(kit_of("onnx"), tmp_path / "other.tar", shallow=False)
    made = json.loads(capfd.readouterr().out)
    folder = unpacked(tmp_path / "other.tar", tmp_path)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) == made["bytes"]
    assert made["bundle_bytes"] == sum(path.stat().st_size for path in (folder / "bundle").rglob("*") if path.is_file())
    # The bundle's files for the other engine stay here.
    assert list(read_manifest(home).base.files) == ["gguf", "onnx"]
    assert list(read_manifest(folder / "bundle").base.files) == ["onnx"]
    signed = read_signed_manifest(folder / "bundle", home.parent / "keys/trusted-keys.json")
    assert signed.adapter("command").files["onnx"].startswith("authors/command/")


def test_a_folder_has_the_files_of_the_tar_file(tmp_path: Path) -> None:
    contents: dict[str, Path | bytes] = {"kit.json": b"{}", "install.sh": b"exit", "wheels/a.whl": b"a"}
    for out in ("kit", "kit.tar", "kit"):
        output.write(contents, tmp_path / out, f"home-{BOARD}")
    folder = unpacked(tmp_path / "kit.tar", tmp_path)
    for name, data in contents.items():
        for path in (tmp_path / "kit" / name, folder / name):
            assert path.read_bytes() == data
            assert path.stat().st_mode & 0o777 == (0o755 if name == "install.sh" else 0o644)
    assert {path.name for path in tmp_path.iterdir()} == {"kit", "kit.tar", folder.name}


def test_nothing_but_a_kit_without_other_files_is_replaced(tmp_path: Path) -> None:
    kit = KitMaker(tmp_path)("one")
    output.check_destination(kit)
    (kit / "1.root.json").touch()
    with pytest.raises(UsageError, match=r"not part of the kit, such as 1\.root\.json; move them away"):
        output.check_destination(kit)
    (kit / "1.root.json").unlink()
    (tmp_path / "link").symlink_to(kit)
    with pytest.raises(UsageError, match="link is a link; give the folder itself"):
        output.check_destination(tmp_path / "link")
    (kit / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match="is not a kit of this version; choose another folder"):
        output.check_destination(kit)


def test_what_a_killed_process_has_left_of_a_kit_is_deleted(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f".kit.tmp-{ended.pid}"
    (left / "wheels").mkdir(parents=True)
    output.write({"kit.json": b"{}"}, tmp_path / "kit", f"home-{BOARD}")
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


def test_the_list_of_parts_has_each_wheel_with_its_licence(kit_of: Callable[[str], Path], tmp_path: Path) -> None:
    kit = unpacked(kit_of("onnx"), tmp_path)
    raw = json.loads((kit / "sbom.cdx.json").read_text())
    found = {part["name"]: part for part in raw["components"]}
    base = found.pop(json.loads((kit / "bundle/manifest.json").read_text())["base"]["name"])
    assert (base["type"], len(base["components"])) == ("machine-learning-model", 1)
    assert len(found) == len(list((kit / "wheels").iterdir()))
    assert found["edgetune-runtime"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert found["jinja2"]["licenses"] == [{"license": {"name": "BSD License"}}]
    assert found["tokenizers"]["purl"].startswith("pkg:pypi/tokenizers@")
    unknown = [{"license": {"name": "see the wheel"}}]
    assert [part["name"] for part in found.values() if part["licenses"] == unknown] == []
    assert "huggingface-hub" not in found and "protobuf" not in found


@pytest.mark.parametrize(
    ("stated", "listed"),
    [
        ("apache-2.0", {"expression": "Apache-2.0"}),
        ("gemma", {"license": {"name": "gemma"}}),
        (None, {"license": {"name": "see the base's source"}}),
    ],
)
def test_the_base_has_the_licence_that_its_file_states(
    stated: str | None, listed: dict[str, Any], tiny_source: Callable[[str], Any], tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "home", tiny_source("llama").path, {})
    writer = gguf.GGUFWriter(bundle / "base/model.gguf", "llama")
    if stated is not None:
        writer.add_license(stated)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = json.loads(sbom.bill_of_materials(bundle, read_manifest(bundle), "gguf", "1", []))
    assert [part["licenses"] for part in raw["components"]] == [[listed]]


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"board": "pi4"}, NotFoundError, "did you mean 'pi-4'"),
        ({"python": "3.10"}, UsageError, "needs Python 3.11 or newer"),
        ({"python": "3"}, UsageError, "'3' is not a version"),
        ({"python": "3.99"}, IncompatibleError, "for Python 3.99 on "),
        ({"engine": "torch"}, IncompatibleError, "no files for --engine torch"),
        ({"wheel": Path(__file__)}, VerificationError, "is not a wheel"),
        ({"wheel": Path("nowhere.whl")}, NotFoundError, "no wheel nowhere.whl; check the path"),
        ({"board": "apple-m1"}, IncompatibleError, "apple-m1 runs macos, and kits are for Linux"),
        ({"board": "nowhere.toml"}, NotFoundError, "no board file nowhere.toml"),
    ],
)
def test_a_wrong_request_is_one_line(
    changes: dict[str, Any], error: type[EdgetuneError], told: str, home: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    (llama,) = wheelhouse.glob("llama_cpp_python-*")
    options = {"board": BOARD, "python": PYTHON, "wheel": llama, **changes}
    with pytest.raises(error, match=told):
        make_kit(home, options.pop("board"), tmp_path / "kit", KitOptions(**options), QUIET)
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("name", "tag", "told"),
    [
        (LLAMA, "py3-none-win_amd64", "win_amd64.whl does not run with Python .* on linux-"),
        (LLAMA, "cp310-cp310-linux_x86_64", "cp310-cp310-linux_x86_64.whl does not run with Python"),
        ("h11", None, "h11-.* is a wheel of h11; give one of llama-cpp-python"),
    ],
)
def test_a_wheel_that_the_board_cannot_use_is_one_line(
    name: str, tag: str | None, told: str, home: Path, tmp_path: Path
) -> None:
    wheel = repack(name, tmp_path, tag)
    with pytest.raises(IncompatibleError, match=told) as error:
        make_kit(home, BOARD, tmp_path / "kit", KitOptions(PYTHON, wheel=wheel), QUIET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tag", "runs"),
    [
        ("py3-none-any", True),
        ("py3-none-manylinux_2_36_aarch64", True),
        ("cp313-cp313-manylinux2014_aarch64", True),
        ("cp39-abi3-linux_aarch64", True),
        ("cp312-cp312-linux_aarch64", False),
        ("cp314-abi3-linux_aarch64", False),
        ("py3-none-manylinux_2_36_x86_64", False),
        ("py3-none-musllinux_1_2_aarch64", False),
        ("py3-none-macosx_11_0_arm64", False),
    ],
)
def test_a_wheel_runs_on_its_machine_and_python(tag: str, runs: bool) -> None:
    (parsed,) = parse_tag(tag)
    assert TargetPython("aarch64", "3.13").runs(parsed) == runs


def board_file(folder: Path, free_mb: float) -> Path:
    """A board like this machine that leaves `free_mb`."""
    text = (boards.FOLDER / f"{BOARD}.toml").read_text(encoding="utf-8")
    path = folder / "small.toml"
    free = f"ram_free_mib = {math.ceil(free_mb * 1e6 / 2**20)}"
    path.write_text(re.sub(r"^ram_free_mib = \d+", free, text, flags=re.MULTILINE), encoding="utf-8")
    return path


def served(bundle: Path) -> Needs:
    return with_options(needs_of_bundle(bundle, engine="gguf"), serves=True)


@pytest.mark.usefixtures("_offline")
def test_a_board_file_is_a_board_and_the_unit_gets_what_it_leaves(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    found = fit.fit(served(home), boards.load(BOARD))
    path = board_file(tmp_path, found.kept_mb)
    free_mb = boards.read(path).free_mb
    assert found.kept_mb <= free_mb < found.needed_mb
    assert make(home, tmp_path / "kit", wheelhouse, "--board", str(path)) == 0
    kit = read_kit(tmp_path / "kit")
    assert (kit.board, kit.needs["ram_mb"]) == ("small", math.ceil(found.kept_mb))
    assert kit.service["memory_max_mb"] == int(free_mb)


@pytest.mark.usefixtures("_offline")
def test_a_bundle_that_devices_fit_refuses_gets_no_kit(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    found = fit.fit(served(home), boards.load(BOARD))
    path = board_file(tmp_path, found.kept_mb - 2)
    assert not fit.fit(served(home), boards.read(path)).fits
    assert make(home, tmp_path / "kit", wheelhouse, "--board", str(path)) == IncompatibleError.exit_code


@pytest.mark.usefixtures("_offline")
def test_a_bundle_that_fits_with_other_options_is_opened_with_them(
    wide: Path, wheelhouse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board = boards.load(BOARD)
    needs = needs_of_bundle(wide, context_length=64, engine="gguf")
    kept_mb = fit.fit(with_options(needs, kv="q8_0", cache_mb=0.5, serves=True), board).kept_mb
    path = board_file(tmp_path, kept_mb)
    assert fit.fit(served(wide), board).kept_mb > boards.read(path).free_mb
    assert make(wide, tmp_path / "kit", wheelhouse, "--board", str(path)) == IncompatibleError.exit_code
    assert f"edgetune devices fit {wide} --device {path}" in capfd.readouterr().err
    assert make(wide, tmp_path / "kit", wheelhouse, "--kv", "q3") == UsageError.exit_code
    assert "no data type 'q3' for keys and values; choose one of: f16, q8_0" in capfd.readouterr().err
    options = ("--context-length", "64", "--kv", "q8_0", "--cache-mb", "0.5")
    assert make(wide, tmp_path / "kit", wheelhouse, "--board", str(path), *options) == 0
    kit = read_kit(tmp_path / "kit")
    assert (kit.opening, kit.needs["ram_mb"]) == (Opening(64, "q8_0", 0.5), math.ceil(kept_mb))
    assert tuple(kit.opening.words()) == options


@pytest.mark.usefixtures("_offline")
def test_golden_answers_of_a_kit_of_gguf_files_are_asked_with_its_options(
    home: Path, wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "require_golden", lambda *_: None)
    kit, prefix, engine = tmp_path / "kit", tmp_path / "board", ("--engine", "gguf")
    assert make(home, kit, wheelhouse, *engine, "--context-length", "4") == 0
    done = install_sh(kit, "--prefix", str(prefix), variables={"PIP_NO_INDEX": "1"})
    assert done.returncode != 0 and "fails its check" in done.stderr
    assert make(home, kit, wheelhouse, *engine, "--context-length", "64") == 0
    assert_installs_offline_and_answers_as_built(kit, prefix)


@pytest.mark.usefixtures("_offline")
def test_options_with_which_an_adapter_answers_differently_are_refused_before_there_is_a_kit(
    wide: Path, wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(wide, tmp_path / "wide"))
    change_manifest(copy, lambda raw: raw["adapters"]["command"]["golden"]["gguf"].update(answer="on"))
    for options, told in (
        (("--context-length", "4"), "with --context-length 4: the golden prompt of adapter "),
        (("--kv", "q8_0"), "with --kv q8_0 1 adapters answer differently than built: command: expected 'on', got "),
    ):
        assert make(copy, tmp_path / "kit", wheelhouse, *options) == VerificationError.exit_code
        assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "kit").exists()


def test_an_encoder_has_no_keys_and_values(
    encoder_source: Callable[[str], EncoderSource], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = write_encoder_bundle(encoder_source("bert"), tmp_path / "encoder")
    words = ("--board", BOARD, "--out", str(tmp_path / "kit"), "--kv", "f32")
    assert main(["kit", str(bundle), *words]) == UsageError.exit_code
    assert "is for text-classification and has no keys and values; leave --kv out" in capfd.readouterr().err


@pytest.mark.parametrize(
    "opening",
    [
        {"kv": "f16 --host ::"},
        {"cache_mb": "1"},
        {"cache_mb": -1},
        {"context_length": 0},
        {"host": "0.0.0.0"},
        [],
    ],
)
def test_a_kit_with_other_options_is_damaged(opening: object, tmp_path: Path) -> None:
    kit = KitMaker(tmp_path)("one", change=with_fields(opening=opening))
    with pytest.raises(VerificationError, match=r"kit\.json is damaged"):
        read_kit(kit)


def test_a_damaged_bundle_is_refused(home: Path, wheelhouse: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    with (copy / "base/model.gguf").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert make(copy, tmp_path / "kit", wheelhouse) == VerificationError.exit_code


@pytest.mark.usefixtures("_offline")
def test_downloaded_wheels_are_kept_and_damaged_ones_are_downloaded_again(
    wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = repack("edgetune-runtime", tmp_path, "py3-none-any")

    def collected() -> dict[str, bytes]:
        found = collect([], TargetPython(this_machine.machine(), PYTHON), [own], tmp_path / "cache", QUIET)
        return {wheel.name: wheel.path.read_bytes() for wheel in found}

    first = collected()
    (tmp_path / "cache/numpy (1).whl").touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert collected() == first
    (numpy,) = (tmp_path / "cache").glob("numpy-*")
    flip(numpy, 0.5)
    with pytest.raises(IncompatibleError, match="there is no wheel of numpy"):
        collected()
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    assert collected() == first


def test_a_wheel_with_a_flipped_bit_anywhere_is_taken_for_none(tmp_path: Path) -> None:
    own, cache = repack("edgetune-runtime", tmp_path, "py3-none-any"), tmp_path / "cache"
    cache.mkdir()
    requirement = Requirement("edgetune-runtime")
    for part in range(100):
        damaged = Path(shutil.copy(own, cache))
        flip(damaged, part / 100)
        found = wheels._cached(requirement, cache)
        assert found is None or found.path == damaged


def test_a_bundle_whose_name_no_kit_can_have_is_refused_before_any_work(
    home: Path, wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    shutil.rmtree(copy / "authors")
    change_manifest(copy, lambda manifest: manifest.update(name="my house"))
    assert make(copy, tmp_path / "kit", wheelhouse) == UsageError.exit_code
    assert "the bundle's name is 'my house'; use up to 200 letters" in capsys.readouterr().err


@pytest.mark.usefixtures("_offline")
def test_kits_that_are_made_at_once_share_downloads_and_delete_no_wheels_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cache, asked = repack("edgetune-runtime", tmp_path, "py3-none-any"), tmp_path / "cache", list[str]()
    cache.mkdir()
    recent, old = (cache / f"tuf-0.{number}-py3-none-any.whl" for number in (1, 2))
    for path, days in ((recent, 0.5), (old, 2)):
        path.touch()
        os.utime(path, (time.time() - days * 86_400,) * 2)
    download = wheels._pip_download

    def slowly(requirements: Sequence[Requirement], target: TargetPython, folder: str) -> None:
        asked.extend(item.name for item in requirements)
        time.sleep(0.1)
        download(requirements, target, folder)

    monkeypatch.setattr(wheels, "_pip_download", slowly)
    arguments = (["update"], TargetPython(this_machine.machine(), PYTHON), [own], cache, QUIET)
    with ThreadPoolExecutor() as pool:
        first, second = (running.result() for running in [pool.submit(collect, *arguments) for _ in range(2)])
    assert [wheel.path for wheel in first] == [wheel.path for wheel in second]
    assert len(asked) == len({*asked}) > 3
    assert (recent.exists(), old.exists()) == (True, False)


def test_markers_are_those_of_the_board_and_not_of_this_machine(tmp_path: Path) -> None:
    wheel = read_wheel(repack("starlette", tmp_path))
    required = {python: names(wheel, TargetPython("aarch64", python)) for python in ("3.11", "3.13")}
    assert required["3.11"] - required["3.13"] == {"typing-extensions"}


def names(wheel: Wheel, platform: TargetPython) -> set[str]:
    found: list[Requirement] = list(dependencies(wheel, set(), platform))
    return {requirement.name for requirement in found}


def test_pip_is_told_all_older_glibcs() -> None:
    options = list(TargetPython("aarch64", "3.13").pip_options())
    assert {"manylinux_2_36_aarch64", "manylinux_2_31_aarch64", "manylinux2014_aarch64"} <= set(options)
    assert "manylinux_2_37_aarch64" not in options


def test_boards_have_their_machine() -> None:
    machines = {name: target_python(boards.load(name), "3.13").machine for name in ("pi-4", "laptop")}
    assert machines == {"pi-4": "aarch64", "laptop": "x86_64"}


def test_the_runtime_wheel_is_that_of_the_imported_package(tmp_path: Path) -> None:
    name, data = runtime_wheel()
    assert (name, data) == runtime_wheel()
    (tmp_path / name).write_bytes(data)
    wheel = read_wheel(tmp_path / name)
    assert license_of(wheel) == "Apache-2.0"
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(tmp_path / name)], check=True)
    assert (target / "edgetune_runtime/cli/main.py").is_file()


def test_the_program_needs_the_standard_library_only(tmp_path: Path) -> None:
    kit = KitMaker(tmp_path)("one")
    command = [sys.executable, "-I", "-S", str(kit / "board.pyz"), "check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_the_program_of_a_board_has_all_modules_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "board.pyz").write_bytes(board_program())
    with zipfile.ZipFile(tmp_path / "board.pyz") as program:
        names = [name.removesuffix(".py").replace("/", ".") for name in program.namelist() if name != "__main__.py"]
    modules = [name.removesuffix(".__init__") for name in names]
    code = f"import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(m) for m in {modules}]"
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "board.pyz")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""

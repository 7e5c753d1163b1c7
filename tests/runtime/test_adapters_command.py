"""`edgetune-run adapters`: what it lists, writes and refuses, and that a running server takes it over."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import pytest
from edgetune_export.backends.base import Source
from edgetune_export.pack import check_destination
from edgetune_runtime import EdgetuneError, Runtime
from edgetune_runtime.bundle import files_of_format, read_manifest, verify_files
from edgetune_runtime.inference.bundle_files import add_to_bundle, remove_from_bundle
from kills import KILLED, full_from, killed_at, read_only_from
from runtime.bundles import Adapter, add_router, change_manifest, low_rank, make_foreign, write_both
from runtime.conftest import Run
from runtime.server.test_serve_command import serving
from waiting import wait_for

PROMPT = "turn on the light"


@pytest.fixture
def run(run: Run) -> Run:
    """`run(*arguments)` of `edgetune-run adapters`."""
    return partial(run, "adapters")


@pytest.fixture
def home(home_of_both: Path) -> Path:
    """The copy in both formats, for all tests of this module."""
    return home_of_both


@pytest.fixture
def source(tiny_source: Callable[[str], Source], tmp_path: Path) -> Path:
    """A bundle of the same base, without its files, with `new` and another `command`."""
    base = tiny_source("llama")
    adapters = {name: Adapter(low_rank(base.path, seed)) for seed, name in enumerate(("new", "command"), 40)}
    bundle = write_both(tmp_path / "source", base, adapters)
    shutil.rmtree(bundle / "base")
    return bundle


def files_in(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def answer(bundle: Path, engine: str, adapter: str) -> str:
    with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
        return runtime.generate(PROMPT, adapter=adapter, max_tokens=6).text


def test_ls_lists_adapters_with_their_sizes(run: Run, home: Path) -> None:
    code, out, err = run("ls", home)
    assert (code, err) == (0, "")
    assert [line.split("\t")[:3] for line in out.splitlines()] == [
        ["command", "lora", "low_rank"],
        ["tone", "lora", "low_rank"],
        ["whole", "lora", "merged"],
    ]
    assert "gguf 0.0 MB, onnx 0.0 MB" in out
    rows = json.loads(run("ls", home, "--json")[1])
    assert rows[0]["bytes"]["gguf"] == (home / "adapters/command/adapter.gguf").stat().st_size
    weights = [*(home / "adapters/whole").rglob("model.onnx*")]
    assert rows[2]["bytes"]["onnx"] == sum(path.stat().st_size for path in weights)
    assert len(weights) == 2


def test_an_adapter_is_added_with_its_files_and_removed_with_them(run: Run, home: Path, source: Path) -> None:
    before, names = (home / "manifest.json").read_text(), files_in(home)
    assert run("add", home, source, "--adapter", "new") == (0, f"added new to {home}\n", "")
    manifest = read_manifest(home)
    verify_files(home, manifest)
    assert files_in(home) - names == {"adapters/new/adapter.gguf", "adapters/new/adapter.onnx_adapter"}
    for engine in ("gguf", "onnx"):
        assert answer(home, engine, "new") not in ("", answer(home, engine, "command"))
    assert run("remove", home, "new", "--json") == (
        0,
        '{"removed": "new", "only_marked": [], "is_router_removed": false}\n',
        "",
    )
    assert files_in(home) == names
    assert json.loads((home / "manifest.json").read_text()) == json.loads(before)
    assert not (home / "adapters/new").exists()


def test_files_outside_the_bundle_are_not_deleted_through_a_linked_folder(run: Run, home: Path, tmp_path: Path) -> None:
    outside = (home / "adapters/tone").rename(tmp_path / "outside")
    (home / "adapters/tone").symlink_to(outside)
    names, before = files_in(outside), (home / "manifest.json").read_bytes()
    code, _, err = run("remove", home, "tone")
    assert (code, "points outside the bundle" in err) == (4, True)
    assert (files_in(outside), (home / "manifest.json").read_bytes()) == (names, before)


def test_an_adapter_without_files_is_not_added(run: Run, home: Path, source: Path) -> None:
    change_manifest(source, lambda raw: raw["adapters"]["new"].update(files={}, shapes={}))
    code, _, err = run("add", home, source, "--adapter", "new")
    assert (code, f"adapter 'new' of bundle {source} has no file; build or copy the bundle again" in err) == (4, True)


def test_a_bundle_with_one_format_stays_usable_without_the_adapters_of_the_other(run: Run, home: Path) -> None:
    change_manifest(home, lambda raw: [raw["adapters"]["tone"][key].pop("gguf") for key in ("files", "shapes")])
    for file in files_of_format(read_manifest(home), "onnx"):
        (home / file).unlink()
    assert run("remove", home, "whole") == (0, f"removed whole from {home}\n", "")
    assert [line.split("\t")[0] for line in run("ls", home)[1].splitlines()] == ["command", "tone"]
    assert answer(home, "gguf", "command")


def test_a_merged_adapter_moves_with_all_files_of_its_models(run: Run, home: Path, merged_bundle: Path) -> None:
    expected = answer(merged_bundle, "onnx", "other")
    assert run("add", home, merged_bundle, "--adapter", "other")[0] == 0
    assert answer(home, "onnx", "other") == expected
    assert run("remove", home, "other")[0] == 0
    assert not (home / "adapters/other").exists()
    verify_files(home, read_manifest(home))


def test_a_name_that_is_free_again_gets_a_folder_of_its_own_while_old_files_are_there(
    run: Run, home: Path, source: Path
) -> None:
    (home / "adapters/new").mkdir()
    (home / "adapters/new/kept").write_text("of a process that was killed")
    assert run("add", home, source, "--adapter", "new")[0] == 0
    assert read_manifest(home).adapters["new"].files["gguf"] == "adapters/new-2/adapter.gguf"
    assert (home / "adapters/new/kept").exists()


def test_files_that_another_adapter_names_stay_and_its_rule_for_unsure_answers_is_named(run: Run, home: Path) -> None:
    twin = {"name": "twin", "unsure": {"min_confidence": 0.8, "then": "command"}}
    change_manifest(home, lambda raw: raw["adapters"].update(twin={**raw["adapters"]["command"], **twin}))
    removed = f"removed command from {home}; unsure answers of twin are only marked from now on\n"
    assert run("remove", home, "command") == (0, removed, "")
    verify_files(home, read_manifest(home))
    assert answer(home, "gguf", "twin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda home, source: None, "has 2 adapters; name one of: new, command"),
        (lambda home, source: shutil.rmtree(source / "adapters/new"), "adapters/new/adapter.gguf is missing"),
        (
            lambda home, source: (source / "adapters/new/adapter.onnx_adapter").write_bytes(b"TORT"),
            "adapters/new/adapter.onnx_adapter has 4 bytes",
        ),
        (lambda home, source: (source / "manifest.json").unlink(), "is not a bundle"),
        (lambda _, source: change_manifest(source, make_foreign), "adapter 'new' was made for another base than"),
        (lambda home, source: (home / "base/model.gguf").write_bytes(b"GGUF"), "base/model.gguf has 4 bytes"),
    ],
)
def test_what_cannot_be_added_leaves_the_bundle_as_it_is(
    change: Callable[[Path, Path], object], message: str, run: Run, home: Path, source: Path
) -> None:
    change(home, source)
    names, manifest = files_in(home), (home / "manifest.json").read_bytes()
    code, out, err = run("add", home, source, *([] if "2 adapters" in message else ["--adapter", "new"]))
    assert code in (2, 3, 4, 5)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert (files_in(home), (home / "manifest.json").read_bytes()) == (names, manifest)


def test_a_name_that_the_router_gives_another_meaning_is_refused(run: Run, home: Path, source: Path) -> None:
    add_router(home, {"generate": {"command": "lamp", "tone": "music"}})

    def rename(raw: dict[str, dict]) -> None:
        raw["adapters"]["auto"] = {**raw["adapters"].pop("new"), "name": "auto"}

    change_manifest(source, rename)
    code, _, err = run("add", home, source, "--adapter", "auto")
    assert (code, "another meaning for the adapter's name 'auto'; build it under another name" in err) == (2, True)
    assert read_manifest(home).adapters.keys() == {"command", "tone", "whole"}


def test_a_name_that_is_there_and_one_that_is_not_are_refused(run: Run, home: Path, source: Path) -> None:
    code, _, err = run("add", home, source, "--adapter", "command")
    assert (code, "has an adapter 'command' already; remove that one first" in err) == (2, True)
    code, _, err = run("remove", home, "none")
    assert (code, "no adapter 'none' in bundle" in err) == (3, True)


def test_one_process_at_a_time_changes_a_bundle(run: Run, home: Path, source: Path) -> None:
    folder = os.open(home, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, _, err = run("add", home, source, "--adapter", "new")
    assert (code, "another process changes bundle" in err) == (7, True)
    os.close(folder)
    assert run("add", home, source, "--adapter", "new")[0] == 0


@pytest.mark.parametrize("failing", [killed_at, full_from, read_only_from])
def test_a_bundle_is_whole_wherever_a_change_fails(
    failing: Callable[[int, Callable[[], int]], int], home: Path, source: Path
) -> None:
    def code_of(change: Callable[[], object]) -> int:
        try:
            change()
        except EdgetuneError:
            return 1
        except OSError:
            return 2
        return 0

    def add() -> int:
        return code_of(lambda: add_to_bundle(home, source, "new", lambda _: None))

    def remove() -> int:
        return code_of(lambda: remove_from_bundle(home, "new"))

    for change, undo, before in ((add, remove, False), (remove, add, True)):
        for write in count(1):
            code = failing(write, change)
            assert code in (0, 1, KILLED)
            manifest = read_manifest(home)
            verify_files(home, manifest)
            # A build into the bundle replaces it with all that is left there.
            check_destination(home)
            if code == 0:
                break
            if ("new" in manifest.adapters) != before:
                assert undo() == 0
        assert write > 2 and ("new" in manifest.adapters) != before


def test_a_running_server_takes_over_changes_at_a_hang_up(run: Run, home: Path, source: Path) -> None:
    def ask(url: str, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)

    def listed(url: str) -> set[str]:
        return {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}

    with serving(home, "--contexts", 2) as (process, url):
        before = ask(url, "command").json()["choices"]
        assert ask(url, "new").status_code == 404
        assert run("add", home, source, "--adapter", "new")[0] == 0
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: listed(url) == {"home", "command", "tone", "whole", "new"})
        assert ask(url, "new").status_code == 200
        run("remove", home, "tone")
        run("remove", home, "command")
        run("add", home, source, "--adapter", "command")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: listed(url) == {"home", "command", "whole", "new"})
        assert ask(url, "tone").status_code == 404
        assert ask(url, "command").json()["choices"] != before
        assert 'adapter="new"' in httpx.get(f"{url}/metrics").text
        (home / "manifest.json").write_text("{")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert ask(url, "new").status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err.startswith(f"edgetune-run: WARNING: cannot reload the adapters of {home}: ")
    assert err.count("\n") == 1

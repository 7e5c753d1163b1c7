"""States of fixed prompts, in memory and on the disk: they change how soon an answer comes, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import STATES_FOLDER, read_manifest
from edgetune_runtime.engines.gguf import engine as gguf
from edgetune_runtime.engines.onnx import engine as onnx
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.store import StateStore
from runtime.bundles import CASES, HYBRIDS, change_manifest, write_manifest
from runtime.conftest import LONG_PROMPTS

PROMPT = "turn on the light"
ALLOCATES = """
import ctypes, sys
import numpy as np
from edgetune_runtime import Runtime

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

with Runtime.open(sys.argv[1], disk_mb=0, map_large_blocks=sys.argv[2] == "mapped"):
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        sys.exit("no mallinfo2")
    libc.mallinfo2.restype = Info
    # Freed at once, which makes glibc take blocks up to this size from its heap from now on.
    np.ones(24 << 20, np.uint8)
    before = libc.mallinfo2().hblks
    state = np.ones(2 << 20, np.uint8)
    print(libc.mallinfo2().hblks - before)
"""

ENGINES = ("gguf", "onnx")
ENGINE_CLASSES = {"gguf": gguf.GgufEngine, "onnx": onnx.OnnxEngine}


@pytest.fixture
def open_(prompted_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Runtime]:
    """Opens the bundle of long prompts, with states in a folder of the test's own."""

    def make(engine: str, arch: str = "llama", **options: Any) -> Runtime:  # noqa: ANN401 - those of `Runtime.open`
        folder = {"cache_folder": tmp_path / "states"}
        return Runtime.open(options.pop("bundle", prompted_of(arch)), engine=engine, **folder, **options)

    return make


def files_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "states").glob("*.kv"))


def fixed(runtime: Runtime, adapter: str | None) -> int:
    return loaded_bundle(runtime).call("?", adapter).job.fixed


@pytest.mark.parametrize(("engine", "arch"), CASES)
def test_a_new_process_finds_the_state_of_a_prompt_and_answers_the_same(
    engine: str, arch: str, open_: Callable[..., Runtime], tmp_path: Path
) -> None:
    with open_(engine, arch) as first:
        cold = first.generate(PROMPT, adapter="one", max_tokens=6)
        count = fixed(first, "one")
    assert cold.timings.reused_tokens == 0
    assert len(files_of(tmp_path)) == 1
    with open_(engine, arch) as second:
        warm = second.generate(PROMPT, adapter="one", max_tokens=6)
    assert (warm.text, warm.timings.reused_tokens) == (cold.text, count)
    assert count > 16


@pytest.mark.parametrize(("engine", "arch"), CASES)
def test_switching_computes_the_message_alone(engine: str, arch: str, open_: Callable[..., Runtime]) -> None:
    with open_(engine, arch, disk_mb=0) as runtime:
        for adapter in ("one", "two"):
            runtime.generate(PROMPT, adapter=adapter, max_tokens=2)
        for message in ("play", "stop the music", PROMPT):
            for adapter in ("one", "two", {"one": 0.5}, {"one": 0.5}):
                timings = runtime.generate(message, adapter=adapter, max_tokens=2).timings
                if isinstance(adapter, str):
                    assert timings.reused_tokens >= fixed(runtime, adapter)
                    assert timings.prompt_tokens - timings.reused_tokens < 40


@pytest.mark.parametrize("engine", ENGINES)
def test_warm_computes_missing_states_and_returns_their_lengths(
    engine: str, open_: Callable[..., Runtime], tmp_path: Path
) -> None:
    with open_(engine) as runtime:
        tokens = runtime.warm()
        assert tokens == {name or "base": fixed(runtime, name) for name in (None, "one", "two")}
    # A file that is written again is another one with the same name.
    written = {path: path.stat().st_ino for path in files_of(tmp_path)}
    assert len(written) == 3
    with open_(engine) as runtime:
        assert runtime.warm() == tokens
        assert runtime.generate(PROMPT, adapter="two", max_tokens=1).timings.reused_tokens == tokens["two"]
    assert {path: path.stat().st_ino for path in files_of(tmp_path)} == written


def test_warm_tells_which_states_are_too_large_to_be_saved(
    open_: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    with open_("gguf", disk_mb=0.001) as runtime:
        runtime.generate(PROMPT, adapter="one", max_tokens=1)
        assert "did not save" not in caplog.text
        runtime.warm(["two"])
        assert len(loaded_bundle(runtime).base.first.shared.unsaved) == 1
    assert "did not save a state of 0." in caplog.text


def test_a_state_of_mapped_weights_is_none_of_repacked_ones(open_: Callable[..., Runtime]) -> None:
    reused = []
    for repack in (False, True, True):
        with open_("gguf", repack=repack) as runtime:
            reused.append(runtime.generate(PROMPT, adapter="one", max_tokens=1).timings.reused_tokens)
            whole = fixed(runtime, "one")
    assert reused == [0, 0, whole]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["flipped", "cut off", "emptied", "swapped"])
def test_a_damaged_state_is_made_again(engine: str, damage: str, open_: Callable[..., Runtime], tmp_path: Path) -> None:
    with open_(engine) as runtime:
        expected = [runtime.generate(PROMPT, adapter=name, max_tokens=6).text for name in ("one", "two")]
    one, two = files_of(tmp_path)
    data = one.read_bytes()
    if damage == "swapped":
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
    else:
        middle = bytearray(data)
        middle[len(data) // 2] ^= 255
        one.write_bytes({"flipped": bytes(middle), "cut off": data[:-9], "emptied": b""}[damage])
    with open_(engine) as runtime:
        assert [runtime.generate(PROMPT, adapter=name, max_tokens=6).text for name in ("one", "two")] == expected
    third = len(data) // 3
    assert one.read_bytes()[third:] == data[third:]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_was_built_again_has_no_state(
    engine: str, open_: Callable[..., Runtime], prompted_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with open_(engine) as runtime:
        before = runtime.generate(PROMPT, adapter="one", max_tokens=6)
    copy = Path(shutil.copytree(prompted_of("llama"), tmp_path / "copy"))
    # `one` is now what `two` was, at the scale and with the prompt of `one`.
    change_manifest(copy, lambda raw: raw["adapters"]["one"].update(files=raw["adapters"]["two"]["files"]))
    with open_(engine, bundle=copy) as runtime:
        after = runtime.generate(PROMPT, adapter="one", max_tokens=6)
    assert after.timings.reused_tokens == 0
    assert after.text != before.text


@pytest.mark.parametrize("engine", ENGINES)
def test_merged_models_with_one_prompt_have_states_of_their_own(
    engine: str, open_: Callable[..., Runtime], merged_bundle: Path, tmp_path: Path
) -> None:
    names, home = ("whole", "other"), Path(shutil.copytree(merged_bundle, tmp_path / "home"))
    change_manifest(home, lambda raw: [raw["adapters"][name].update(system=LONG_PROMPTS[0]) for name in names])
    for is_cold in (True, False):
        with open_(engine, bundle=home) as runtime:
            for name in names:
                timings = runtime.generate(PROMPT, adapter=name, max_tokens=1).timings
                assert timings.reused_tokens == (0 if is_cold else fixed(runtime, name))
    # As those that ship with a bundle.
    (tmp_path / "states").rename(home / STATES_FOLDER)
    manifest = read_manifest(home)
    write_manifest(home, manifest.base, manifest.adapters)
    remove_from_bundle(home, "other")
    assert len([*(home / STATES_FOLDER).glob("*.kv")]) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_another_version_of_the_engine_has_states_of_its_own(
    engine: str, open_: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_(engine) as runtime:
        runtime.warm()
    monkeypatch.setattr(ENGINE_CLASSES[engine], "signatures", property(lambda _: ("another",)))
    with open_(engine) as runtime:
        assert runtime.generate(PROMPT, adapter="one", max_tokens=1).timings.reused_tokens == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_without_budgets_everything_is_computed_and_nothing_written(
    engine: str, open_: Callable[..., Runtime], tmp_path: Path
) -> None:
    with open_(engine) as runtime:
        expected = [runtime.generate(PROMPT, adapter=name, max_tokens=6).text for name in ("one", "two")]
    shutil.rmtree(tmp_path / "states")
    with open_(engine, cache_mb=0, disk_mb=0) as runtime:
        for _ in range(2):
            answers = [runtime.generate(PROMPT, adapter=name, max_tokens=6) for name in ("one", "two")]
            assert [answer.text for answer in answers] == expected
            assert [answer.timings.reused_tokens for answer in answers] == [0, 0]
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("other", ["zeros", "longer"])
def test_a_state_of_other_tokens_or_of_none_is_made_again(
    engine: str, other: str, open_: Callable[..., Runtime], tmp_path: Path
) -> None:
    with open_(engine) as runtime:
        expected = runtime.generate(PROMPT, adapter="one", max_tokens=6).text
        call = loaded_bundle(runtime).call(PROMPT, "one")
        context, _ = loaded_bundle(runtime).context()
        prompts = context.shared.prompts
        assert prompts is not None
        (path,) = files_of(tmp_path)
        longer = loaded_bundle(runtime).pool(None)[0].saved("")
        key = longer.key.until(call.job.fixed)
        identity = prompts.identity(key, call.job.tokens[: call.job.fixed])
    store = StateStore(tmp_path / "states", 1)
    assert store.path_of(identity) == path
    store.drop(identity)
    # Whole by its checksum, and yet not that of these tokens.
    store.save(identity, longer.state if other == "longer" else memoryview(bytes(1000)), "home: one", 3)
    with open_(engine) as runtime:
        # What begins alike leaves a live sequence, which refusing the state takes away.
        alike = [{"role": "system", "content": LONG_PROMPTS[0][:20]}, {"role": "user", "content": PROMPT}]
        runtime.generate(alike, adapter="one", max_tokens=1)
        answer = runtime.generate(PROMPT, adapter="one", max_tokens=6)
    assert (answer.text, answer.timings.reused_tokens) == (expected, 0)


@pytest.mark.parametrize(("engine", "arch"), [("gguf", "gemma3"), ("gguf", "gemma4"), *HYBRIDS])
def test_a_state_that_cannot_be_cut_leaves_that_of_the_fixed_prompt(
    engine: str, arch: str, open_: Callable[..., Runtime]
) -> None:
    with open_(engine, arch, disk_mb=0) as runtime:
        for message in ("play", "stop the music now " * 4, "turn on the light", "play " * 9):
            for adapter in ("one", "two"):
                runtime.generate(message, adapter=adapter, max_tokens=4)
        assert runtime.generate("turn off", adapter="one", max_tokens=1).timings.reused_tokens >= fixed(runtime, "one")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("option", "mapped_blocks"), [("mapped", "1"), ("left alone", "0")])
def test_malloc_maps_large_blocks_only_when_asked(
    prompted_of: Callable[[str], Path], option: str, mapped_blocks: str
) -> None:
    command = [sys.executable, "-c", ALLOCATES, str(prompted_of("llama")), option]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "no mallinfo2" in done.stderr:
        pytest.skip("an older glibc, or another C library")
    assert (done.returncode, done.stdout.strip()) == (0, mapped_blocks), done.stderr


def test_states_of_the_bundle_are_checked_when_they_are_used_and_go_with_their_adapter(
    prompted_of: Callable[[str], Path], open_: Callable[..., Runtime], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Path(shutil.copytree(prompted_of("llama"), tmp_path / "home"))
    with Runtime.open(home, cache_folder=home / STATES_FOLDER) as runtime:
        tokens, expected = runtime.warm(), runtime.generate(PROMPT, adapter="one", max_tokens=6).text
    manifest = read_manifest(home)
    write_manifest(home, manifest.base, manifest.adapters)
    with open_("gguf", bundle=home, disk_mb=0) as runtime:
        answer = runtime.generate(PROMPT, adapter="one", max_tokens=6)
    assert (answer.text, answer.timings.reused_tokens) == (expected, tokens["one"])
    states = sorted((home / STATES_FOLDER).glob("*.kv"))
    for path in states:
        # Whole by its checksum, and yet not what the manifest says.
        path.write_bytes(path.read_bytes().replace(b'"label":"', b'"label":"x', 1))
    with open_("gguf", bundle=home, disk_mb=0) as runtime:
        answer = runtime.generate(PROMPT, adapter="one", max_tokens=6)
    assert (answer.text, answer.timings.reused_tokens) == (expected, 0)
    assert "a saved state is not used: states/" in caplog.text
    remove_from_bundle(home, "one")
    assert len([path for path in states if path.exists()]) == len(states) - 1


def test_states_in_the_cache_folder_go_with_an_adapter_that_is_removed(
    open_: Callable[..., Runtime], tmp_path: Path
) -> None:
    with open_("gguf") as runtime:
        runtime.warm()
        before = files_of(tmp_path)
        runtime.remove_adapter("one")
        assert len(files_of(tmp_path)) == len(before) - 1
        assert runtime.generate(PROMPT, adapter="two", max_tokens=1).timings.reused_tokens > 16

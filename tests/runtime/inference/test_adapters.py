"""Adapters are read at their first use, dropped for others, and come and go while calls run."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from edgetune_runtime import EdgetuneError, IncompatibleError, NotFoundError, Runtime, UsageError, VerificationError
from edgetune_runtime.bundle import AdapterEntry, read_manifest
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.bundles import Adapter, change_manifest, low_rank, make_foreign, room_for, write_both
from runtime.serving.waiting import opening

PROMPT = "turn on the warm light in the kitchen"
NAMES = [f"task{number}" for number in range(6)]
SYSTEM = "answer in one word and play " * 2


@pytest.fixture(scope="module")
def many(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of six adapters of one size in both formats."""
    source = tiny_source("llama")
    adapters = {name: Adapter(low_rank(source.path, seed), system=SYSTEM) for seed, name in enumerate(NAMES, 1)}
    return write_both(tmp_path_factory.mktemp("many") / "home", source, adapters)


@pytest.fixture(scope="module")
def others(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same base with `new`, and `task0` with other weights, without the files of its base."""
    source = tiny_source("llama")
    adapters = {"new": Adapter(low_rank(source.path, 30)), "task0": Adapter(low_rank(source.path, 31), system=SYSTEM)}
    bundle = write_both(tmp_path_factory.mktemp("others") / "other", source, adapters)
    shutil.rmtree(bundle / "base")
    return bundle


@pytest.fixture
def copy(many: Path, tmp_path: Path) -> Path:
    """A copy of the bundle of six to change."""
    return Path(shutil.copytree(many, tmp_path / "home"))


@pytest.fixture
def open_(engine: str, many: Path) -> Iterator[Callable[..., Runtime]]:
    """`open_(**options)`: the bundle of six, or another one, in each engine."""
    with opening(many, engine, contexts=1) as make:
        yield make


def answer(runtime: Runtime, adapter: str | dict[str, float] | None) -> str:
    return runtime.generate(PROMPT, adapter=adapter, max_tokens=6).text


def answers(runtime: Runtime) -> list[str]:
    return [answer(runtime, name) for name in NAMES]


def loaded(runtime: Runtime) -> list[str]:
    return loaded_bundle(runtime).adapters.names


def file_of(bundle: Path, name: str, engine: str) -> Path:
    return bundle / read_manifest(bundle).adapters[name].files[engine]


@pytest.fixture(scope="module")
def expected(engine: str, many: Path) -> list[str]:
    """What each of the six answers in a runtime that has room for all."""
    with Runtime.open(many, engine=engine, contexts=1, disk_mb=0) as runtime:
        texts = answers(runtime)
    assert len(set(texts)) > 3
    return texts


def test_opening_reads_no_file_of_an_adapter(open_: Callable[..., Runtime], copy: Path, engine: str) -> None:
    shutil.rmtree(copy / "adapters")
    runtime = open_(copy)
    assert runtime.adapters == NAMES
    assert answer(runtime, None)
    with pytest.raises(VerificationError, match=r"adapters/task1/adapter\S* is missing from bundle"):
        answer(runtime, "task1")
    assert answer(runtime, None)
    with pytest.raises(VerificationError, match="task2"):
        open_(copy, preload=["task2"])


def test_a_file_that_is_damaged_after_opening_is_one_error_and_loses_nothing(
    open_: Callable[..., Runtime], copy: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(copy, adapters_mb=room_for(copy, engine, 1))
    path = file_of(copy, "task1", engine)
    data = path.read_bytes()
    assert answer(runtime, "task1") == expected[1]
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # It is in memory: no part of it is read again.
    assert answer(runtime, "task0") == expected[0]
    with pytest.raises(VerificationError, match=r"task1.* does not match its digest"):
        answer(runtime, "task1")
    assert answer(runtime, "task2") == expected[2]
    path.write_bytes(data)
    assert answer(runtime, "task1") == expected[1]


def test_a_file_that_is_replaced_after_its_check_is_not_kept(
    open_: Callable[..., Runtime], copy: Path, engine: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_(copy)
    path, other = (file_of(copy, name, engine) for name in ("task1", "task2"))
    data, base = path.read_bytes(), loaded_bundle(runtime).base
    load = base.load

    def load_replaced(entry: AdapterEntry, file: Path, fingerprint: str) -> None:
        path.write_bytes(other.read_bytes())
        load(entry, file, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(base, "load", load_replaced)
        with pytest.raises(VerificationError, match="was changed while it was read"):
            answer(runtime, "task1")
    path.write_bytes(data)
    assert answer(runtime, "task1") == expected[1]


def test_the_least_recently_used_are_dropped_and_every_answer_stays(
    open_: Callable[..., Runtime], many: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(adapters_mb=room_for(many, engine, 2, 3), contexts=3)
    for _ in range(3):
        assert answers(runtime) == expected
        assert loaded(runtime) == NAMES[-2:]
    assert answer(runtime, "task4") == expected[4]
    answer(runtime, "task0")
    assert loaded(runtime) == ["task4", "task0"]


def test_preloaded_adapters_are_never_dropped(
    open_: Callable[..., Runtime], many: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(adapters_mb=room_for(many, engine, 2), preload=["task3"])
    assert loaded(runtime) == ["task3"]
    assert answers(runtime) == expected
    assert set(loaded(runtime)) == {"task3", "task5"}
    with pytest.raises(IncompatibleError, match=r"'task0' and 'task1' beside those that are preloaded need .* MB"):
        answer(runtime, {"task0": 1.0, "task1": 1.0})


def test_what_is_larger_than_the_limit_is_refused(
    open_: Callable[..., Runtime], many: Path, others: Path, engine: str
) -> None:
    runtime = open_(adapters_mb=room_for(many, engine, 0))
    with pytest.raises(IncompatibleError, match=r"'new' need .* larger adapters_mb"):
        runtime.add_adapter(others, "new")
    assert runtime.adapters == NAMES
    message = r"adapters_mb is \S+, and 'task0' need \S+ MB; open the bundle with a larger adapters_mb"
    with pytest.raises(IncompatibleError, match=message):
        answer(runtime, "task0")
    assert answer(runtime, None)
    with pytest.raises(IncompatibleError, match="larger adapters_mb"):
        open_(adapters_mb=room_for(many, engine, 5), preload="all")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preload": ["task9"]}, NotFoundError, "no adapter 'task9'"),
        ({"preload": "task1"}, UsageError, "preload is 'task1'; give a list of adapters, or 'all'"),
        ({"preload": 5}, UsageError, "preload is 5; give a list of adapters"),
        ({"contexts": "2"}, UsageError, "contexts is '2'; give a whole number of at least 1"),
        ({"contexts": 0}, UsageError, "contexts is 0; give a whole number of at least 1"),
        ({"repack": "x"}, UsageError, "repack is 'x'; give True or False"),
        ({"threads": 1.5}, UsageError, "threads is 1.5; give a whole number of at least 1"),
        ({"max_waiting": math.nan}, UsageError, "max_waiting is nan; give a whole number of at least 0"),
        ({"context_length": "256"}, UsageError, "context_length is '256'; give 2 to 512"),
        ({"context_length": 2.5}, UsageError, r"context_length is 2\.5; give 2 to 512"),
        ({"on_event": 5}, UsageError, "on_event is 5; give a function that takes an Event"),
        ({"defer_to": "http://x/v1"}, UsageError, "defer_to is 'http://x/v1'; give a DeferTo"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, object], error: type[EdgetuneError], message: str, many: Path
) -> None:
    with pytest.raises(error, match=message):
        Runtime.open(many, **options)  # type: ignore[arg-type]


def test_threads_with_more_adapters_than_room_get_the_right_answers(
    open_: Callable[..., Runtime], many: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(adapters_mb=room_for(many, engine, 2, 4), contexts=4, max_waiting=64)
    order = [number % 6 for number in range(0, 7 * 48, 7)]
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda number: answer(runtime, NAMES[number]), order))
    assert texts == [expected[number] for number in order]
    assert len(loaded(runtime)) <= 2


@pytest.mark.usefixtures("short_patience")
def test_a_stream_keeps_its_adapter_and_a_call_of_its_own_thread_does_not_wait_for_it(
    open_: Callable[..., Runtime], many: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(adapters_mb=room_for(many, engine, 1, 2), contexts=2)
    with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream:
        first = next(stream)
        with pytest.raises(UsageError, match="a stream is still open that nobody else reads"):
            answer(runtime, "task1")
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(answer, runtime, "task1")
            assert first + "".join(stream) == expected[0]
            assert waiting.result(timeout=60) == expected[1]


def test_an_adapter_of_another_bundle_is_added_and_removed(
    open_: Callable[..., Runtime], others: Path, engine: str
) -> None:
    runtime = open_()
    before = answers(runtime)
    assert runtime.add_adapter(others, "new") == "new"
    text = answer(runtime, "new")
    assert runtime.adapters == [*NAMES, "new"]
    assert text not in before
    runtime.remove_adapter("new")
    assert runtime.adapters == NAMES
    with pytest.raises(NotFoundError, match="no adapter 'new'"):
        answer(runtime, "new")
    runtime.add_adapter(others, "new")
    assert [answer(runtime, "new"), *answers(runtime)] == [text, *before]


def test_a_name_that_is_added_again_has_nothing_of_the_adapter_before(
    open_: Callable[..., Runtime], others: Path, many: Path, expected: list[str]
) -> None:
    with Runtime.open(many, disk_mb=0) as runtime:
        runtime.remove_adapter("task0")
        runtime.add_adapter(others, "task0")
    runtime = open_(contexts=2, exact=False)
    assert answer(runtime, "task0") == expected[0]
    runtime.warm(["task0"])
    runtime.remove_adapter("task0")
    runtime.add_adapter(others, "task0")
    first = runtime.generate(PROMPT, adapter="task0", max_tokens=6)
    assert first.timings.reused_tokens == 0
    assert first.text != expected[0]


def test_nothing_is_carried_over_of_an_adapter_that_was_removed(open_: Callable[..., Runtime], others: Path) -> None:
    runtime = open_(exact=False)
    runtime.add_adapter(others, "new")
    with runtime.session("new") as session:
        session.send(PROMPT, max_tokens=4)
        runtime.remove_adapter("new")
        session.use("task0", carry="reuse")
        assert session.send(PROMPT, max_tokens=4).timings.carried_tokens == 0


def test_a_removed_merged_adapter_leaves_no_states(merged_bundle: Path, engine: str, tmp_path: Path) -> None:
    copy, states = Path(shutil.copytree(merged_bundle, tmp_path / "copy")), tmp_path / "states"
    change_manifest(copy, lambda raw: raw["adapters"]["whole"].update(system=SYSTEM))
    with Runtime.open(copy, engine=engine, contexts=1, cache_folder=states) as runtime:
        cache = loaded_bundle(runtime).base.first.shared.cache
        answer(runtime, "one")
        before = cache.bytes, sorted(states.iterdir())
        answer(runtime, "whole")
        assert cache.bytes > before[0]
        assert len([*states.iterdir()]) > len(before[1])
        runtime.remove_adapter("whole")
        assert (cache.bytes, sorted(states.iterdir())) == before


def test_a_running_call_ends_normally_and_later_ones_do_not_find_its_adapter(
    open_: Callable[..., Runtime], expected: list[str]
) -> None:
    runtime = open_(contexts=2)
    removed = threading.Event()

    def remove() -> None:
        runtime.remove_adapter("task0")
        removed.set()

    with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream, ThreadPoolExecutor(2) as threads:
        text = next(stream)
        removing = threads.submit(remove)
        while "task0" in runtime.adapters:
            assert not removed.wait(0.01)
        with pytest.raises(NotFoundError, match="no adapter 'task0'"):
            answer(runtime, "task0")
        assert threads.submit(answer, runtime, "task1").result(timeout=60) == expected[1]
        assert not removed.is_set()
        assert text + "".join(stream) == expected[0]
        removing.result(timeout=60)


@pytest.mark.usefixtures("short_patience")
def test_removing_what_only_an_open_stream_of_the_thread_uses_changes_nothing(
    open_: Callable[..., Runtime], expected: list[str]
) -> None:
    runtime = open_()
    with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream:
        text = next(stream)
        with pytest.raises(UsageError, match="a stream is still open that nobody else reads"):
            runtime.remove_adapter("task0")
        assert text + "".join(stream) == expected[0]
    assert answer(runtime, "task0") == expected[0]


def test_a_call_that_was_prepared_for_an_adapter_that_was_replaced_is_refused(
    open_: Callable[..., Runtime], others: Path
) -> None:
    runtime = open_()
    call = loaded_bundle(runtime).call(PROMPT, "task0")
    runtime.remove_adapter("task0")
    runtime.add_adapter(others, "task0")
    with pytest.raises(NotFoundError, match="adapter 'task0' was removed before the call began"), call.lease():
        pass
    assert answer(runtime, "task0")


def test_what_cannot_be_added_is_one_error_and_calls_go_on(
    open_: Callable[..., Runtime], others: Path, tmp_path: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_()
    foreign, damaged = (Path(shutil.copytree(others, tmp_path / name)) for name in ("foreign", "damaged"))
    change_manifest(foreign, make_foreign)
    path = file_of(damaged, "new", engine)
    path.write_bytes(path.read_bytes()[:-1])
    with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream:
        text = next(stream)
        for source, name, error, message in (
            (others, None, UsageError, "has 2 adapters; name one of: new, task0"),
            (others, "task0", UsageError, "has an adapter 'task0' already; remove that one first"),
            (others, "none", NotFoundError, "no adapter 'none'"),
            (foreign, "new", IncompatibleError, "adapter 'new' was made for another base than 'tiny'"),
            (damaged, "new", VerificationError, "bytes, the manifest says"),
            (tmp_path, "new", NotFoundError, "is not a bundle"),
        ):
            with pytest.raises(error, match=message):
                runtime.add_adapter(source, name)
        assert text + "".join(stream) == expected[0]
    assert runtime.adapters == NAMES
    assert answers(runtime) == expected


def test_adapters_come_and_go_while_threads_use_others(
    open_: Callable[..., Runtime], many: Path, others: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(contexts=3, adapters_mb=room_for(many, engine, 3, 3), max_waiting=64)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            runtime.add_adapter(others, "new")
            answer(runtime, "new")
            runtime.remove_adapter("new")

    with ThreadPoolExecutor(5) as threads:
        changing = threads.submit(change)
        texts = list(threads.map(lambda number: answer(runtime, NAMES[number % 6]), range(48)))
        ended.set()
        changing.result(timeout=60)
    assert texts == [expected[number % 6] for number in range(48)]


def test_reloading_takes_over_what_changed_on_disk(
    open_: Callable[..., Runtime], copy: Path, others: Path, engine: str, expected: list[str]
) -> None:
    runtime = open_(copy)
    assert answers(runtime) == expected
    assert runtime.reload() == ([], [], [], {})
    source = read_manifest(others)
    shutil.copytree(others / "adapters/task0", copy / "adapters/task0-2")

    def change(raw: dict[str, dict]) -> None:
        del raw["adapters"]["task1"]
        entry = raw["adapters"]["task0"]
        entry["files"] = {key: file.replace("task0", "task0-2") for key, file in entry["files"].items()}
        for file in source.adapters["task0"].files.values():
            about = source.files[file]
            raw["files"][file.replace("task0", "task0-2")] = {"sha256": about.sha256, "bytes": about.bytes}
        raw["adapters"]["broken"] = {**raw["adapters"]["task2"], "name": "broken", "labels": ["a"]}
        raw["files"]["adapters/broken"] = {"sha256": "0" * 64, "bytes": 3}
        raw["adapters"]["broken"]["files"] = dict.fromkeys(entry["files"], "adapters/broken")

    change_manifest(copy, change)
    changes = runtime.reload()
    assert (changes.added, changes.replaced, changes.removed) == ([], ["task0"], ["task1"])
    assert list(changes.refused) == ["broken"]
    assert "adapters/broken is missing" in changes.refused["broken"]
    assert answer(runtime, "task0") != expected[0]
    assert answer(runtime, "task2") == expected[2]
    change_manifest(copy, lambda raw: raw["base"].update(quantization="q4_0"))
    with pytest.raises(IncompatibleError, match="has another base than before"):
        runtime.reload()


def test_an_encoder_loads_drops_and_changes_adapters_too(encoder_bundle: Path, tmp_path: Path) -> None:
    with Runtime.open(encoder_bundle, adapters_mb=room_for_one(encoder_bundle)) as runtime:
        first, second = runtime.adapters
        before = runtime.classify(PROMPT, adapter=first)
        runtime.classify(PROMPT, adapter=second)
        assert loaded(runtime) == [second]
        assert runtime.classify(PROMPT, adapter=first) == before
        runtime.remove_adapter(first)
        with pytest.raises(NotFoundError, match=f"no adapter '{first}'"):
            runtime.classify(PROMPT, adapter=first)
        runtime.add_adapter(encoder_bundle, first)
        assert runtime.classify(PROMPT, adapter=first) == before


def room_for_one(bundle: Path) -> float:
    manifest = read_manifest(bundle)
    return 1.2 * max(manifest.files[entry.files["onnx"]].bytes for entry in manifest.adapters.values()) / 1e6

"""A running bundle takes over another version of itself, as an update leaves it."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from edgetune_export.backends.base import Source
from edgetune_runtime import AsyncRuntime, IncompatibleError, Runtime, VerificationError
from edgetune_runtime.inference.bundle_files import add_to_bundle, remove_from_bundle
from edgetune_runtime.inference.following import FollowedBundle
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.store.durable import replace_link
from edgetune_runtime.store.in_use import is_in_use
from runtime.bundles import Adapter, add_router, change_manifest, low_rank, room_for, write_both, write_bundle
from runtime.serving.waiting import is_waiting
from runtime.stores import switch_to

PROMPT = "turn on the warm light in the kitchen"
SYSTEM = "answer in one word and play " * 2
NAMES = [f"task{number}" for number in range(5)]
FIRST, SECOND = "a" * 16, "b" * 16


@pytest.fixture(scope="module")
def bundle(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_source("llama"), tmp_path_factory.mktemp("first") / "home", NAMES, 1)


@pytest.fixture(scope="module")
def others(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same base with `new`, and `task0` with other weights."""
    return write(tiny_source("llama"), tmp_path_factory.mktemp("others") / "other", ["new", "task0"], 30)


def write(source: Source, out: Path, names: list[str], seed: int) -> Path:
    adapters = {name: Adapter(low_rank(source.path, seed + at), system=SYSTEM) for at, name in enumerate(names)}
    return write_both(out, source, adapters)


@pytest.fixture
def following(bundle: Path, others: Path, tmp_path: Path) -> Path:
    """The next version: `task0` is another one, `task1` is gone, and `new` is new."""
    following = Path(shutil.copytree(bundle, tmp_path / "next"))
    for name in ("task0", "task1"):
        remove_from_bundle(following, name)
    for name in ("task0", "new"):
        add_to_bundle(following, others, name, lambda _: None)
    return following


@pytest.fixture
def prefix(bundle: Path, tmp_path: Path) -> Path:
    switch_to(tmp_path / "device", FIRST, bundle)
    return tmp_path / "device"


def open_(prefix: Path, engine: str, **options: object) -> Runtime:
    return Runtime.open(prefix / "current/bundle", **{"engine": engine, "disk_mb": 0, **options})  # type: ignore[arg-type]


def answer(runtime: Runtime, adapter: str) -> str:
    return runtime.generate(PROMPT, adapter=adapter, max_tokens=6).text


def versions_in_use(prefix: Path) -> list[str]:
    return [path.name for path in sorted((prefix / "versions").iterdir()) if is_in_use(path)]


def mapped(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_version_that_was_switched_to_is_taken_over_between_calls(
    prefix: Path, following: Path, others: Path, engine: str
) -> None:
    with Runtime.open(others, engine=engine, disk_mb=0) as runtime:
        expected = answer(runtime, "task0")
    with open_(prefix, engine, contexts=3) as runtime, ThreadPoolExecutor(2) as threads:
        before = {name: answer(runtime, name) for name in NAMES[:3]}
        bases = mapped("/base/")
        assert bases and versions_in_use(prefix) == [FIRST]
        # Closed also where an assertion fails: the threads wait for it.
        with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream:
            text = next(stream)
            switch_to(prefix, SECOND, following)
            reloading = threads.submit(runtime.reload)
            # It is gone until this answer ends, as it is replaced then; others wait for the new one.
            while "task0" in runtime.adapters:
                assert not reloading.done()
            asking = threads.submit(answer, runtime, "task0")
            assert answer(runtime, "task2") == before["task2"]
            assert "task1" not in runtime.adapters and not asking.done()
            assert text + "".join(stream) == before["task0"]
        changes = reloading.result(timeout=30)
        assert (changes.added, changes.replaced, changes.removed, changes.refused) == (
            ["new"],
            ["task0"],
            ["task1"],
            {},
        )
        assert asking.result(timeout=30) == expected != before["task0"]
        assert mapped("/base/") == bases and versions_in_use(prefix) == [SECOND]
        kept = runtime.generate(PROMPT, adapter="task2", max_tokens=6)
        assert (kept.text, kept.timings.reused_tokens > 0) == (before["task2"], True)
        # The previous version may be swept.
        shutil.rmtree(prefix / "versions" / FIRST)
        assert all(answer(runtime, name) for name in ("new", *NAMES[3:]))
        assert runtime.reload() == ([], [], [], {})


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_a_call_that_waits_for_a_replaced_adapter_stops_in_time(reason: str, prefix: Path, engine: str) -> None:
    limits: dict[str, Any] = {"deadline_s": 0.3}
    if reason == "cancelled":
        limits = {"cancel": threading.Event()}
        limits["cancel"].set()
    with open_(prefix, engine) as runtime, loaded_bundle(runtime).replaced.replacing("task0"):
        begin_s = time.monotonic()
        stopped = runtime.generate(PROMPT, adapter="task0", max_tokens=6, **limits)
        assert (stopped.stop_reason, stopped.text) == (reason, "")
        assert time.monotonic() - begin_s < 5


def test_a_session_whose_adapter_is_being_replaced_begins_at_once_and_its_first_call_waits(
    prefix: Path, engine: str
) -> None:
    with open_(prefix, engine) as runtime, ThreadPoolExecutor(1) as threads:
        with loaded_bundle(runtime).replaced.replacing("task0"):
            session = threads.submit(runtime.session, "task0").result(timeout=5)
            answering = threads.submit(session.send, PROMPT, max_tokens=6)
            assert is_waiting(answering)
        assert answering.result(timeout=60).text == answer(runtime, "task0")


def test_calls_of_many_threads_get_the_old_or_the_new_adapter(
    prefix: Path, following: Path, others: Path, engine: str
) -> None:
    with open_(prefix, engine) as runtime, Runtime.open(others, engine=engine, disk_mb=0) as other:
        expected = {answer(runtime, "task0"), answer(other, "task0")}
    switch_to(prefix, SECOND, following)
    with open_(prefix, engine, contexts=1, max_waiting=64) as runtime, ThreadPoolExecutor(6) as threads:

        def send() -> str:
            with runtime.session("task0") as session:
                return session.send(PROMPT, max_tokens=6).text

        asking = [threads.submit(lambda: [answer(runtime, "task0") for _ in range(15)]) for _ in range(3)]
        asking.append(threads.submit(lambda: [send() for _ in range(15)]))
        choosing = threads.submit(lambda: [runtime.classify("play", ["on", "off"], adapter="task0") for _ in range(15)])
        for version in [FIRST, SECOND] * 5:
            replace_link(prefix / "current", f"versions/{version}")
            assert runtime.reload().replaced == ["task0"]
        assert {text for answers in asking for text in answers.result(timeout=60)} <= expected
        assert len(choosing.result(timeout=60)) == 15


@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_that_is_refused_keeps_the_files_of_the_version_before(
    verify: bool, prefix: Path, following: Path, engine: str
) -> None:
    damaged = next((following / "adapters").glob(f"task0/*.{engine}*"))
    damaged.write_bytes(b"damaged")
    with open_(prefix, engine, verify=verify) as runtime:
        before = answer(runtime, "task0")
        switch_to(prefix, SECOND, following)
        changes = runtime.reload()
        assert (list(changes.refused), changes.added) == (["task0"], ["new"])
        runtime.clear_cache()
        assert answer(runtime, "task0") == before
        assert versions_in_use(prefix) == [FIRST, SECOND]
    with open_(prefix, engine, verify=verify) as runtime, pytest.raises(VerificationError):
        answer(runtime, "task0")


def test_an_adapter_that_is_too_large_leaves_the_one_before_although_its_file_is_gone(
    bundle: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    home, base = Path(shutil.copytree(bundle, tmp_path / "home")), tiny_gguf("llama")
    larger = write_bundle(tmp_path / "larger", base, {"task0": Adapter(low_rank(base, 50, rank=64))})
    with Runtime.open(home, engine="gguf", disk_mb=0, adapters_mb=room_for(home, "gguf", 1), contexts=1) as runtime:
        before = answer(runtime, "task0")
        remove_from_bundle(home, "task0")
        add_to_bundle(home, larger, "task0", lambda _: None)
        changes = runtime.reload()
        assert "and 'task0' need" in changes.refused["task0"]
        assert answer(runtime, "task0") == before


def test_a_switch_is_not_noticed_before_it_is_taken_over(prefix: Path, following: Path, engine: str) -> None:
    with open_(prefix, engine) as runtime:
        switch_to(prefix, SECOND, following)
        # They are read from the version that was opened.
        assert [bool(answer(runtime, name)) for name in NAMES] == [True] * 5


def test_a_bundle_that_is_a_link_is_read_from_where_it_led_until_it_is_taken_over(
    bundle: Path, following: Path, tmp_path: Path, engine: str
) -> None:
    link = tmp_path / "live"
    link.symlink_to(bundle)
    with Runtime.open(link, engine=engine, disk_mb=0) as runtime:
        link.unlink()
        link.symlink_to(following)
        assert [bool(answer(runtime, name)) for name in NAMES] == [True] * 5
        assert runtime.reload().added == ["new"]


def test_a_router_chooses_until_that_of_the_new_version_does(
    bundle: Path, following: Path, tmp_path: Path, engine: str
) -> None:
    prefix, first = tmp_path / "device", Path(shutil.copytree(bundle, tmp_path / "routed"))
    add_router(first, {"generate": {"task0": "kitchen", "task1": "hall", "task2": "play"}})
    add_router(following, {"generate": {"new": "kitchen", "task2": "play"}})
    switch_to(prefix, FIRST, first)
    with open_(prefix, engine, contexts=2) as runtime, ThreadPoolExecutor(1) as threads:
        switch_to(prefix, SECOND, following)
        with runtime.stream(PROMPT, adapter="task0", max_tokens=6) as stream:
            next(stream)
            reloading = threads.submit(runtime.reload)
            while "task0" in runtime.adapters:
                assert not reloading.done()
            route = runtime.generate("play", adapter="auto", max_tokens=1).route
            assert route is not None and route.adapter == "task2"
            list(stream)
        reloading.result(timeout=30)
        assert runtime.route("the kitchen").adapter == "new"


def test_what_is_preloaded_stays_so_when_it_is_replaced(prefix: Path, following: Path, engine: str) -> None:
    room_mb = room_for(prefix / "current/bundle", engine, 3)
    with open_(prefix, engine, preload=["task0"], contexts=1, adapters_mb=room_mb) as runtime:
        switch_to(prefix, SECOND, following)
        assert runtime.reload().replaced == ["task0"]
        assert all(answer(runtime, name) for name in ("new", *NAMES[2:]))
        assert {*loaded_bundle(runtime).adapters.names} == {"task0", *NAMES[3:]}


def test_another_base_needs_a_restart_and_changes_nothing(prefix: Path, following: Path, engine: str) -> None:
    change_manifest(following, lambda raw: raw["base"].update(quantization="q4_0"))
    with open_(prefix, engine) as runtime:
        before = answer(runtime, "task0")
        switch_to(prefix, SECOND, following)
        with pytest.raises(IncompatibleError, match="has another base than before; open it again, or restart"):
            runtime.reload()
        assert runtime.adapters == NAMES
        assert answer(runtime, "task0") == before


def test_a_reload_that_fails_unexpectedly_is_logged_and_others_follow(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with await AsyncRuntime.open(bundle, disk_mb=0) as runtime:
            follower, reloads = FollowedBundle(runtime), asyncio.Queue[None]()

            async def reload() -> None:
                reloads.put_nowait(None)
                raise RuntimeError("no thread")

            watching = asyncio.create_task(follower.watch(reload))
            for _ in range(2):
                follower.ask()
                await asyncio.wait_for(reloads.get(), 30)
            watching.cancel()

    asyncio.run(main())
    assert caplog.text.count("cannot reload the bundle") == 2

"""Bundles opened in several processes, and several runtimes in one."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.engines.gguf.engine import GgufEngine

PROMPT = "turn on the light"
METHODS = [method for method in ("spawn", "fork", "forkserver") if method in multiprocessing.get_all_start_methods()]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")


def answer(bundle: Path) -> str:
    """Open the bundle in this process and answer."""
    with Runtime.open(bundle, disk_mb=0, contexts=1) as runtime:
        return runtime.generate(PROMPT, adapter=runtime.adapters[0], max_tokens=8).text


def shared_kb(bundle: Path) -> tuple[int, int]:
    """kB of the mapped base that this process has in memory, and those that are its own copies."""
    with Runtime.open(bundle, disk_mb=0, contexts=1, repack=False) as runtime:
        runtime.generate(PROMPT, max_tokens=2)
        _, mapping = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(bundle.resolve()), 1)
    resident, copied = (re.search(rf"^{key}: +(\d+) kB", mapping, re.MULTILINE) for key in ("Rss", "Anonymous"))
    assert resident and copied
    return int(resident[1]), int(copied[1])


@pytest.mark.parametrize("method", METHODS)
def test_each_process_opens_the_bundle_and_answers_alike(bundle: Path, method: str) -> None:
    expected = answer(bundle)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as workers:
        assert list(workers.map(answer, [bundle, bundle], timeout=60)) == [expected, expected]


@needs_fork
def test_a_runtime_from_before_a_fork_refuses_calls_in_the_child(bundle: Path) -> None:
    with Runtime.open(bundle, disk_mb=0) as runtime:
        runtime.generate(PROMPT, max_tokens=2)

        def refused() -> bool:
            calls: list[Callable[[], object]] = [
                lambda: runtime.generate(PROMPT),
                runtime.session,
                runtime.warm,
                runtime.clear_cache,
                runtime.reload,
                lambda: runtime.remove_adapter("tone"),
                lambda: runtime.add_adapter(bundle, "tone"),
            ]
            return all(is_refused(call) for call in calls) and "tone" in runtime.adapters

        assert in_fork(refused)
        # The parent goes on.
        assert runtime.generate(PROMPT, max_tokens=2).tokens == 2


@needs_fork
@pytest.mark.parametrize("priority", ["normal", pytest.param("low", marks=linux_only)])
def test_a_fork_refuses_embeddings_and_closes_without_waiting_for_threads(encoder_bundle: Path, priority: str) -> None:
    with Runtime.open(encoder_bundle, threads=2, priority=priority) as runtime:
        expected = runtime.embed(PROMPT)

        def closed() -> bool:
            was_refused = is_refused(lambda: runtime.embed(PROMPT))
            runtime.close()
            return was_refused

        assert in_fork(closed)
        assert runtime.embed(PROMPT) == expected


@needs_fork
def test_a_fork_closes_what_other_threads_of_its_parent_use(bundle: Path) -> None:
    begun, ends = threading.Event(), threading.Event()

    def read(runtime: Runtime) -> None:
        with runtime.session("command") as session, closing(session.stream(PROMPT, max_tokens=8)) as stream:
            next(stream)
            begun.set()
            ends.wait(60)

    with Runtime.open(bundle, disk_mb=0, contexts=1) as runtime, ThreadPoolExecutor(1) as threads:
        session = runtime.session("command")
        session.send(PROMPT, max_tokens=2)
        reading = threads.submit(read, runtime)
        assert begun.wait(60)

        def closed() -> bool:
            session.close()
            runtime.close()
            return True

        try:
            assert in_fork(closed)
        finally:
            ends.set()
        reading.result()


@needs_fork
def test_a_fork_that_exits_does_not_wait_for_the_threads_of_its_parent(encoder_bundle: Path) -> None:
    program = """if True:
        import os, signal, sys
        from edgetune_runtime import Runtime
        runtime = Runtime.open(sys.argv[1], threads=2, preflight=False)
        runtime.embed("play")
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            runtime.close()
            sys.exit(5)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(encoder_bundle)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "5\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_processes_share_the_mapped_base(bundle: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        resident_kb, copied_kb = workers.submit(shared_kb, bundle).result(timeout=60)
    assert resident_kb > 0
    assert copied_kb == 0


def test_runtimes_in_one_process_do_not_disturb_each_other(bundle: Path) -> None:
    expected = answer(bundle)
    with Runtime.open(bundle, disk_mb=0) as one, Runtime.open(bundle, disk_mb=0) as other:
        adapter = one.adapters[0]
        with closing(one.stream(PROMPT, adapter=adapter, max_tokens=8)) as stream:
            assert other.generate(PROMPT, adapter=adapter, max_tokens=8).text == expected
            assert "".join(stream) == expected
        other.close()
        assert one.generate(PROMPT, adapter=adapter, max_tokens=8).text == expected


def is_refused(call: Callable[[], object]) -> bool:
    """Whether a call says that the bundle is the parent's."""
    with pytest.raises(UsageError, match="before this process was forked"):
        call()
    return True


def in_fork(check: Callable[[], bool]) -> bool:
    """Whether the check passes in a fork of this process."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_fork
def test_a_fork_in_the_middle_of_an_answer_can_close_it_and_not_read_on(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufEngine, "adjusts_threads", False)
    with Runtime.open(bundle, disk_mb=0, threads=2) as runtime:
        stream = runtime.stream(PROMPT, max_tokens=8)
        next(stream)
        assert in_fork(lambda: is_refused(lambda: next(stream)) and stream.close() is None)
        assert "".join(stream)

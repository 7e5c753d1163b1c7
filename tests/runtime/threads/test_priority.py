from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.errors import UsageError
from edgetune_runtime.threads.priority import ComputeThreads

PROMPT = "turn on the light"
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")


def _mine() -> tuple[int, int]:
    """Scheduling policy and nice value of the calling thread."""
    thread = threading.get_native_id()
    return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)


@linux
@pytest.mark.parametrize(("priority", "policy", "nicer"), [("low", "SCHED_BATCH", 10), ("idle", "SCHED_IDLE", 0)])
def test_only_the_thread_that_computes_has_the_lower_priority(priority: str, policy: str, nicer: int) -> None:
    before = _mine()
    thread = ComputeThreads(priority)
    assert thread.run(_mine) == (getattr(os, policy), min(19, before[1] + nicer))
    assert _mine() == before
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0)
    thread.close()


@linux
@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_answers_do_not_depend_on_the_priority(engine: str, prompted_of: Callable[[str], Path]) -> None:
    texts = []
    for priority in ("normal", "low", "idle"):
        with Runtime.open(prompted_of("llama"), engine=engine, priority=priority, disk_mb=0) as runtime:
            texts.append(runtime.generate(PROMPT, adapter="one", max_tokens=12).text)
            assert runtime.classify(PROMPT, ["red", "green"], adapter="two").label in ("red", "green")
    assert len(set(texts)) == 1


AT_EXIT = """
import atexit, time
from concurrent.futures import ThreadPoolExecutor
from edgetune_runtime.threads.priority import ComputeThreads
threads = ComputeThreads("normal")
def work():
    for _ in range(20):
        time.sleep(0.02)
        threads.run(lambda: None)
    print("all")
atexit.register(lambda: threads.run(lambda: print("at exit")))
ThreadPoolExecutor(1).submit(work)
"""


def test_what_runs_when_the_interpreter_exits_is_computed() -> None:
    command = [sys.executable, "-c", AT_EXIT]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "all\nat exit\n"


def test_an_unknown_priority_is_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no priority 'high'; choose one of: normal, low, idle"):
        Runtime.open(bundle, priority="high")

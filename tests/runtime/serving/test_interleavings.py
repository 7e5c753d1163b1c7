"""Whatever was asked before, in whatever order: each greedy answer is that of a fresh process, token for token."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.session import Session
from edgetune_runtime.text.chat import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime.bundles import CASES, HYBRIDS
from runtime.fresh import STEPS, Fresh, greedy

CHOICES: tuple[Any, ...] = (None, "one", "two", {"one": 0.5}, {"one": 1.0, "two": 1.0})
BUDGETS = ((64, 64), (0.2, 0), (0, 64), (0, 0))
"""In memory and on disk, in MB."""
PROMPTS = ("turn on the light", "turn on the light in the hall", "stop", "play " * 30)

choices, prompts = st.integers(0, len(CHOICES) - 1), st.integers(0, len(PROMPTS) - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("call"), choices, prompts),
    st.tuples(st.just("session"), choices, prompts, st.integers(0, 1)),
    st.tuples(st.just("drop"), choices, prompts),
    st.tuples(st.just("cancel"), choices, prompts),
    st.tuples(st.just("evict")),
    st.tuples(st.just("restart")),
)


@pytest.fixture(scope="module")
def fresh_of(prompted_of: Callable[[str], Path]) -> Any:  # noqa: ANN401 - a generator fixture
    """`fresh_of(engine, arch)`: what a runtime of that engine answers that knows nothing."""
    with ExitStack() as opened:
        yield cache(lambda engine, arch: opened.enter_context(closing(Fresh(prompted_of(arch), engine, CHOICES))))


@pytest.mark.parametrize(("engine", "arch"), [*CASES, ("gguf", "gemma3")])
def test_the_choices_give_different_logits(engine: str, arch: str, fresh_of: Callable[[str, str], Fresh]) -> None:
    messages: list[Message] = [{"role": "user", "content": PROMPTS[0]}]
    found = {fresh_of(engine, arch).greedy(messages, choice)[0].tobytes() for choice in range(len(CHOICES))}
    assert len(found) == len(CHOICES)


@pytest.mark.parametrize(
    ("engine", "arch", "budgets"),
    [
        *((*case, budgets) for case in CASES for budgets in (BUDGETS[:2] if case in HYBRIDS else BUDGETS)),
        # Its window of attention is shorter than these prompts.
        ("gguf", "gemma3", BUDGETS[0]),
    ],
)
@given(actions=st.lists(ACTIONS, min_size=3, max_size=10))
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_order_of_calls_changes_an_answer(
    engine: str,
    arch: str,
    budgets: tuple[float, float],
    actions: list[tuple[Any, ...]],
    prompted_of: Callable[[str], Path],
    fresh_of: Callable[[str, str], Fresh],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    fresh, folder = fresh_of(engine, arch), tmp_path_factory.mktemp("states")
    options: dict[str, Any] = {"cache_mb": budgets[0], "disk_mb": budgets[1], "cache_folder": folder}
    runtime = Runtime.open(prompted_of(arch), engine=engine, contexts=2, **options)
    sessions: dict[int, Session] = {}
    try:
        for kind, *rest in actions:
            if kind == "evict":
                runtime.clear_cache()
            elif kind == "restart":
                for number, session in sessions.items():
                    session.save(folder / f"{number}.session")
                runtime.close()
                runtime = Runtime.open(prompted_of(arch), engine=engine, contexts=2, **options)
                sessions = {number: runtime.load_session(folder / f"{number}.session") for number in sessions}
            else:
                _act(kind, rest, runtime, sessions, fresh)
    finally:
        runtime.close()


def _act(kind: str, rest: list[int], runtime: Runtime, sessions: dict[int, Session], fresh: Fresh) -> None:
    choice, prompt = rest[:2]
    messages: list[Message] = [{"role": "user", "content": PROMPTS[prompt]}]
    if kind == "call":
        found = greedy(loaded_bundle(runtime).call(messages, CHOICES[choice]))
        # Bit for bit, so no tie can fall another way.
        np.testing.assert_array_equal(found, fresh.greedy(messages, choice))
    elif kind == "session":
        session = sessions.setdefault(rest[2], runtime.session())
        session.use(CHOICES[choice])
        # A conversation must fit in the context.
        del session.history[:-2]
        messages = [*session.history, *messages]
        assert fresh.agrees(session.send(PROMPTS[prompt], max_tokens=STEPS).text, messages, choice)
    elif kind == "drop":
        stream = runtime.stream(messages, adapter=CHOICES[choice], max_tokens=STEPS)
        next(stream, None)
        del stream
    else:
        assert runtime.generate(messages, adapter=CHOICES[choice], deadline_s=1e-9).stop_reason == "deadline"


@pytest.mark.parametrize(("engine", "arch"), CASES)
def test_eight_threads_change_no_answer(
    engine: str, arch: str, prompted_of: Callable[[str], Path], fresh_of: Callable[[str, str], Fresh], tmp_path: Path
) -> None:
    jobs = list(itertools.product(range(len(CHOICES)), range(3))) * 3
    with Runtime.open(prompted_of(arch), engine=engine, contexts=3, cache_mb=0.5, cache_folder=tmp_path) as runtime:

        def answer(job: tuple[int, int]) -> list[Logits]:
            return greedy(loaded_bundle(runtime).call(PROMPTS[job[1]], CHOICES[job[0]]))

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(answer, jobs))
        assert len(loaded_bundle(runtime).pool(None)[0].contexts) <= 3
    for (choice, prompt), found in zip(jobs, answers, strict=True):
        expected = fresh_of(engine, arch).greedy([{"role": "user", "content": PROMPTS[prompt]}], choice)
        np.testing.assert_array_equal(found, expected)


# A fork for each line that it reads, as imports take longer than all else.
WRITER = """
import os, sys
from pathlib import Path
from edgetune_runtime import Runtime, engines
from edgetune_runtime.states.store import StateStore
bundle, engine, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
engines.load(engine)
while sys.stdin.readline():
    fork = os.fork()
    if fork:
        os.waitpid(fork, 0)
        print("ended", flush=True)
        continue
    with Runtime.open(bundle, engine=engine, cache_folder=folder, contexts=1) as runtime:
        while True:
            runtime.clear_cache()
            StateStore(folder, 64).clear()
            runtime.warm()
            os.write(1, b"%d\\n" % os.getpid())
"""


@pytest.mark.parametrize(("engine", "arch"), CASES)
def test_states_of_a_process_that_was_killed_while_it_wrote_change_no_answer(
    engine: str, arch: str, prompted_of: Callable[[str], Path], fresh_of: Callable[[str, str], Fresh], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITER, str(prompted_of(arch)), engine, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writers:
        for delay_s in (0.0, 0.004, 0.011):
            kill_a_writer(writers, delay_s)
            with Runtime.open(prompted_of(arch), engine=engine, contexts=1, cache_folder=tmp_path) as runtime:
                for choice in range(3):
                    found = greedy(loaded_bundle(runtime).call(PROMPTS[1], CHOICES[choice]))
                    expected = fresh_of(engine, arch).greedy([{"role": "user", "content": PROMPTS[1]}], choice)
                    np.testing.assert_array_equal(found, expected)


def kill_a_writer(writers: subprocess.Popen[bytes], delay_s: float) -> None:
    """Have one started, and kill it so long after it has written all its states once."""
    assert writers.stdin is not None and writers.stdout is not None
    writers.stdin.write(b"\n")
    writers.stdin.flush()
    fork = int(writers.stdout.readline())
    time.sleep(delay_s)
    os.kill(fork, signal.SIGKILL)
    # It may have written them again before.
    while writers.stdout.readline() != b"ended\n":
        pass

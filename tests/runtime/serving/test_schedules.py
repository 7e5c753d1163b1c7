"""Calls of several threads in a drawn order: each answer is that of a fresh runtime, and nothing hangs or is left."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.formats.checked_file import read_checked
from edgetune_runtime.inference.answer import Stream
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.session import Session
from edgetune_runtime.serving import places
from edgetune_runtime.states.daily import COUNT_NAME
from edgetune_runtime.states.store import KIND
from edgetune_runtime.text.chat import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime.bundles import CASES, HYBRIDS
from runtime.fresh import STEPS, Fresh

THREADS = 3
MOST_S = 20
"""After so long a thread counts as hanging."""
BLOCKED_S = 0.02
"""After so long the next action begins beside one that has not ended."""
SWITCH_S = 0.015
"""How long a switch is held up, in the middle of which the context belongs to the call before it."""
CHOICES = (None, "one", "whole", "other")
PROMPTS = ("turn on the light", "turn on the light in the hall", "stop")
FORM = ["red", "green", "warm light"]

choices, prompts, slots = (st.integers(0, len(all_) - 1) for all_ in (CHOICES, PROMPTS, range(2)))
ACTIONS = st.one_of(
    st.tuples(st.just("generate"), choices, prompts),
    st.tuples(st.just("constrain"), choices, prompts),
    st.tuples(st.just("stream"), choices, prompts, slots),
    st.tuples(st.just("read"), slots),
    st.tuples(st.just("drop"), slots),
    st.tuples(st.just("send"), choices, prompts),
    st.tuples(st.just("save")),
    st.tuples(st.just("clear")),
    st.tuples(st.just("close")),
)
SCHEDULES = st.lists(st.tuples(st.integers(0, THREADS - 1), ACTIONS, st.booleans()), min_size=4, max_size=16)
"""Threads with their actions, and whether the next one waits for the end of this one."""


Schedule = list[tuple[int, tuple[Any, ...], bool]]


@dataclass
class Told:
    """What a call answered."""

    messages: list[Message]
    choice: int
    text: str
    is_whole: bool
    has_form: bool = False


@dataclass
class Slot:
    """A stream that any thread may go on with, one at a time."""

    stream: Stream | None = None
    pieces: list[str] = field(default_factory=list)
    asked: tuple[int, int] = (0, 0)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Run:
    """One schedule on a runtime."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.runtime, self.folder = runtime, folder
        self.slots = [Slot(), Slot()]
        self.told: list[Told] = []
        self.is_closing = False
        self.errors: list[BaseException] = []

    def work(self, number: int, actions: queue.Queue[tuple[tuple[Any, ...], threading.Event] | None]) -> None:
        """A thread with a session of its own."""
        session, states = self.runtime.session(), []
        while (item := actions.get()) is not None:
            (kind, *rest), ended = item
            try:
                with self._expected():
                    if kind == "send":
                        self._send(session, rest, states)
                    elif kind == "save":
                        self._save(session, self.folder / f"{number}.session", states)
                    else:
                        getattr(self, f"_{kind}")(*rest)
            except BaseException as error:
                self.errors.append(error)
            ended.set()

    def finish(self, workers: list[threading.Thread]) -> None:
        """Read all streams to their ends, also those that the threads still open, until all threads have ended."""
        is_over = False
        while not is_over:
            # The last round is after the end of all of them.
            is_over = not any(worker.is_alive() for worker in workers)
            for slot in self.slots:
                with slot.lock, self._expected():
                    while slot.stream is not None:
                        self._read_on(slot)
            time.sleep(0 if is_over else 0.01)

    @contextmanager
    def _expected(self) -> Iterator[None]:
        """Accept errors of a closed runtime once it was closed, and of a thread that would wait for its own streams."""
        is_closing = self.is_closing
        try:
            yield
        except UsageError as error:
            is_closing = is_closing or self.is_closing
            if "a stream is still open that nobody else reads" not in str(error) and not (
                is_closing and "closed" in str(error)
            ):
                raise

    def _generate(self, choice: int, prompt: int) -> None:
        # With a deadline, as the streams of others may have all contexts.
        answer = self.runtime.generate(PROMPTS[prompt], adapter=CHOICES[choice], max_tokens=STEPS, deadline_s=0.3)
        self._tell(choice, prompt, answer.text, is_whole=answer.stop_reason != "deadline")

    def _constrain(self, choice: int, prompt: int) -> None:
        answer = self.runtime.generate(PROMPTS[prompt], adapter=CHOICES[choice], choices=FORM, deadline_s=0.3)
        self._tell(choice, prompt, answer.text, is_whole=answer.stop_reason != "deadline", has_form=True)

    def _stream(self, choice: int, prompt: int, place: int) -> None:
        slot = self.slots[place]
        with slot.lock:
            if slot.stream is None:
                stream = self.runtime.stream(PROMPTS[prompt], adapter=CHOICES[choice], max_tokens=STEPS, deadline_s=2)
                slot.stream, slot.pieces, slot.asked = stream, [], (choice, prompt)
                self._read_on(slot)

    def _read(self, place: int) -> None:
        slot = self.slots[place]
        with slot.lock:
            if slot.stream is not None:
                self._read_on(slot)

    def _drop(self, place: int) -> None:
        slot = self.slots[place]
        with slot.lock:
            if slot.stream is not None:
                slot.stream.close()
            slot.stream = None

    def _read_on(self, slot: Slot) -> None:
        stream = slot.stream
        assert stream is not None
        try:
            slot.pieces.append(next(stream))
        except StopIteration:
            slot.stream = None
            assert stream.answer is not None
            assert stream.answer.text == "".join(slot.pieces)
            self._tell(*slot.asked, stream.answer.text, is_whole=stream.answer.stop_reason != "deadline")
        except BaseException:
            slot.stream = None
            raise

    def _send(self, session: Session, rest: list[int], states: list[list[int]]) -> None:
        choice, prompt = rest
        session.use(CHOICES[choice])
        # A conversation must fit in the context.
        del session.history[:-2]
        messages = [*session.history, {"role": "user", "content": PROMPTS[prompt]}]
        text = session.send(PROMPTS[prompt], max_tokens=STEPS).text
        assert session._last is not None
        states.append(list(session._last.tokens))
        self.told.append(Told(messages, choice, text, is_whole=True))

    def _save(self, session: Session, path: Path, states: list[list[int]]) -> None:
        session.save(path)
        found = read_checked(path, KIND)
        assert found is not None
        assert found.about["conversation"]["history"] == session.history
        state = found.about["state"]
        assert state is None or state["key"]["tokens"] in states

    def _clear(self) -> None:
        self.runtime.clear_cache()

    def _close(self) -> None:
        self.is_closing = True
        self.runtime.close()

    def _tell(self, choice: int, prompt: int, text: str, *, is_whole: bool, has_form: bool = False) -> None:
        messages: list[Message] = [{"role": "user", "content": PROMPTS[prompt]}]
        self.told.append(Told(messages, choice, text, is_whole, has_form))


def run(runtime: Runtime, folder: Path, schedule: Schedule) -> Run:
    """Let each thread do its actions, in this order: side by side, or after one another unless one seems to wait."""
    going = Run(runtime, folder)
    queues: list[queue.Queue[Any]] = [queue.Queue() for _ in range(THREADS)]
    workers = [threading.Thread(target=going.work, args=item, daemon=True) for item in enumerate(queues)]
    for worker in workers:
        worker.start()
    for number, action, waits in schedule:
        ended = threading.Event()
        queues[number].put((action, ended))
        ended.wait(BLOCKED_S if waits else 0)
    for actions in queues:
        actions.put(None)
    finisher = threading.Thread(target=going.finish, args=(workers,), daemon=True)
    finisher.start()
    finisher.join(MOST_S)
    assert not finisher.is_alive(), "a thread hangs"
    return going


@pytest.fixture(scope="module")
def fresh_of(
    merged_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Fresh]]:
    """`fresh_of(engine, arch)`: what a runtime of that engine answers that knows nothing, on a copy of the bundle."""
    with ExitStack() as opened:

        @cache
        def make(engine: str, arch: str) -> Fresh:
            copy = Path(shutil.copytree(merged_of(arch), tmp_path_factory.mktemp("fresh") / "home"))
            return opened.enter_context(closing(Fresh(copy, engine, CHOICES)))

        yield make


@pytest.mark.parametrize(
    ("engine", "arch", "merged_mb"),
    [(*case, merged_mb) for case in CASES for merged_mb in ([None] if case in HYBRIDS else [None, 0])],
)
@given(contexts=st.integers(1, 2), schedule=SCHEDULES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_schedule_changes_an_answer_hangs_or_leaves_anything(
    engine: str,
    arch: str,
    merged_mb: float | None,
    contexts: int,
    schedule: Schedule,
    merged_of: Callable[[str], Path],
    fresh_of: Callable[[str, str], Fresh],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    fresh, folder = fresh_of(engine, arch), tmp_path_factory.mktemp("schedule")
    options: dict[str, Any] = {"contexts": contexts, "cache_mb": 0.5, "cache_folder": folder / "states"}
    options["on_event"] = lambda event: time.sleep(SWITCH_S if event.kind == "switched" else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "PATIENCE_S", 0.05)
        runtime = Runtime.open(merged_of(arch), engine=engine, merged_mb=merged_mb, **options)
        going = run(runtime, folder, schedule)
        runtime.close()
    assert not going.errors
    for told in going.told:
        _check(fresh, told)
    _check_closed(runtime, folder)


def _check(fresh: Fresh, told: Told) -> None:
    if not told.is_whole:
        return
    if told.has_form:
        assert told.text == fresh.constrained(told.messages, told.choice, FORM)
    else:
        assert fresh.agrees(told.text, told.messages, told.choice)


def _check_closed(runtime: Runtime, folder: Path) -> None:
    """All is freed, no file is half written, and no call is answered."""
    loaded = loaded_bundle(runtime)
    for choice in CHOICES:
        with pytest.raises(UsageError, match="the runtime is closed"):
            runtime.generate(PROMPTS[0], adapter=choice)
    with loaded._pools() as pools:
        assert all(pool.first.closed for pool in pools)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(runtime.bundle.resolve()) not in maps.read_text()
    left = {path.suffix or path.name for path in folder.rglob("*") if path.is_file()}
    assert left <= {".session", ".kv", COUNT_NAME}

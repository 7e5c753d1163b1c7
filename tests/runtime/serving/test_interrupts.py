"""Ctrl-C leaves no lock, place, adapter or context taken, wherever it comes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.inference.loaded import LoadedBundle
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.interrupting import enter_until

PROMPT = "turn on the light"
MOST_S = 30


def taken(loaded: LoadedBundle) -> list[object]:
    """What is still in use, for a thread that uses nothing."""
    locks = {"places": loaded.base.places.gate, "adapters": loaded.adapters._lock, "merged": loaded._merged._lock}
    found: list[object] = []
    for name, lock in locks.items():
        if lock.acquire(timeout=1):
            lock.release()
        else:
            found.append(f"the lock of {name}")
    pools, all_loaded, places = (
        [loaded.base, *loaded._models.pools.values()],
        (loaded.adapters, loaded._merged),
        loaded.base.places,
    )
    contexts = [context for pool in pools for context in pool.contexts]
    users = [user for adapters in all_loaded for one in adapters._loaded.values() for user in one.users]
    changers = [*(adapters._changer for adapters in all_loaded), places._forking, *(one.holder for one in contexts)]
    return [*found, *places._running, *users, *(use for pool in pools for use in pool._uses), *filter(None, changers)]


def forget(loaded: LoadedBundle) -> None:
    """Let the next call load its adapters, and make a context if no other one is free."""
    for adapters in (loaded._merged, loaded.adapters):
        for name in adapters.names:
            adapters.remove(name)
    with loaded.base.places.gate:
        loaded.base.places._retire_idle()


# A generator that is dropped before its end swallows an interrupt.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("adapter", "is_first"), [("one", False), ("one", True), ("whole", False), (None, False), (None, True)]
)
def test_an_interrupt_leaves_nothing_taken(
    adapter: str | None, is_first: bool, merged_bundle: Path, threads: ThreadPoolExecutor
) -> None:
    runtime = Runtime.open(merged_bundle, contexts=2, disk_mb=0)
    loaded, place = loaded_bundle(runtime), 0
    with loaded.lease(adapter, [1]):
        pass
    with loaded.base.first.hold():
        before = threads.submit(taken, loaded).result(MOST_S)
        while enter_until(place, lambda: loaded.lease(adapter, [1])):
            assert threads.submit(taken, loaded).result(MOST_S) == before, f"at place {place}"
            if is_first:
                threads.submit(forget, loaded).result(MOST_S)
            place += 1
    assert place > 20
    threads.submit(runtime.close).result(MOST_S)


def test_an_interrupt_before_a_tokenizer_is_used_lets_the_runtime_close(bundle: Path) -> None:
    runtime = Runtime.open(bundle, contexts=1, disk_mb=0)
    base, place = loaded_bundle(runtime).base, 0
    while enter_until(place, base.tokenizer):
        assert not base._uses, f"at place {place}"
        place += 1
    assert place > 1
    runtime.close()


def test_an_interrupt_while_a_context_is_made_leaves_others_to_make_it(
    bundle: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_engine: GgufEngine) -> GgufEngine:
        monkeypatch.undo()
        raise KeyboardInterrupt

    runtime = Runtime.open(bundle, contexts=2, disk_mb=0)
    with runtime.stream(PROMPT, max_tokens=60) as stream:
        next(stream)
        monkeypatch.setattr(GgufEngine, "fork", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.generate(PROMPT)
        assert threads.submit(runtime.generate, PROMPT, max_tokens=2).result(MOST_S).tokens == 2
    threads.submit(runtime.close).result(MOST_S)

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
    contexts = [context for pool in (loaded.base, *loaded._models.pools.values()) for context in pool.contexts]
    users = [one.users for all_loaded in (loaded.adapters, loaded._merged) for one in all_loaded._loaded.values()]
    return [*found, *loaded.base.places._running, *filter(None, users), *filter(None, (one.holder for one in contexts))]


@pytest.mark.parametrize("adapter", ["one", "whole"])
def test_an_interrupt_leaves_nothing_taken(adapter: str, merged_bundle: Path, threads: ThreadPoolExecutor) -> None:
    runtime = Runtime.open(merged_bundle, contexts=1, disk_mb=0)
    loaded, place = loaded_bundle(runtime), 0
    with loaded.lease(adapter, [1]):
        pass
    while enter_until(place, lambda: loaded.lease(adapter, [1])):
        assert threads.submit(taken, loaded).result(MOST_S) == [], f"at place {place}"
        place += 1
    assert place > 20
    threads.submit(runtime.close).result(MOST_S)


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

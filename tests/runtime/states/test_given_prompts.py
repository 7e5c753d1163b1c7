"""System prompts that come with calls: found again from call to call and, once they came twice, from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.cache import CALLS, FROM_CALL, PROMPTS, SavedState, StateCache, key_of
from edgetune_runtime.states.sightings import Sightings

SYSTEMS = ("turn off the lamp in the hall and play " * 4, "set heat to red in the kitchen " * 5)
Open = Callable[..., Runtime]


@pytest.fixture(params=["gguf", "onnx"])
def open_(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path], tmp_path: Path) -> Open:
    def call(**options: object) -> Runtime:
        folder = tmp_path / "states"
        given = {"engine": request.param, "cache_folder": folder, "contexts": 1, **options}
        return Runtime.open(prompted_of("llama"), **given)  # type: ignore[arg-type]

    return call


def ask(runtime: Runtime, system: str, text: str, adapter: str | None = "one") -> tuple[str, int]:
    """An answer, and how many tokens of its prompt were reused."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    answer = runtime.generate(messages, adapter=adapter, max_tokens=6)
    return answer.text, answer.timings.reused_tokens


def fixed(runtime: Runtime, system: str) -> int:
    job = (
        loaded_bundle(runtime)
        .call([{"role": "system", "content": system}, {"role": "user", "content": "?"}], "one")
        .job
    )
    assert job.comes_with_call
    return job.fixed


def stored(tmp_path: Path) -> int:
    return len(list((tmp_path / "states").glob("*.kv")))


def test_two_prompts_on_one_adapter_are_both_found_again_and_change_no_answer(open_: Open) -> None:
    with open_(disk_mb=0, cache_mb=0) as cold:
        expected = {}
        for system in SYSTEMS:
            for text in ("play", "stop", "turn on the light"):
                cold.clear_cache()
                expected[system, text] = ask(cold, system, text)[0]
    with open_(disk_mb=0) as runtime:
        for round_, text in enumerate(("play", "stop", "turn on the light")):
            for system in SYSTEMS:
                # Another adapter in between takes the sequence.
                runtime.generate("play", adapter="two", max_tokens=1)
                answer, reused = ask(runtime, system, text)
                assert answer == expected[system, text]
                assert reused == (fixed(runtime, system) if round_ else 0)
    assert len(set(expected.values())) > 2


def test_a_prompt_is_on_disk_once_it_came_twice_and_is_found_after_a_restart(open_: Open, tmp_path: Path) -> None:
    with open_() as first:
        cold = ask(first, SYSTEMS[0], "play")
        assert (cold[1], stored(tmp_path)) == (0, 0)
        assert ask(first, SYSTEMS[0], "play")[0] == cold[0]
        assert stored(tmp_path) == 1
        ask(first, SYSTEMS[0], "stop")
        assert stored(tmp_path) == 1
        count = fixed(first, SYSTEMS[0])
    with open_() as again:
        assert ask(again, SYSTEMS[0], "play") == (cold[0], count)


def test_without_a_cache_in_memory_the_second_call_still_writes_the_state(open_: Open, tmp_path: Path) -> None:
    with open_(cache_mb=0) as first:
        cold = ask(first, SYSTEMS[0], "play")[0]
        assert ask(first, SYSTEMS[0], "play")[0] == cold
        assert stored(tmp_path) == 1
    with open_(cache_mb=0) as again:
        assert ask(again, SYSTEMS[0], "play") == (cold, fixed(again, SYSTEMS[0]))


def test_prompts_that_come_once_write_nothing_and_leave_the_adapters_own_states(open_: Open, tmp_path: Path) -> None:
    with open_() as runtime:
        runtime.generate("play", adapter="two", max_tokens=1)
        assert stored(tmp_path) == 1
        size = loaded_bundle(runtime).pool(None)[0].first.shared.cache.bytes
    with open_(cache_mb=size * 2.5 / 1e6) as runtime:
        own = runtime.generate("play", adapter="two", max_tokens=1).timings.reused_tokens
        for number in range(6):
            ask(runtime, f"it is {number} now " + SYSTEMS[0], "play")
        assert stored(tmp_path) == 1
        (tmp_path / "states").rename(tmp_path / "away")
        assert runtime.generate("stop", adapter="two", max_tokens=1).timings.reused_tokens == own > 16


def test_calls_write_nothing_to_disk_without_a_daily_budget_but_warm_does(open_: Open, tmp_path: Path) -> None:
    with open_(disk_mb_per_day=0) as runtime:
        for number in range(3):
            for _ in range(3):
                ask(runtime, f"it is {number} now " + SYSTEMS[0], "play")
            runtime.generate("play", adapter={"two": 1 + number / 8}, max_tokens=1)
        assert ask(runtime, "it is 2 now " + SYSTEMS[0], "play")[1] > 16
        assert stored(tmp_path) == 0
        warmed = runtime.warm(["one"])
        assert stored(tmp_path) == len(warmed) == 1
    with open_(disk_mb_per_day=0) as again:
        assert again.generate("play", adapter="one", max_tokens=1).timings.reused_tokens == warmed["one"]


def test_a_given_prompt_is_evicted_before_a_kept_one_until_it_is_kept_too() -> None:
    def saved(*tokens: int) -> SavedState:
        return SavedState(key_of("base", [(0, {})]), tokens, memoryview(bytes(10)))

    cache = StateCache(30e-6)
    cache.put(saved(1), PROMPTS)
    cache.put(saved(2), FROM_CALL)
    cache.put(saved(3), FROM_CALL)
    cache.put(saved(4), FROM_CALL)
    key = saved().key
    assert [cache.prompt(key, [number]) is not None for number in (1, 2, 3, 4)] == [True, False, True, True]
    cache.put(saved(3), PROMPTS)
    assert cache.bytes == 30
    cache.put(saved(5), CALLS)
    assert cache.last(CALLS, "base") is None
    cache.put(saved(6), FROM_CALL)
    assert [cache.prompt(key, [number]) is not None for number in (1, 3, 4, 6)] == [True, True, False, True]


def test_sightings_are_counted_per_prompt_and_adapters_and_the_oldest_are_forgotten() -> None:
    sightings, base, adapter = Sightings(), key_of("base", [(0, {})]), key_of("base", [(0, {"one": 1.0})])
    assert [sightings.count(base, [1, 2]) for _ in range(3)] == [1, 2, 3]
    assert sightings.count(adapter, [1, 2]) == 1
    for number in range(300):
        sightings.count(base, [number])
    assert sightings.count(base, [1, 2]) == 1

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune_runtime.events import Event
from edgetune_runtime.states.cache import CALLS, PROMPTS, Key, SavedState, StateCache, common_prefix, key_of, reusable


def key(base: str, adapters: Mapping[str, float], then: Mapping[str, float] | None = None, since: int = 0) -> Key:
    """The key of adapters, and of others from a token on."""
    return key_of(base, [(0, adapters), *([] if then is None else [(since, then)])])


def state(text: str) -> memoryview:
    return memoryview(text.encode())


def size(count: int) -> memoryview:
    return memoryview(bytes(count))


def saved(of: Key, tokens: Sequence[int], made: memoryview, ends: Sequence[int] = ()) -> SavedState:
    return SavedState(of, tuple(tokens), made, tuple(ends))


ADAPTED = key("base", {"a": 1.0})


def test_a_key_ignores_order_and_adapters_of_scale_zero() -> None:
    assert key("base", {"a": 1, "b": 0.5, "c": 0}) == key("base", {"b": 0.5, "a": 1.0})


def test_keys_of_states_differ_by_base_adapter_and_scale() -> None:
    keys = {
        key("base", {}),
        key("other", {}),
        key("base", {"a": 1}),
        key("base", {"a": 0.5}),
        key("base", {"b": 1}),
        key("base", {"a": 1, "b": 1}),
    }
    assert len(keys) == 6


def test_common_prefix_counts_equal_tokens_from_the_start() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


def test_the_last_state_of_a_key_takes_the_place_of_the_one_before() -> None:
    cache = StateCache(1)
    cache.put(saved(ADAPTED, [1], state("old")))
    cache.put(saved(ADAPTED, [1, 2], state("newer")))
    found, known = cache.best(ADAPTED, [1, 2, 3])
    assert found is not None
    assert known == 2
    assert (found.tokens, found.state, cache.bytes) == ((1, 2), b"newer", 5)


def test_the_least_recently_used_state_is_evicted_first() -> None:
    cache = StateCache(30e-6)
    keys = [key("base", {"a": scale}) for scale in (1, 2, 3)]
    cache.put(saved(keys[0], [1], size(15)))
    cache.put(saved(keys[1], [1], size(15)))
    cache.best(keys[0], [1, 2])
    cache.put(saved(keys[2], [1], size(15)))
    assert [cache.best(one, [1, 2])[1] == 1 for one in keys] == [True, False, True]
    assert cache.bytes == 30


def test_evictions_are_reported_without_the_lock() -> None:
    reported: list[tuple[Event, bool]] = []
    cache = StateCache(30e-6, lambda event: reported.append((event, cache._lock.locked())))
    for scale in (1, 2, 3, 4):
        cache.put(saved(key("base", {"a": scale}), [1, 2], size(15)))
    events = [Event("evicted", name, tokens=2, bytes=15) for name in ("a", "a=2")]
    assert reported == [(event, False) for event in events]


def test_a_state_larger_than_the_budget_is_not_kept() -> None:
    cache = StateCache(10e-6)
    cache.put(saved(ADAPTED, [1], size(11)))
    assert cache.best(ADAPTED, [1]) == (None, 0)
    assert (cache.bytes, cache.admits(10), cache.admits(11)) == (0, True, False)


def test_clear_drops_everything() -> None:
    cache = StateCache(1)
    cache.put(saved(ADAPTED, [1], state("state")))
    cache.clear()
    assert (cache.best(ADAPTED, [1]), cache.bytes) == ((None, 0), 0)


ACTIVATED = key("base", {}, {"a": 1.0}, 3)


def test_before_an_activation_a_state_is_that_of_the_base() -> None:
    base, tokens = key("base", {}), [1, 2, 3, 4, 5]
    assert reusable((base, tokens), (ACTIVATED, tokens)) == 3
    assert reusable((ACTIVATED, tokens), (base, tokens)) == 3
    assert reusable((ACTIVATED, tokens), (base, [1, 2, 6])) == 2
    assert reusable((ACTIVATED, tokens), (ACTIVATED, [*tokens, 6])) == 5
    assert reusable((ACTIVATED, tokens), (key("base", {}, {"a": 1.0}, 2), tokens)) == 2
    assert reusable((ACTIVATED, tokens), (ADAPTED, tokens)) == 0
    assert reusable((ACTIVATED, tokens), (key("other", {}), tokens)) == 0


def test_a_state_serves_every_key_as_far_as_it_is_the_same() -> None:
    cache = StateCache(1)
    cache.put(saved(key("base", {}), [1, 2], state("base")))
    cache.put(saved(ACTIVATED, [1, 2, 3, 4], state("activated")))
    assert [cache.best(one, [1, 2, 3, 4, 5])[1] for one in (ACTIVATED, key("base", {}), ADAPTED)] == [4, 3, 0]


def test_the_place_of_an_activation_makes_no_other_set_of_adapters() -> None:
    cache = StateCache(1)
    cache.put(saved(ACTIVATED, [1, 2, 3, 4], state("first")))
    cache.put(saved(key("base", {}, {"a": 1.0}, 2), [1, 2, 4], state("second")))
    assert cache.bytes == len(b"second")


CARRIED = key_of("base", [(0, {"a": 1.0}), (3, {"b": 1.0}), (5, {})])


def test_a_state_is_reused_up_to_where_other_adapters_made_it() -> None:
    tokens = list(range(8))
    assert reusable((CARRIED, tokens), (CARRIED, tokens)) == 8
    assert reusable((CARRIED, tokens), (ADAPTED, tokens)) == 3
    assert reusable((CARRIED, tokens), (key("base", {"a": 1.0}, {"b": 1.0}, 3), tokens)) == 5
    assert reusable((CARRIED, tokens), (key("base", {"a": 1.0}, {"b": 1.0}, 4), tokens)) == 3
    assert reusable((CARRIED, tokens), (key("base", {"b": 1.0}), tokens)) == 0
    assert (CARRIED.until(5), CARRIED.until(3)) == (key("base", {"a": 1.0}, {"b": 1.0}, 3), ADAPTED)


def test_a_span_that_changes_nothing_or_has_no_tokens_is_none() -> None:
    assert key_of("base", [(0, {"a": 1}), (0, {"b": 1}), (4, {"b": 1.0, "c": 0})]) == key("base", {"b": 1})


def test_an_owner_sees_its_own_states_and_fixed_prompts_alone() -> None:
    cache = StateCache(1)
    cache.put(saved(ADAPTED, [1, 2, 3], state("mine")), "one")
    assert cache.best(ADAPTED, [1, 2, 3, 4], "two") == (None, 0)
    assert cache.best(ADAPTED, [1, 2, 3, 4])[1] == 0
    cache.put(saved(ADAPTED, [1, 2], state("prompt")), PROMPTS)
    assert [cache.best(ADAPTED, [1, 2, 3, 4], owner)[1] for owner in ("one", "two", "")] == [3, 2, 2]
    assert cache.prompt(ADAPTED, [1, 2]) == state("prompt")
    assert cache.prompt(ADAPTED, [1, 2, 3]) is cache.prompt(key("base", {}), [1, 2]) is None
    cache.drop_states("one")
    assert (cache.best(ADAPTED, [1, 2, 3], "one")[1], cache.last("one", "base")) == (2, None)


def test_states_of_calls_are_evicted_before_those_of_prompts_and_sessions() -> None:
    cache = StateCache(30e-6)
    cache.put(saved(ADAPTED, [1], size(10)), PROMPTS)
    cache.put(saved(ADAPTED, [1, 2], size(10)), "session")
    cache.put(saved(ADAPTED, [1, 2, 3], size(10)))
    cache.put(saved(key("base", {}), [1], size(10)), "session")
    assert cache.best(ADAPTED, [1, 2, 3])[1] == 1
    assert cache.best(ADAPTED, [1, 2, 3], "session")[1] == 2
    # A call's own leaves no room to itself.
    cache.put(saved(key("base", {"b": 1}), [1], size(10)))
    assert (cache.bytes, cache.last("", "base")) == (30, None)


def test_states_of_other_owners_are_reused_up_to_a_common_batch_boundary() -> None:
    tokens = list(range(1, 9))
    for owner in (CALLS, PROMPTS, "session"):
        cache = StateCache(1)
        cache.put(saved(ADAPTED, tokens, state("state"), [3, 5]), owner)
        places = ([3, 5, 8], [3, 6], [5], [3], [])
        known = [cache.best(ADAPTED, [*tokens, 9], owner, at)[1] for at in places]
        assert known == ([8] * 5 if owner == "session" else [5, 3, 0, 3, 0])
        assert cache.best(ADAPTED, [*tokens[:4], 9], owner, [3, 5])[1] == (4 if owner == "session" else 3)
        assert cache.best(ADAPTED, [*tokens, 9], owner)[1] == 8
        # The last token is computed after what is reused, which ends at a boundary too.
        assert cache.best(ADAPTED, tokens[:5], owner, [3, 5])[1] == (4 if owner == "session" else 3)

from __future__ import annotations

from edgetune_runtime.cache import StateCache, common_prefix, key_of, reusable

ADAPTED = key_of("base", {"a": 1.0})


def test_a_key_ignores_order_and_adapters_of_scale_zero() -> None:
    assert key_of("base", {"a": 1, "b": 0.5, "c": 0}) == key_of("base", {"b": 0.5, "a": 1.0})


def test_a_key_tells_bases_adapters_and_scales_apart() -> None:
    keys = {
        key_of("base", {}),
        key_of("other", {}),
        key_of("base", {"a": 1}),
        key_of("base", {"a": 0.5}),
        key_of("base", {"b": 1}),
        key_of("base", {"a": 1, "b": 1}),
    }
    assert len(keys) == 6


def test_common_prefix_counts_equal_tokens_from_the_start() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


def test_the_last_state_of_a_key_takes_the_place_of_the_one_before() -> None:
    cache = StateCache(1)
    cache.put(ADAPTED, [1], b"old")
    cache.put(ADAPTED, [1, 2], b"newer")
    saved, known = cache.best(ADAPTED, [1, 2, 3])
    assert saved is not None
    assert known == 2
    assert (saved.tokens, saved.state, cache.bytes) == ((1, 2), b"newer", 5)


def test_the_longest_unused_state_goes_first_when_the_budget_is_spent() -> None:
    cache = StateCache(30e-6)
    keys = [key_of("base", {"a": scale}) for scale in (1, 2, 3)]
    cache.put(keys[0], [1], bytes(15))
    cache.put(keys[1], [1], bytes(15))
    cache.best(keys[0], [1])
    cache.put(keys[2], [1], bytes(15))
    assert [cache.best(key, [1])[1] == 1 for key in keys] == [True, False, True]
    assert cache.bytes == 30


def test_a_state_larger_than_the_budget_is_not_kept() -> None:
    cache = StateCache(10e-6)
    cache.put(ADAPTED, [1], bytes(11))
    assert cache.best(ADAPTED, [1]) == (None, 0)
    assert (cache.bytes, cache.admits(10), cache.admits(11)) == (0, True, False)


def test_clear_drops_everything() -> None:
    cache = StateCache(1)
    cache.put(ADAPTED, [1], b"state")
    cache.clear()
    assert (cache.best(ADAPTED, [1]), cache.bytes) == ((None, 0), 0)


ACTIVATED = key_of("base", {}, {"a": 1.0}, 3)


def test_before_an_activation_a_state_is_that_of_the_base() -> None:
    base, tokens = key_of("base", {}), [1, 2, 3, 4, 5]
    assert reusable((base, tokens), (ACTIVATED, tokens)) == 3
    assert reusable((ACTIVATED, tokens), (base, tokens)) == 3
    assert reusable((ACTIVATED, tokens), (base, [1, 2, 6])) == 2
    assert reusable((ACTIVATED, tokens), (ACTIVATED, [*tokens, 6])) == 5
    assert reusable((ACTIVATED, tokens), (key_of("base", {}, {"a": 1.0}, 2), tokens)) == 2
    assert reusable((ACTIVATED, tokens), (ADAPTED, tokens)) == 0
    assert reusable((ACTIVATED, tokens), (key_of("other", {}), tokens)) == 0


def test_a_state_serves_every_key_as_far_as_it_is_the_same() -> None:
    cache = StateCache(1)
    cache.put(key_of("base", {}), [1, 2], b"base")
    cache.put(ACTIVATED, [1, 2, 3, 4], b"activated")
    assert [cache.best(key, [1, 2, 3, 4, 5])[1] for key in (ACTIVATED, key_of("base", {}), ADAPTED)] == [4, 3, 0]


def test_the_place_of_an_activation_makes_no_other_set_of_adapters() -> None:
    cache = StateCache(1)
    cache.put(ACTIVATED, [1, 2, 3, 4], b"first")
    cache.put(key_of("base", {}, {"a": 1.0}, 2), [1, 2, 4], b"second")
    assert cache.bytes == len(b"second")

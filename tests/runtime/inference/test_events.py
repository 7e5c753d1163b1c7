from __future__ import annotations

import logging
from pathlib import Path

import pytest
from edgetune_runtime import Event, Runtime, UsageError
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.cache import name_of

LONG = "turn on the light " * 12


def events_of(events: list[Event], kind: str) -> list[str]:
    return [event.name for event in events if event.kind == kind]


def test_an_app_gets_events_of_loading_and_of_each_switch(bundle: Path) -> None:
    events: list[Event] = []
    with Runtime.open(bundle, disk_mb=0, contexts=1, on_event=events.append) as runtime:
        name = runtime.manifest.name
        first, second = runtime.adapters[:2]
        scales = {name: entry.scale for name, entry in runtime.manifest.adapters.items()}
        for adapter in (first, first, second, None):
            runtime.generate("turn on the light", adapter=adapter, max_tokens=2)
        runtime.generate("turn on the light", adapter={first: 0.5}, max_tokens=2)
    assert events_of(events, "loaded") == [name, first, second]
    names = [name_of({name: scales[name]}) for name in (first, second)]
    assert events_of(events, "switched") == [*names, "base", f"{first}=0.5"]
    assert all(0 < event.seconds < 10 for event in events)


def test_an_app_gets_events_of_states_that_are_warmed_and_evicted(bundle: Path) -> None:
    events: list[Event] = []
    with Runtime.open(bundle, disk_mb=0, contexts=1, on_event=events.append) as runtime:
        with pytest.raises(UsageError, match="adapters is 'command'; give a list of them"):
            runtime.warm("command")
        tokens = runtime.warm()
        warmed = {event.name.partition("=")[0]: event.tokens for event in events if event.kind == "warmed"}
        assert warmed == tokens
        assert not events_of(events, "evicted")
        count = runtime.generate(LONG, max_tokens=2).timings.prompt_tokens
        size = count * loaded_bundle(runtime).pool(None)[0].first.shared.kv_bytes_per_token / 1e6
    events.clear()
    # Room for one state only.
    options = {"disk_mb": 0, "contexts": 1, "exact": False, "cache_mb": 1.7 * size}
    with Runtime.open(bundle, on_event=events.append, **options) as runtime:
        plain = next(name for name, entry in runtime.manifest.adapters.items() if entry.system is None)
        for adapter in (plain, None, plain):
            runtime.generate(LONG, adapter=adapter, max_tokens=2)
    evicted = [event for event in events if event.kind == "evicted"]
    assert [event.name.partition("=")[0] for event in evicted] == [plain]
    assert all(event.bytes > 0 and event.tokens > 0 for event in evicted)


def test_a_callback_that_fails_ends_no_answer(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError(event.kind)

    with caplog.at_level(logging.ERROR, "edgetune_runtime"), Runtime.open(bundle, disk_mb=0, on_event=fail) as runtime:
        assert runtime.generate("play", max_tokens=2).tokens == 2
    assert "on_event failed for the event switched" in caplog.text

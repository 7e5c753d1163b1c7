"""An adapter with labels answers calls of `generate` with one of them, as `classify` does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Classification, Runtime, Scope
from edgetune_runtime.inference.classification import LabelChoice
from runtime.bundles import change_manifest
from runtime.conftest import LABELS

PROMPT = "set heat to warm"


@pytest.fixture(scope="module")
def opened(sure_bundle: Path, engine: str) -> Iterator[Runtime]:
    with Runtime.open(sure_bundle, engine=engine, disk_mb=0) as runtime:
        yield runtime


def test_an_answer_of_an_adapter_with_labels_is_what_classify_finds(opened: Runtime) -> None:
    found = opened.classify(PROMPT, adapter="tone")
    for options in ({}, {"temperature": 2.0, "seed": 3}, {"repeat_penalty": 1.5}, {"logprobs": 2}):
        stream = opened.stream(PROMPT, adapter="tone", **options)
        assert "".join(stream) == found.label
        answer = stream.read()
        assert (answer.text, answer.stop_reason, answer.kind) == (found.label, "end", "label")
        assert answer.confidence == pytest.approx(found.confidence, rel=1e-4)
        assert answer.log_odds == pytest.approx(found.log_odds, rel=1e-4)
    assert opened.generate(PROMPT, adapter="tone", unconstrained=True, max_tokens=9).text not in LABELS


def test_the_log_probabilities_of_a_label_are_those_of_its_tokens(opened: Runtime) -> None:
    answer = opened.generate(PROMPT, adapter="tone", logprobs=1)
    one = opened.generate(PROMPT, adapter="tone", logprobs=1, choices=[answer.text])
    assert answer.logprobs is not None
    assert one.logprobs is not None
    assert [each.token for each in answer.logprobs] == [each.token for each in one.logprobs]
    for each, expected in zip(answer.logprobs, one.logprobs, strict=True):
        assert each.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert each.top[0].token == expected.top[0].token


def test_a_label_that_is_cut_off_has_no_confidence(opened: Runtime) -> None:
    label = opened.classify(PROMPT, adapter="tone").label
    cut = opened.generate(PROMPT, adapter="tone", max_tokens=1)
    stopped = opened.generate(PROMPT, adapter="tone", stop=label[-1])
    assert label.startswith(cut.text)
    assert (cut.text != label, cut.stop_reason, cut.confidence) == (True, "length", None)
    assert (stopped.stop_reason, stopped.kind, stopped.confidence) == ("stop", None, None)
    tokens = opened.generate(PROMPT, adapter="tone").tokens
    whole = opened.generate(PROMPT, adapter="tone", max_tokens=tokens)
    assert (whole.text, whole.stop_reason, whole.confidence is not None) == (label, "end", True)


def test_a_label_that_was_found_is_whole_when_the_time_is_up(opened: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    label, choose, cancel = opened.classify(PROMPT, adapter="tone").label, LabelChoice.of, threading.Event()

    def chosen(*args: Any) -> Classification:  # noqa: ANN401 - those of LabelChoice.of
        found = choose(*args)
        cancel.set()
        return found

    monkeypatch.setattr(LabelChoice, "of", chosen)
    answer = opened.generate(PROMPT, adapter="tone", cancel=cancel)
    assert (answer.text, answer.stop_reason) == (label, "end")


def test_a_session_goes_on_after_a_label(opened: Runtime) -> None:
    with opened.session("tone") as session:
        label = session.send(PROMPT).text
        again = session.send("play music")
    history = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": label}]
    messages = [*history, {"role": "user", "content": "play music"}]
    assert again.text == opened.classify(messages, adapter="tone").label
    assert again.timings.reused_tokens > 0


def test_a_chat_knows_the_threshold_for_texts_out_of_scope(sure_home: Path, engine: str) -> None:
    scope = asdict(Scope(LABELS[-1], 99.0, 0.05, 0.8))

    def change(raw: dict[str, Any]) -> None:
        curves = raw["adapters"]["tone"]["confidence"][engine]
        curves["nothing"] = {**curves["label"], "offset": 1.0}
        raw["adapters"]["tone"]["scope"] = {engine: scope}

    change_manifest(sure_home, change)
    with Runtime.open(sure_home, engine=engine, disk_mb=0) as runtime:
        found, answer = runtime.classify(PROMPT, adapter="tone"), runtime.generate(PROMPT, adapter="tone")
        assert (found.is_out_of_scope, found.label) == (True, LABELS[-1])
        assert (answer.text, answer.kind, answer.confidence) == (
            found.label,
            "nothing",
            pytest.approx(found.confidence),
        )
        # With another scale the threshold says nothing.
        assert runtime.generate(PROMPT, adapter={"tone": 0.1}).kind == "label"

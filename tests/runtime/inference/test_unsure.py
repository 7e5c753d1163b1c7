from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UnsureError, UsageError
from edgetune_runtime.bundle import CLASSIFY, GENERATE
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from edgetune_runtime.inference.call import Call
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.options import AnswerForm
from edgetune_runtime.limits import CallLimits
from edgetune_runtime.tools.definitions import tool_set
from runtime.bundles import add_router, change_manifest
from runtime.serving.waiting import is_waiting

PROMPT = "set heat to warm"
SURE, UNSURE = 1e-9, 1 - 1e-9
QUESTION = "Which room do you mean?"


@pytest.fixture(scope="module")
def opened(sure_bundle: Path) -> Iterator[Runtime]:
    with Runtime.open(sure_bundle, disk_mb=0) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def ends(opened: Runtime) -> dict[str, Any]:
    """Options with which the answer of `command` ends, of a model that would go on: its first words stop it."""
    text = opened.generate(PROMPT, adapter="command", max_tokens=8).text
    return {"stop": text[-2:], "max_tokens": 24}


def test_an_unsure_answer_is_marked(opened: Runtime, ends: dict[str, Any]) -> None:
    plain = opened.generate(PROMPT, adapter="command", **ends)
    for min_confidence, is_unsure in ((SURE, False), (UNSURE, True)):
        answer = opened.generate(PROMPT, adapter="command", min_confidence=min_confidence, **ends)
        assert (answer.text, answer.is_unsure, answer.instead) == (plain.text, is_unsure, None)
    stream = opened.stream(PROMPT, adapter="command", min_confidence=UNSURE, **ends)
    assert "".join(stream) == plain.text
    assert stream.answer is not None
    assert stream.answer.is_unsure


def test_a_confidence_that_is_not_known_is_unsure(opened: Runtime) -> None:
    cut = opened.generate(PROMPT, adapter="command", max_tokens=2, min_confidence=SURE)
    assert (cut.stop_reason, cut.confidence, cut.is_unsure) == ("length", None, True)
    asked = opened.generate(PROMPT, adapter="command", max_tokens=2, min_confidence=SURE, ask=QUESTION)
    assert (asked.text, asked.is_cut_off, asked.instead) == (QUESTION, False, "ask")


def test_a_question_comes_back_in_its_place(opened: Runtime, ends: dict[str, Any]) -> None:
    own = opened.generate(PROMPT, adapter="command", **ends)
    stream = opened.stream(PROMPT, adapter="command", min_confidence=UNSURE, ask=QUESTION, **ends)
    assert list(stream) == [QUESTION]
    answer = stream.answer
    assert answer is not None
    assert (answer.text, answer.content, answer.parsed) == (QUESTION, QUESTION, QUESTION)
    assert (answer.kind, answer.is_unsure, answer.instead) == ("question", True, "ask")
    with loaded_bundle(opened).base.tokenizer() as tokenizer:
        assert answer.tokens == len(tokenizer.tokenize(QUESTION, continues=True)) != own.tokens
    assert answer.confidence == own.confidence
    assert answer.replaced is not None
    assert (answer.replaced.text, answer.replaced.tokens) == (own.text, own.tokens)
    sure = opened.generate(PROMPT, adapter="command", min_confidence=SURE, ask=QUESTION, **ends)
    assert (sure.text, sure.is_unsure) == (own.text, False)


@pytest.mark.parametrize("instead", ["base", "tone", "whole"])
def test_the_base_or_another_adapter_answers(instead: str, opened: Runtime, ends: dict[str, Any]) -> None:
    own = opened.generate(PROMPT, adapter="command", **ends)
    other = opened.generate(PROMPT, adapter=None if instead == "base" else instead, **ends)
    answer = opened.generate(PROMPT, adapter="command", min_confidence=UNSURE, unsure=instead, **ends)
    assert (answer.text, answer.tokens, answer.instead) == (other.text, other.tokens, instead)
    assert (answer.confidence, answer.is_unsure) == (own.confidence, True)
    sure = opened.generate(PROMPT, adapter="command", min_confidence=SURE, unsure=instead, **ends)
    assert (sure.text, sure.instead) == (own.text, None)


def test_an_unsure_answer_can_be_an_error(opened: Runtime, ends: dict[str, Any]) -> None:
    with pytest.raises(UnsureError, match=r"the confidence of the answer is 0\.\d\d, and 1 is asked for"):
        opened.generate(PROMPT, adapter="command", min_confidence=1, unsure="error", **ends)
    assert opened.generate(PROMPT, adapter="command", min_confidence=SURE, unsure="error", **ends).text


def test_nothing_answers_in_place_of_one_that_had_to_stop(opened: Runtime) -> None:
    begin = time.monotonic()
    options: dict[str, Any] = {"max_tokens": 200, "deadline_s": 1e-6}
    answer = opened.generate(PROMPT, adapter="command", min_confidence=UNSURE, unsure="base", **options)
    assert (answer.stop_reason, answer.instead, answer.is_unsure) == ("deadline", None, True)
    assert time.monotonic() - begin < 5
    assert not opened.generate(PROMPT, adapter="command", **options).is_unsure


@pytest.mark.parametrize(("reason", "stop_reason"), [("deadline", "stop"), ("cancelled", "cancelled")])
def test_one_that_has_to_stop_before_it_says_anything_leaves_the_marked_answer(
    reason: str, stop_reason: str, opened: Runtime, ends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = opened.generate(PROMPT, adapter="command", **ends)
    loaded, calls = loaded_bundle(opened), list[Call]()
    prepare = loaded.call

    def counting(*arguments: Any, **options: Any) -> Call:  # noqa: ANN401 - those of `call`
        calls.append(prepare(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(loaded, "call", counting)
    # From the call of the base on.
    monkeypatch.setattr(CallLimits, "reason", lambda _: reason if len(calls) > 1 else "")
    stream = opened.stream(PROMPT, adapter="command", min_confidence=UNSURE, unsure="base", **ends)
    assert "".join(stream) == own.text
    answer = stream.answer
    assert answer is not None
    assert (answer.text, answer.stop_reason, answer.is_unsure, answer.instead) == (own.text, stop_reason, True, None)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 1.5}, "min_confidence is 1.5; give a number from 0 to 1"),
        ({"min_confidence": "high"}, "min_confidence is 'high'"),
        ({"min_confidence": True}, "min_confidence is True"),
        ({"min_confidence": 0.8, "adapter": None}, "min_confidence is 0.8, but these answers have no confidence"),
        ({"min_confidence": 0.8, "choices": ["on", "off"]}, "these answers have no confidence; use one adapter"),
        ({"min_confidence": 0.8, "adapter": {"command": 0.3}}, "these answers have no confidence"),
        ({"min_confidence": 0.8, "unsure": "bass"}, "unsure is 'bass'; did you mean 'base'"),
        ({"min_confidence": 0.8, "unsure": "defer"}, "there is no address to defer to; open the bundle with defer_to"),
        ({"min_confidence": 0.8, "unsure": "ask"}, "there is no question; give its text as ask"),
        ({"min_confidence": 0.8, "unsure": "base", "ask": "what?"}, "unsure is 'base', and ask is given too"),
        ({"min_confidence": 0.8, "ask": ""}, "ask is ''; give the text of a question"),
        ({"unsure": 3}, "unsure is 3"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, opened: Runtime) -> None:
    with pytest.raises(UsageError, match=message):
        opened.generate(PROMPT, **{"adapter": "command", **options})


def add_rule(bundle: Path, **rule: Any) -> None:  # noqa: ANN401 - of a manifest
    """Give `command` and `tone` a rule."""

    def change(raw: dict[str, Any]) -> None:
        for name in ("command", "tone"):
            raw["adapters"][name]["unsure"] = rule

    change_manifest(bundle, change)


def test_the_rule_of_the_bundle_applies_where_a_call_has_none(sure_home: Path, ends: dict[str, Any]) -> None:
    add_rule(sure_home, min_confidence=UNSURE, then="ask", question=QUESTION)
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        assert runtime.generate(PROMPT, adapter="command", **ends).text == QUESTION
        assert runtime.generate(PROMPT, adapter="command", unsure="ask", **ends).text == QUESTION
        other = runtime.generate(PROMPT, adapter="command", unsure="tone", **ends)
        assert (other.instead, other.is_unsure) == ("tone", True)
        assert not runtime.generate(PROMPT, adapter="command", min_confidence=SURE, **ends).is_unsure
        stopped = runtime.generate(PROMPT, adapter="command", deadline_s=1e-6)
        assert (stopped.text, stopped.stop_reason, stopped.is_unsure) == ("", "deadline", True)
        # Neither has a confidence that the rule could be about.
        assert not runtime.generate(PROMPT, **ends).is_unsure
        assert not runtime.generate(PROMPT, adapter="command", choices=["on", "off"]).is_unsure
        assert runtime.classify(PROMPT, adapter="tone").is_unsure
        assert not runtime.classify(PROMPT, ["red", "green"], adapter="tone").is_unsure


def test_a_rule_to_defer_marks_where_there_is_no_address(sure_home: Path, ends: dict[str, Any]) -> None:
    add_rule(sure_home, min_confidence=UNSURE, then="defer")
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        answer = runtime.generate(PROMPT, adapter="command", **ends)
        assert (answer.is_unsure, answer.instead) == (True, None)


def test_a_rule_whose_adapter_was_removed_marks_with_a_warning(
    sure_home: Path, ends: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    add_rule(sure_home, min_confidence=UNSURE, then="tone")
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        runtime.remove_adapter("tone")
        pieces = list(runtime.stream(PROMPT, adapter="command", **ends))
        answer = runtime.generate(PROMPT, adapter="command", **ends)
    assert (answer.is_unsure, answer.instead, answer.text) == (True, None, "".join(pieces))
    assert "kept an unsure answer: no adapter 'tone'" in caplog.text


@pytest.mark.parametrize("options", [{}, {"unsure": "tone"}])
def test_an_adapter_that_is_being_replaced_is_waited_for(
    options: dict[str, Any], sure_home: Path, ends: dict[str, Any]
) -> None:
    add_rule(sure_home, min_confidence=UNSURE, then="tone")
    with Runtime.open(sure_home, disk_mb=0) as runtime, ThreadPoolExecutor(1) as threads:
        loaded, new = loaded_bundle(runtime), chosen_adapter(runtime.manifest, sure_home, "tone")
        with loaded.replaced.replacing("tone"):
            loaded.drop("tone")
            answering = threads.submit(runtime.generate, PROMPT, adapter="command", **options, **ends)
            assert is_waiting(answering)
            loaded.add(new)
        assert answering.result(timeout=60).instead == "tone"


def test_one_that_cannot_answer_in_its_place_leaves_the_marked_answer(
    sure_home: Path, ends: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    change_manifest(sure_home, lambda raw: raw["adapters"]["tone"].update(system="long " * 2000))
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        own = runtime.generate(PROMPT, adapter="command", **ends)
        answer = runtime.generate(PROMPT, adapter="command", min_confidence=UNSURE, unsure="tone", **ends)
    assert (answer.text, answer.is_unsure, answer.instead) == (own.text, True, None)
    assert "kept an unsure answer: the prompt has" in caplog.text


def test_only_tools_that_the_model_may_leave_in_place_of_no_constraint_have_a_confidence(
    sure_bundle: Path, sure_home: Path
) -> None:
    output = {"choices": ["on", "off"]}
    change_manifest(sure_home, lambda raw: raw["adapters"]["command"].update(output=output))
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}]
    for path, choices in ((sure_bundle, {"auto"}), (sure_home, {*()})):
        with Runtime.open(path, disk_mb=0, context_length=512) as runtime:
            for choice in ("auto", "none", "required", "lamp"):
                form = AnswerForm(tools=tool_set(tools, choice))
                call = loaded_bundle(runtime).call(PROMPT, "command", form=form)
                assert bool(call.curves) == (choice in choices)


def test_a_label_is_marked(opened: Runtime) -> None:
    for min_confidence, is_unsure in ((SURE, False), (UNSURE, True)):
        found = opened.classify(PROMPT, adapter="tone", min_confidence=min_confidence)
        assert found.is_unsure is is_unsure
    with pytest.raises(UsageError, match="have no confidence"):
        opened.classify(PROMPT, ["red", "green"], adapter="tone", min_confidence=0.5)


@pytest.mark.parametrize("rule", [{"ask": QUESTION}, {"unsure": "tone"}, {"unsure": "mark"}])
def test_a_session_goes_on_with_what_answered(rule: dict[str, Any], opened: Runtime, ends: dict[str, Any]) -> None:
    with opened.session("command") as session:
        answer = session.send(PROMPT, min_confidence=UNSURE, **rule, **ends)
        assert answer.is_unsure
        assert [message["content"] for message in session.history] == [PROMPT, answer.text]
        again = session.send("play", max_tokens=8)
    history = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer.text}]
    fresh = opened.generate([*history, {"role": "user", "content": "play"}], adapter="command", max_tokens=8)
    assert again.text == fresh.text


def test_a_prompt_of_none_of_the_tasks_needs_no_confidence(sure_home: Path, ends: dict[str, Any]) -> None:
    add_router(sure_home, {GENERATE: {"command": "lamp", "tone": "music"}})
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        assert not runtime.generate("who is there", adapter="auto", min_confidence=0.5, **ends).is_unsure
        assert runtime.generate("the lamp", adapter="auto", min_confidence=UNSURE, **ends).is_unsure
        own = runtime.generate("the lamp", adapter="auto", min_confidence=UNSURE, unsure="command", **ends)
        assert (own.is_unsure, own.instead) == (True, None)
        # The other adapter may have a min_confidence of its own.
        assert not runtime.generate("the lamp", adapter="auto", unsure="base", **ends).is_unsure


def test_a_routed_answer_without_a_confidence_is_unsure(sure_home: Path) -> None:
    words = {"command": "lamp", "tone": "music"}
    add_router(sure_home, {GENERATE: words, CLASSIFY: words})
    change_manifest(sure_home, lambda raw: raw["adapters"]["tone"].pop("confidence"))
    auto: dict[str, Any] = {"adapter": "auto", "min_confidence": SURE}
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        answer = runtime.generate("music", max_tokens=4, **auto)
        assert (answer.confidence, answer.is_unsure, answer.instead) == (None, True, None)
        assert runtime.generate("music", max_tokens=4, ask=QUESTION, **auto).text == QUESTION
        found = runtime.classify("music", **auto)
        assert (found.confidence, found.is_unsure) == (None, True)
        with pytest.raises(UsageError, match="these answers have no confidence"):
            runtime.generate("music", adapter="tone", min_confidence=SURE)


@pytest.mark.parametrize("prompt", ["the lamp", "who is there"])
def test_a_wrong_min_confidence_is_refused_for_any_prompt(prompt: str, sure_home: Path) -> None:
    words = {"command": "lamp", "tone": "music"}
    add_router(sure_home, {GENERATE: words, CLASSIFY: words})
    wrong: dict[str, Any] = {"adapter": "auto", "min_confidence": 7}
    with Runtime.open(sure_home, disk_mb=0) as runtime:
        with pytest.raises(UsageError, match="min_confidence is 7; give a number from 0 to 1"):
            runtime.generate(prompt, **wrong)
        with pytest.raises(UsageError, match="min_confidence is 7; give a number from 0 to 1"):
            runtime.classify(prompt, ["red", "green"], **wrong)

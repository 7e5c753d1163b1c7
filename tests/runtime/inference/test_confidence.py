from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime import Answer, Runtime, VerificationError
from edgetune_runtime.bundle import ConfidenceCurve, Scope, read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.decoding.output import spec_of
from edgetune_runtime.inference.classification import LabelChoice
from edgetune_runtime.inference.confidence import LABEL, NOTHING, kind_of, log_chance, log_odds
from edgetune_runtime.inference.label_search import LabelScores
from edgetune_runtime.inference.similarity import Similarities
from runtime.bundles import change_manifest
from runtime.conftest import LABEL_CURVE, VALUE_CURVE

PROMPT = "set heat to warm"
ROOMS = [f"set heat to warm in the {room} and play" for room in ("hall", "kitchen")]
SCHEMA = {"type": "object", "properties": {"room": {"enum": ["hall", "kitchen"]}}, "required": ["room"]}


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def opened(request: pytest.FixtureRequest, sure_bundle: Path) -> Iterator[Runtime]:
    with Runtime.open(sure_bundle, engine=request.param, disk_mb=0) as runtime:
        yield runtime


def logistic(curve: ConfidenceCurve, odds: float | None) -> float:
    assert curve.slope is not None
    assert odds is not None
    right = curve.rows * curve.right
    return min((right + 1) / (right + 2), 1 / (1 + math.exp(-curve.slope * odds - curve.offset)))


def ended(runtime: Runtime, **options: Any) -> Answer:  # noqa: ANN401 - those of `generate`
    """An answer that ends, of a model that would go on: with its first words as a stop text, or with its form."""
    options = {"adapter": "command", **options}
    if options.keys() & {"choices", "schema"}:
        return runtime.generate(PROMPT, **options)
    text = runtime.generate(PROMPT, **options, max_tokens=8).text
    return runtime.generate(PROMPT, **options, stop=text[-2:])


def test_the_log_chance_of_a_token_is_against_the_best_other_one() -> None:
    row = np.array([1.0, 3.0, 2.0, -5.0], np.float32)
    pair = math.log(math.exp(2) + math.exp(3))
    assert log_chance(row, 1) == pytest.approx(3 - pair)
    assert log_chance(row, 2) == pytest.approx(2 - pair)
    assert log_chance(row, 3) == pytest.approx(-8, abs=1e-3)
    assert log_chance(np.array([0.0, 2000.0], np.float32), 0) == pytest.approx(-2000)


def test_log_odds_are_those_of_the_mean_choice() -> None:
    half, eighth = math.log(0.5), math.log(0.125)
    assert log_odds([half]) == log_odds([half, half, None]) == pytest.approx(0)
    assert log_odds([half, None, eighth]) == pytest.approx(math.log(1 / 3))
    assert log_odds([None, None]) == 30
    assert log_odds([]) == 30
    assert log_odds([-1e-20] * 5) == 30
    assert log_odds([-2000.0]) == -30


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"service": "light.turn_on"}', "value"),
        ('{"calls": [], "note": null, "area": ""}', "nothing"),
        ("[]", "nothing"),
        (" null ", "nothing"),
        ("", "nothing"),
        ("0", "value"),
        ("false", "value"),
        ("Which room do you mean? ", "question"),
        ('"Which room?"', "question"),
        ("(**Which room?**) 😊", "question"),
        ("どの部屋ですか\uff1f", "question"),
        ("أي غرفة؟", "question"),
        ("Which room? The hall.", "value"),
        ('{"ask": "which room?"}', "value"),
        ('["which room?"]', "value"),
        ("The lamp is on.", "value"),
        ("[" * 100_000, "value"),
    ],
)
def test_the_kind_of_an_answer_is_found_in_its_text(text: str, kind: str) -> None:
    assert kind_of(text, None, calls=0, expects_calls=False) == kind


def test_choices_and_tools_have_kinds_of_their_own() -> None:
    assert kind_of("on", spec_of(choices=["on", "off"]), calls=0, expects_calls=False) == "choice"
    assert kind_of("", None, calls=1, expects_calls=True) == "value"
    assert kind_of("Nothing to do.", None, calls=0, expects_calls=True) == "nothing"
    assert kind_of("Which room?", None, calls=0, expects_calls=True) == "question"


def test_the_confidence_of_an_answer_is_what_its_curve_makes_of_the_log_odds(opened: Runtime) -> None:
    answer = ended(opened)
    assert (answer.stop_reason, answer.kind) == ("stop", "value")
    assert answer.confidence == pytest.approx(logistic(VALUE_CURVE, answer.log_odds))


def test_log_odds_are_those_of_the_two_likeliest_tokens(opened: Runtime) -> None:
    answer = ended(opened, logprobs=2)
    assert answer.logprobs is not None
    # The tokens of the stop text are no part of the text, but were chosen.
    leads = [one.top[0].logprob - one.top[1].logprob for one in answer.logprobs]
    assert answer.log_odds == pytest.approx(log_odds([-math.log1p(math.exp(-lead)) for lead in leads]), abs=0.01)
    assert ended(opened).log_odds == pytest.approx(answer.log_odds, abs=0.01)


def test_forced_tokens_do_not_count(opened: Runtime) -> None:
    # The model chooses one token, the first of the room; counted as sure, the others would raise the mean.
    answer = opened.generate(PROMPT, adapter="command", choices=ROOMS, logprobs=2)
    assert answer.logprobs is not None
    assert answer.timings.forced > 3
    leads = [one.logprob - next(top.logprob for top in one.top if top.token != one.token) for one in answer.logprobs]
    alone = [log_odds([-math.log1p(math.exp(-lead))]) for lead in leads]
    assert answer.log_odds in [pytest.approx(odds, abs=0.01) for odds in alone]
    sure = opened.generate(PROMPT, adapter="command", schema={"const": "and its text"})
    assert sure.log_odds == 30


def test_a_constraint_that_overrules_the_model_lowers_the_log_odds(opened: Runtime) -> None:
    answer = opened.generate(PROMPT, adapter="command", choices=["xylophone", "quartz"])
    assert answer.log_odds is not None
    assert answer.log_odds < 0


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": None},
        {"adapter": {"command": 0.7}},
        {"adapter": {"command": 1.0, "tone": 0.5}},
        {"adapter": "whole"},
        {"choices": ["on", "off"]},
        {"schema": SCHEMA},
        {"raw": True},
    ],
)
def test_other_answers_than_the_adapters_own_have_no_confidence(opened: Runtime, options: dict[str, Any]) -> None:
    answer = ended(opened, **options)
    # Those of an incomplete answer are not known either.
    assert answer.log_odds is not None
    assert answer.confidence is None


def test_an_incomplete_answer_has_no_confidence(opened: Runtime) -> None:
    answer = opened.generate(PROMPT, adapter="command", max_tokens=3)
    assert answer.stop_reason == "length"
    assert (answer.confidence, answer.kind, answer.log_odds) == (None, None, None)


@pytest.fixture
def formed(sure_home: Path) -> Iterator[Callable[..., Runtime]]:
    """`formed(output)`: a runtime whose adapter `command` has curves for answers of this form."""
    with ExitStack() as stack:

        def opened(**output: Any) -> Runtime:  # noqa: ANN401 - as in a manifest
            change_manifest(sure_home, lambda raw: raw["adapters"]["command"].update(output=output))
            return stack.enter_context(Runtime.open(sure_home, disk_mb=0))

        yield opened


@pytest.mark.parametrize("stop", ['"', "room", "}"])
def test_an_answer_that_a_stop_text_ends_within_its_form_has_no_confidence(
    stop: str, formed: Callable[..., Runtime]
) -> None:
    runtime = formed(schema=SCHEMA)
    assert runtime.generate(PROMPT, adapter="command").confidence is not None
    answer = runtime.generate(PROMPT, adapter="command", stop=stop, min_confidence=0)
    assert (answer.stop_reason, answer.log_odds, answer.confidence, answer.is_unsure) == ("stop", None, None, True)


def test_an_answer_that_a_stop_text_ends_where_its_form_may_end_has_a_confidence(
    formed: Callable[..., Runtime],
) -> None:
    runtime = formed(regex="(red|warm)( (red|warm)){30}|red|warm")
    answer = runtime.generate(PROMPT, adapter="command", stop=" ")
    assert (answer.stop_reason, answer.kind) == ("stop", "value")
    assert answer.confidence is not None


def test_a_stop_text_may_begin_in_an_earlier_token_than_the_last(formed: Callable[..., Runtime]) -> None:
    runtime = formed(regex="(red|warm)( (red|warm)){30}|red|warm")
    answers = [runtime.generate(PROMPT, adapter="command", stop=stop) for stop in (" r", " w")]
    # One of them is after the first word.
    (answer,) = [answer for answer in answers if answer.text in ("red", "warm")]
    assert answer.stop_reason == "stop" and answer.confidence is not None


def test_a_call_of_a_tool_that_a_stop_text_cuts_has_no_log_odds(sure_bundle: Path) -> None:
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}]
    options: dict[str, Any] = {"adapter": "command", "tools": tools, "tool_choice": "required"}
    with Runtime.open(sure_bundle, disk_mb=0, context_length=512) as runtime:
        assert runtime.generate("on", **options).log_odds is not None
        cut = runtime.generate("on", **options, stop="lamp")
    assert (cut.stop_reason, cut.tool_calls, cut.log_odds) == ("stop", (), None)


def test_a_session_has_the_confidence_too(opened: Runtime) -> None:
    text = opened.generate(PROMPT, adapter="command", max_tokens=8).text
    with opened.session("command") as session:
        answer = session.send(PROMPT, stop=text[-2:])
    assert answer.confidence == pytest.approx(logistic(VALUE_CURVE, answer.log_odds))


def test_a_label_has_the_confidence_of_its_curve(opened: Runtime) -> None:
    found = opened.classify(PROMPT, adapter="tone")
    best = found.probabilities[found.label]
    # Against any other text, of which the labels are a few.
    assert found.log_odds < math.log(best / (1 - best))
    assert found.confidence == pytest.approx(logistic(LABEL_CURVE, found.log_odds))
    label, probabilities = found
    assert (label, probabilities) == (found.label, found.probabilities)


def test_other_labels_or_scales_have_no_confidence(opened: Runtime) -> None:
    assert opened.classify(PROMPT, ["red", "green"], adapter="tone").confidence is None
    assert opened.classify(PROMPT, adapter={"tone": 1.0}).confidence is None
    assert opened.classify(PROMPT, ["red", "green"]).confidence is None


def test_the_commands_print_it(sure_bundle: Path, opened: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ended(opened)
    stop = opened.generate(PROMPT, adapter="command", max_tokens=8).text[-2:]
    common = ["--prompt", PROMPT, "--json", "--engine", opened.engine]
    main(["generate", str(sure_bundle), "--adapter", "command", "--stop", stop, *common])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["confidence"], printed["kind"]) == (pytest.approx(answer.confidence), "value")
    main(["classify", str(sure_bundle), "--adapter", "tone", *common])
    assert json.loads(capsys.readouterr().out)["confidence"] == pytest.approx(
        opened.classify(PROMPT, adapter="tone").confidence
    )


@pytest.mark.parametrize("values", [{"rows": -2, "right": 1.0}, {"rows": 1 << 40}, {"right": 1.5}])
def test_an_impossible_curve_is_refused(values: dict[str, float], sure_home: Path) -> None:
    assert read_manifest(sure_home).adapter("tone").confidence["onnx"]["label"] == LABEL_CURVE
    change_manifest(sure_home, lambda raw: raw["adapters"]["tone"]["confidence"]["gguf"]["value"].update(values))
    with pytest.raises(VerificationError, match="'tone' has an impossible confidence curve"):
        read_manifest(sure_home)


@pytest.mark.parametrize(
    ("red", "nearest", "kind", "odds"),
    [
        (0.9, {"red": 1.0}, LABEL, math.log(9)),
        # Nearer its own label's training prompts than those of the others.
        (0.9, {"red": 1.0, "warm": 0.2, "cold": 0.1}, LABEL, math.log(9) + 12.0),
        # 18 spreads nearer, of which 10 count.
        (0.9, {"red": 0.95, "warm": -0.9}, LABEL, math.log(9) + 15.0 - 1.5),
        # Far from its own label's training prompts, but near those of another one: in scope, and less sure.
        (0.9, {"red": 0.95, "warm": 1.0}, LABEL, math.log(9) - 1.5 - 0.75),
        # Its label has no training prompts.
        (0.9, {"warm": 0.95}, LABEL, math.log(9) - 1.5),
        (0.9, {"red": 0.8, "warm": 0.2}, NOTHING, 6.0 - math.log(9)),
        # The label of texts that are out of scope is the likeliest: the surer, the farther the prompt is.
        (0.1, {"red": 1.0, "warm": 0.2}, NOTHING, 0.0),
        (0.1, {"red": 0.8, "warm": 0.2}, NOTHING, 6.0),
        # An encoder compares nothing.
        (0.9, {}, LABEL, math.log(9)),
        (0.1, {}, NOTHING, math.log(9)),
    ],
)
def test_log_odds_of_a_label_say_how_near_its_training_prompts_are(
    red: float, nearest: dict[str, float], kind: str, odds: float
) -> None:
    scores = LabelScores([math.log(red), math.log(1 - red)])
    similarities = Similarities(nearest, spread=0.1) if nearest else None
    curves = {LABEL: ConfidenceCurve(20, 0.5, 0.5, 0.1), NOTHING: ConfidenceCurve(20, 0.5, 2.0, -0.2)}
    scopes = [Scope("other", -1.0, 0.0, 0.0)] if kind == NOTHING else [Scope("other", -1.0, 0.0, 0.0), None]
    for scope in scopes:
        found = LabelChoice(("red", "other"), scope=scope).likeliest(scores, similarities, curves)
        assert (found.label, found.kind) == ("red" if kind == LABEL else "other", kind)
        assert found.log_odds == pytest.approx(odds)
        assert found.confidence == pytest.approx(logistic(curves[kind], odds))

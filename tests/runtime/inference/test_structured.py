from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from edgetune_runtime import Runtime, UsageError, VerificationError, cli
from pydantic import BaseModel
from runtime.bundles import change_manifest

SCHEMA = {
    "type": "object",
    "properties": {
        "service": {"enum": ["turn_on", "turn_off", "set_brightness"]},
        "entities": {"type": "array", "items": {"enum": ["light.kitchen", "light.hall"]}, "minItems": 1, "maxItems": 2},
        "brightness": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["service", "entities"],
    "additionalProperties": False,
}
HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 120}


class Command(BaseModel):
    service: Literal["turn_on", "turn_off"]


@pytest.fixture
def formed(prompted_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle whose adapter `one` has a form of its own."""
    bundle = Path(shutil.copytree(prompted_of("llama"), tmp_path / "home"))
    change_manifest(bundle, lambda raw: raw["adapters"]["one"].update(output={"schema": SCHEMA}))
    return bundle


def test_a_schema_holds_at_any_temperature(opened: Runtime) -> None:
    for seed in range(10):
        answer = opened.generate(f"light {seed}", adapter="one", schema=SCHEMA, seed=seed, **HOT)
        assert answer.stop_reason == "end"
        jsonschema.validate(answer.parsed, SCHEMA)


def test_what_the_schema_forces_takes_no_steps(opened: Runtime) -> None:
    answer = opened.generate("play", adapter="one", schema=SCHEMA, max_tokens=120)
    assert answer.timings.forced > 3
    assert answer.timings.tokens_per_step > 1.5


def test_an_answer_that_ended_before_its_first_token_does_not_parse(opened: Runtime) -> None:
    cancelled = threading.Event()
    cancelled.set()
    limits: tuple[dict[str, Any], ...] = ({"deadline_s": 1e-6}, {"cancel": cancelled})
    for limit in limits:
        for schema in (SCHEMA, Command):
            answer = opened.generate("play", adapter="one", schema=schema, **limit)
            assert (answer.text, answer.tokens) == ("", 0)
            with pytest.raises(VerificationError, match="does not parse"):
                _ = answer.parsed


def test_a_pydantic_model_gives_its_objects(opened: Runtime) -> None:
    with opened.session("one") as session:
        answer = session.send("play", schema=Command, **HOT, seed=0)
    assert answer.stop_reason == "end"
    assert isinstance(answer.parsed, Command)


def test_choices_and_patterns_and_grammars_hold(opened: Runtime) -> None:
    for seed in range(5):
        assert opened.generate("play", choices=["warm red", "warm", "green"], seed=seed, **HOT).text in {
            "warm red",
            "warm",
            "green",
        }
        assert opened.generate("play", regex="[0-9]{3}", seed=seed, **HOT).text.isdigit()
        assert opened.generate("play", grammar='start: "a" | "b" "c"', seed=seed, **HOT).text in {"a", "bc"}


@pytest.mark.parametrize("logprobs", [None, 0])
def test_an_answer_that_is_complete_at_its_last_token_is_not_cut_off(opened: Runtime, logprobs: int | None) -> None:
    for form in ({"choices": ["on", "offline"]}, {"regex": "abc|lamp on"}, {"grammar": 'start: "ab" /[0-9]/'}):
        whole = opened.generate("play", adapter="one", **form)
        answer = opened.generate("play", adapter="one", **form, max_tokens=whole.tokens, logprobs=logprobs)
        assert (answer.text, answer.stop_reason, answer.log_odds) == (whole.text, "end", whole.log_odds)
        assert opened.generate("play", adapter="one", **form, max_tokens=whole.tokens - 1).stop_reason == "length"
    # It may go on, as the model may want to.
    assert opened.generate("play", adapter="one", regex="a+", max_tokens=2).stop_reason == "length"


def test_an_answer_that_is_too_long_for_its_form_does_not_parse(opened: Runtime) -> None:
    answer = opened.generate("play", adapter="one", schema=SCHEMA, max_tokens=3)
    assert answer.stop_reason == "length"
    with pytest.raises(VerificationError, match=r"does not parse: .*; give a higher max_tokens"):
        _ = answer.parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "object"}, "regex": "a"}, "schema and regex is given"),
        ({"unconstrained": True, "choices": ["a"]}, "unconstrained and choices are both given"),
        ({"regex": "("}, "regex"),
        ({"schema": {"enum": []}}, "enum"),
    ],
)
def test_an_invalid_constraint_is_a_one_line_error_and_the_next_call_works(
    opened: Runtime, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        opened.generate("play", **options)
    assert "\n" not in str(raised.value)
    assert opened.generate("play", max_tokens=2).tokens


def test_an_adapters_constraint_applies_unless_the_call_is_unconstrained(formed: Path) -> None:
    with Runtime.open(formed, disk_mb=0) as runtime:
        held = runtime.generate("play", adapter="one", max_tokens=120)
        assert set(held.parsed) >= {"service", "entities"}
        free = runtime.generate("play", adapter="one", max_tokens=5, unconstrained=True)
        other = runtime.generate("play", adapter="one", max_tokens=5, choices=["green"])
        base = runtime.generate("play", max_tokens=5)
    assert free.output is None
    assert base.output is None
    assert other.text == "green"


def test_an_answer_has_texts_of_its_prompt_and_of_earlier_messages(formed: Path) -> None:
    text = {"type": "string", "x-from-prompt": True}
    form = {"type": "object", "properties": {"name": text}, "required": ["name"], "additionalProperties": False}
    change_manifest(formed, lambda raw: raw["adapters"]["one"].update(output={"schema": form}))
    talk = [("user", "alpha"), ("assistant", "beta"), ("user", "gamma")]
    messages = [{"role": role, "content": content} for role, content in talk]
    with Runtime.open(formed, disk_mb=0) as runtime:
        for seed in range(5):
            for options in ({}, {"raw": True}, {"schema": form}):
                answer = runtime.generate(f"play {seed}", adapter="one", seed=seed, **options, **HOT)
                assert answer.parsed["name"] in {"play", str(seed), f"play {seed}"}
        names = {runtime.generate(messages, adapter="one", seed=seed, **HOT).parsed["name"] for seed in range(20)}
    assert names == {"alpha", "beta", "gamma"}


def test_the_vocabulary_is_read_by_the_first_constrained_call_or_by_warm(formed: Path) -> None:
    for read in (lambda runtime: runtime.warm(["one"]), lambda runtime: runtime.generate("play", regex="a")):
        with Runtime.open(formed, disk_mb=0) as runtime:
            runtime.generate("play", adapter="one", max_tokens=2, unconstrained=True)
            assert not len(runtime._loaded._constraints._grammars)
            read(runtime)
            assert len(runtime._loaded._constraints._grammars)


def test_the_command_prints_what_an_answer_stands_for(
    formed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    command = ["generate", str(formed), "--prompt", "play", "--adapter", "one", "--json", "--max-tokens", "120"]
    assert cli.main([*command, "--schema", str(schema)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parsed"] == json.loads(found["text"])
    assert {"tokens_per_step", "forced", "accepted"} <= found.keys()
    assert cli.main([*command, "--schema", str(tmp_path / "none.json")]) != 0
    assert capsys.readouterr().err.count("\n") == 1

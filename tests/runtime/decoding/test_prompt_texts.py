from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.decoding.prompt_texts import texts_in, texts_of
from edgetune_runtime.errors import UsageError
from runtime.decoding.answers import random_answer
from runtime.decoding.conftest import Opened

TEXT = {"type": "string", "x-from-prompt": True}


def form(**strings: object) -> dict[str, Any]:
    return {"type": "object", "properties": strings, "required": [*strings], "additionalProperties": False}


def song() -> OutputSpec:
    kinds = [{"enum": ["song", "tune"]}, TEXT]
    return output_of(schema=form(artist=TEXT, kind={"anyOf": kinds}, mood={"type": "string"}), spacing="spaced")


def test_texts_are_words_that_stand_together_with_what_is_between_them() -> None:
    assert list(texts_in(["play  it, Sam"])) == [
        *("play", "play  it", "play  it,", "play  it, Sam"),
        *("it", "it,", "it, Sam", ",", ", Sam", "Sam"),
    ]


def test_texts_are_of_one_message_and_not_of_the_system_prompt() -> None:
    turns = [("system", "house rules"), ("user", "play"), ("assistant", "what?"), ("tool", None), ("user", "jazz")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert list(texts_in(texts_of(messages))) == ["play", "what", "what?", "?", "jazz"]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("wake me at 7am", "7"),
        ("room_2 please", "room"),
        ("play “Für Elise” now", "Für Elise"),
        ("播放周杰伦的歌", "周杰伦"),
        ("เปิดไฟห้องครัว", "ครัว"),
        ("it's Pat's", "Pat's"),
        ("line one\nline two", "one\nline"),
    ],
)
def test_numbers_marks_and_scripts_without_spaces_have_words_too(prompt: str, text: str) -> None:
    assert text in texts_in([prompt])


def test_the_more_words_a_prompt_has_the_fewer_has_a_text_and_at_last_there_are_none() -> None:
    def longest(words: int) -> int:
        return max(
            (text.count(" ") + 1 for text in texts_in([" ".join(f"{chr(97 + n % 26)}" * 2 for n in range(words))])),
            default=0,
        )

    assert [longest(words) for words in (20, 62, 100, 187, 188)] == [20, 24, 15, 8, 0]
    assert len(texts_in(["ab " * 500])) == 0
    assert not texts_in(["a" * 1501])
    assert not texts_in(["", "  "])


def test_strings_from_the_prompt_are_its_texts_alone() -> None:
    spec = song().for_prompt(["play the tune by Björk “Ó” \\ now"])

    def fits(artist: str, kind: str = "song", mood: str = "any") -> bool:
        return spec.accepts(json.dumps({"artist": artist, "kind": kind, "mood": mood}, ensure_ascii=False))

    assert fits("Björk")
    assert fits("Björk “Ó” \\", "by Björk", "not in the prompt")
    assert not fits("björk")
    assert not fits("Bjö")
    assert not fits("")
    assert not fits("Björk", "album")


def test_strings_are_any_without_a_prompt_and_for_one_that_is_too_long() -> None:
    spec, answer = song(), '{"artist": "anyone", "kind": "anything", "mood": "any"}'
    assert spec.accepts(answer)
    assert spec.for_prompt(["word " * 200]) == spec
    assert spec.for_prompt([]) == spec
    assert not spec.for_prompt(["play"]).accepts(answer)
    plain = output_of(schema=form(artist={"type": "string"}))
    assert plain.for_prompt(["play"]) is plain


def test_a_manifest_keeps_the_mark_and_other_programs_get_none() -> None:
    spec = song()
    assert OutputSpec.from_json(spec.to_json()) == spec
    assert spec.for_prompt(["play"]).digest == spec.digest
    assert "x-from-prompt" not in json.dumps(spec.schema)
    assert spec.schema == form(
        artist={"type": "string"},
        kind={"anyOf": [{"enum": ["song", "tune"]}, {"type": "string"}]},
        mood={"type": "string"},
    )


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ({**TEXT, "maxLength": 9}, "x-from-prompt has maxLength beside it in the schema; write {type: string, x-from"),
        ({"x-from-prompt": True}, "x-from-prompt is not beside type: string in the schema"),
        ({"type": "string", "x-from-prompt": "yes"}, "x-from-prompt is 'yes' in the schema; write true"),
    ],
)
def test_a_mark_that_cannot_hold_is_refused(string: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        output_of(schema=form(first=TEXT, name=string))


def test_a_property_may_have_the_name_of_the_mark() -> None:
    spec = output_of(schema=form(**{"x-from-prompt": {"type": "string"}}))
    assert spec.for_prompt(["play"]) is spec
    assert not output_of(schema=form(name={"type": "string", "x-from-prompt": False}))._reads_prompt


def test_random_answers_have_texts_of_the_prompt_in_both_engines(base: Opened) -> None:
    tokenizer, grammars = base
    random, spec = np.random.default_rng(0), song()
    prompts = ["play the tune by Björk", 'put on "Hyperballad", the 1st one', "stop"]
    for number, prompt in enumerate(prompts * 2):
        constraint = grammars.constraint(spec.for_prompt([prompt]))
        answer = json.loads(random_answer(constraint, tokenizer, random, force=number % 2 == 0))
        assert answer["artist"] in texts_in([prompt])
        assert answer["kind"] in {"song", "tune", *texts_in([prompt])}


def test_forms_with_texts_of_a_prompt_take_no_place_of_others(tiny: Opened) -> None:
    grammars = Grammars(tiny[0])
    for number in range(20):
        grammars.constraint(song().for_prompt([f"play {number}"]))
    assert not len(grammars._cheap) + len(grammars._expensive)

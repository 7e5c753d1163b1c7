from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pytest
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.decoding.prompt_texts import texts_in, texts_of
from edgetune_runtime.errors import UsageError
from pydantic import BaseModel, Field
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
        ("मेरा नाम अनीता है", "नाम अनीता"),
        ("cafe\u0301 nearby", "cafe\u0301"),
    ],
)
def test_numbers_marks_and_scripts_without_spaces_have_words_too(prompt: str, text: str) -> None:
    assert text in texts_in([prompt])


def test_vowel_signs_and_accents_are_parts_of_words() -> None:
    # Of three words there are six texts.
    assert [len(texts_in([text])) for text in ("मेरा नाम अनीता", "தமிழ் பாடல் போடு", "du cafe\u0301 noir")] == [6, 6, 6]


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
    assert spec.for_prompt(["word " * 200]) is spec
    assert spec.for_prompt([]) is spec
    assert spec.for_prompt(["play"]).for_prompt([]) is spec
    assert not spec.for_prompt(["play"]).accepts(answer)
    plain = output_of(schema=form(artist={"type": "string"}))
    assert plain.for_prompt(["play"]) is plain


def test_a_manifest_keeps_the_mark_and_other_programs_get_none() -> None:
    spec = song()
    assert OutputSpec.from_json(spec.to_json()) == spec
    assert spec.for_prompt(["play"]).digest == spec.digest
    told = {"description": "a text of the prompt, exactly as it is written there", "type": "string"}
    kinds = [{"enum": ["song", "tune"]}, told]
    assert spec.schema == form(artist=told, kind={"anyOf": kinds}, mood={"type": "string"})
    assert output_of(schema=form(name={**TEXT, "description": "a name"})).schema == form(
        name={"type": "string", "description": "a name"}
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


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (form(name={"allOf": [TEXT, {"type": "string", "pattern": "^[A-Z]"}]}), "allOf beside other limits"),
        (form(name={"anyOf": [TEXT], "pattern": "^[A-Z]"}), "anyOf beside other limits"),
        ({**form(name={"$ref": "#/$defs/n", "maxLength": 3}), "$defs": {"n": TEXT}}, r"\$ref beside other limits"),
        ({**form(name=TEXT), "anyOf": [{"required": ["name"]}]}, "anyOf beside other limits"),
        (form(name={"anyOf": [TEXT], "oneOf": [TEXT]}), "anyOf beside other limits"),
        (
            {**form(name=TEXT), "patternProperties": {"^n": {"pattern": "^[A-Z]"}}},
            "properties beside patternProperties",
        ),
        (form(part={"$id": "part", **form(name=TEXT)}), r"a part with an \$id of its own"),
    ],
)
def test_strings_that_something_else_limits_too_are_refused(schema: dict[str, Any], reason: str) -> None:
    # What such a schema costs depends on the prompt, and so does whether anything fits it.
    with pytest.raises(UsageError, match=f"x-from-prompt is in a schema that has {reason}; write"):
        output_of(schema=schema)


class Song(BaseModel):
    kind: Literal["song"]
    artist: str = Field("", description="who plays", json_schema_extra={"x-from-prompt": True})


class Film(BaseModel):
    kind: Literal["film"]
    title: str = Field(json_schema_extra={"x-from-prompt": True})


class Request(BaseModel):
    wanted: Song | Film = Field(discriminator="kind", description="what is wanted")
    other: Song | None = None


def test_a_pydantic_model_may_have_texts_of_the_prompt() -> None:
    spec = output_of(schema=Request, spacing="spaced").for_prompt(["play Abba"])
    assert spec.accepts('{"wanted": {"kind": "song", "artist": "Abba"}, "other": null}')
    assert not spec.accepts('{"wanted": {"kind": "song", "artist": "Toto"}}')
    assert not spec.accepts('{"wanted": {"kind": "film", "title": "Heat"}}')
    assert spec.parse('{"wanted": {"kind": "film", "title": "Abba"}}').wanted == Film(kind="film", title="Abba")


@pytest.mark.parametrize("definitions", [None, [1], "x", {"other": {"type": "string"}}])
def test_a_schema_may_have_definitions_of_any_kind(definitions: object) -> None:
    spec = output_of(schema={**form(name=TEXT), "$defs": definitions}, spacing="spaced").for_prompt(["play"])
    assert [spec.accepts(f'{{"name": "{name}"}}') for name in ("play", "stop")] == [True, False]


def test_data_and_names_of_properties_are_no_marks() -> None:
    data = {"type": "object", "default": {"x-from-prompt": 1}, "properties": {"x-from-prompt": True}}
    for schema in (form(**{"x-from-prompt": {"type": "string"}}), data, form(name={"enum": [TEXT]})):
        spec = output_of(schema=schema)
        assert spec.for_prompt(["play"]) is spec
    assert output_of(schema=form(name={"enum": [TEXT]})).schema == form(name={"enum": [TEXT]})
    off = output_of(schema=form(name={"type": "string", "x-from-prompt": False}))
    assert off.for_prompt(["play"]) is off


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

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.errors import UsageError, VerificationError
from pydantic import BaseModel

PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}


def required(**properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def nested(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "string"}


def chained(links: int) -> dict[str, Any]:
    links_ = {f"d{n}": required(next={"$ref": f"#/$defs/d{n + 1}"}) for n in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**links_, f"d{links}": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "nothing is given for the output; give exactly one of schema, choices, regex, grammar"),
        ({"regex": "a", "choices": ["a"]}, "choices and regex is given"),
        ({"schema": PAIR, "spacing": "wide"}, "spacing is 'wide'; choose one of: any, compact, spaced"),
        ({"regex": "a", "spacing": "compact"}, "spacing 'compact' is given for a regex; give it for a schema only"),
        ({"schema": [1]}, "schema is a list, not a JSON object; give a JSON Schema or a pydantic model class"),
        ({"schema": "{"}, "schema is not JSON: Expecting property name"),
        ({"schema": {"const": float("nan")}}, "schema is not JSON: Out of range float"),
        ({"schema": {"const": object}}, "schema is not JSON: Object of type type is not JSON serializable"),
        ({"schema": {"type": "array", "uniqueItems": True}}, r'keys: \["uniqueItems"\]; leave these keywords out'),
        ({"schema": required(a={"not": {}, "if": {}})}, r'Unimplemented keys: \["if", "not"\]'),
        ({"schema": {"type": "strng"}}, 'schema {"type": "strng"} cannot be used: Invalid type: strng'),
        ({"schema": {"format": "zip"}}, "Unknown format: zip; leave this format out, or give a pattern"),
        ({"schema": {"pattern": "^(?=a)b$"}}, "look-around, .*is not supported"),
        ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "are not supported.; write anyOf, or"),
        ({"schema": {"$ref": "#/$defs/x"}}, "Pointer '/\\$defs/x' does not exist"),
        ({"schema": required(a={"enum": []})}, "required property 'a' is unsatisfiable; change it so that some answer"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "nsatisfiable"),
        ({"schema": {"type": "string", "minLength": 5, "maxLength": 3}}, "nsatisfiable"),
        ({"schema": {"type": "array", "minItems": 5, "maxItems": 3}}, "nsatisfiable"),
        ({"schema": {"$ref": "#"}}, "requires another like itself; make the inner one optional"),
        ({"schema": required(a={"$ref": "#"})}, "requires another like itself"),
        ({"schema": nested(150)}, "recursion limit exceeded"),
        ({"schema": nested(300)}, "schema has more than 200 levels, references included; simplify it"),
        ({"schema": nested(900)}, "schema"),
        ({"schema": chained(2000)}, "schema has more than 200 levels"),
        ({"choices": []}, r"choices are \[\]; give a list of texts"),
        ({"choices": "on"}, "choices are 'on'; give a list of texts"),
        ({"choices": ["on", 1]}, "give a list of texts"),
        ({"choices": ["on", ""]}, "choice 2 of 2 is empty; leave it out"),
        ({"choices": ["on", "off", "on"]}, "choice 'on' is given twice; leave one out"),
        ({"regex": " "}, "regex is ' '; give a text that is not empty"),
        ({"regex": "(ab"}, r"regex \(ab cannot be used: unclosed group; correct the regex"),
        ({"regex": "a\udcff"}, r"regex .* cannot be used: .*surrogates not allowed; correct the regex"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"[^\s\S]"}, "no answer fits it; change it so that some answer fits"),
        ({"regex": "(" * 300 + "a" + ")" * 300}, "nested"),
        ({"grammar": "start: lamp"}, r'grammar start: lamp cannot be used: at 1\(8\): unknown name: "lamp"'),
        ({"grammar": 'root ::= "a"'}, "correct the grammar"),
        ({"grammar": "start: start"}, "no answer fits it"),
        ({"grammar": '{"grammars": []}'}, "expecting rule"),
        ({"grammar": "start: " + "(" * 9999 + '"a"' + ")" * 9999}, "too deeply nested"),
        ({"grammar": "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(5000)) + 'r5000: "a"'}, "most 500"),
        ({"grammar": "start: %json " + json.dumps(chained(1000))}, "grammar has 1001 references; give at most 200"),
    ],
)
def test_an_unusable_constraint_is_a_one_line_error(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        output_of(**given)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("spacing", "wanted", "unwanted"),
    [
        ("any", ['{"a":1}', '{"a": 1, "b": 2}', json.dumps({"a": 1, "b": 2}, indent=4)], ['{"a":  1}', ' {"a":1}']),
        ("compact", ['{"a":1,"b":2}'], ['{"a": 1}']),
        ("spaced", ['{"a": 1, "b": 2}'], ['{"a":1}', '{"a": 1,"b": 2}']),
    ],
)  # fmt: skip
def test_whitespace_is_bounded(spacing: str, wanted: list[str], unwanted: list[str]) -> None:
    spec = output_of(schema=PAIR, spacing=spacing)
    assert [text for text in wanted if not spec.accepts(text)] == []
    assert [text for text in unwanted if spec.accepts(text)] == []


@pytest.mark.parametrize(
    "value",
    ["é", "\\u00e9", "🙂", "\\ud83d\\ude42", '\\"', "\\\\", "\\n", "漢字", "\\u0007"],
)
def test_text_of_any_language_fits_a_string_as_it_is_and_escaped(value: str) -> None:
    spec = output_of(schema=required(a={"type": "string", "maxLength": 2}))
    text = f'{{"a": "{value}"}}'
    assert spec.accepts(text)
    assert spec.parse(text) == json.loads(text)


def test_objects_have_the_listed_properties_only_unless_the_schema_says_otherwise() -> None:
    other = '{"a": 1, "z": 2}'
    assert not output_of(schema=PAIR).accepts(other)
    assert not output_of(schema={"anyOf": [PAIR, {"type": "null"}]}).accepts(other)
    assert output_of(schema={**PAIR, "additionalProperties": {"type": "integer"}}).accepts(other)
    assert output_of(schema={**PAIR, "required": ["a", "z"]}).accepts(other)
    assert output_of(schema={"type": "object"}).accepts(other)
    both = {"allOf": [PAIR, {"type": "object", "properties": {"z": {"type": "integer"}}}]}
    assert output_of(schema=both).accepts(other)


def test_a_tree_that_may_end_is_no_endless_schema() -> None:
    node = required(value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#"}})
    assert output_of(schema=node).accepts('{"value": 1, "children": [{"value": 2, "children": []}]}')
    either = required(value={"anyOf": [{"$ref": "#"}, {"type": "null"}]})
    assert output_of(schema=either).accepts('{"value": {"value": null}}')


def test_answers_are_parsed_by_the_form_that_was_given() -> None:
    class Light(BaseModel):
        state: Literal["on", "off"]
        level: int = 3

    spec = output_of(schema=Light)
    assert spec.parse('{"state": "on"}') == Light(state="on")
    assert spec == output_of(schema=Light.model_json_schema())
    assert output_of(schema=json.dumps(PAIR)).parse('{"a": 1}') == {"a": 1}
    assert output_of(choices=["1"]).parse("1") == "1"
    assert output_of(regex=r"\d").parse("1") == "1"


@pytest.mark.parametrize("text", ['{"a": 1', "", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_an_answer_that_does_not_parse_is_a_one_line_error(text: str) -> None:
    with pytest.raises(VerificationError, match=r"does not parse: .*; give a higher max_tokens") as raised:
        output_of(schema=PAIR).parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"schema": PAIR},
        {"schema": PAIR, "spacing": "spaced"},
        {"choices": ["on", "café"]},
        {"regex": r"\d+"},
        {"grammar": 'start: "a"'},
    ],
)
def test_a_constraint_is_the_same_after_it_was_stored_in_a_manifest(given: dict[str, Any]) -> None:
    spec = output_of(**given)
    assert spec.to_json() == given
    again = OutputSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert (again, again.digest, again.grammar) == (spec, spec.digest, spec.grammar)


def test_digests_of_constraints_differ_and_are_stable() -> None:
    swapped = {**PAIR, "properties": dict(reversed(PAIR["properties"].items()))}
    specs = [output_of(schema=PAIR), output_of(schema=swapped), output_of(schema=PAIR, spacing="compact")]
    specs += [output_of(regex="a"), output_of(choices=["a"])]
    assert len({spec.digest for spec in specs}) == len(specs)
    assert output_of(regex="a").digest == "4526d1a2a61b7f836de713ef8dbb854cacbf184bc338eeaf6fd882a54f960933"


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"scheme": {}}, "output has no key 'scheme'; did you mean 'schema'"),
        ({"schema": 3}, "schema is a int, not a JSON object"),
        ({"regex": "a", "spacing": 3}, "spacing is 3"),
        ({"choices": {}}, "choices are {}"),
    ],
)
def test_an_invalid_constraint_in_a_manifest_is_refused(stored: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        OutputSpec.from_json(stored)

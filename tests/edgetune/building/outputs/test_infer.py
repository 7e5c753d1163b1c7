from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError

from edgetune.building.outputs.infer import infer, problem_of, rejected, unsaid_strings
from edgetune.tasks.data import TaskRow, rows_of

COMMANDS = [
    {"service": service, "room": room, **extra}
    for service in ("turn_on", "turn_off")
    for room in ("kitchen", "hall")
    for extra in ({}, {"level": 3}, {"names": ["a", "b"]}, {"level": 2.5}, {"who": None})
]


def schema_of(values: list[Any], **options: object) -> dict[str, Any]:
    spec = infer([json.dumps(value, **options) for value in values])
    assert spec is not None
    assert spec.kind == "schema"
    return dict(json.loads(spec.text))


def test_a_schema_has_the_types_keys_and_values_of_the_rows() -> None:
    found = schema_of(COMMANDS)
    assert found["properties"]["service"] == {"enum": ["turn_off", "turn_on"]}
    assert found["properties"]["level"] == {"type": "number"}
    assert found["properties"]["names"] == {"type": "array", "items": {"type": "string"}, "minItems": 1}
    assert found["properties"]["who"] == {"type": "null"}
    assert found["required"] == ["service", "room"]
    assert found["additionalProperties"] is False


def test_all_rows_fit_what_is_inferred_from_them() -> None:
    answers = [json.dumps(value) for value in COMMANDS]
    spec = infer(answers)
    assert spec is not None
    assert rejected(spec, answers) == []
    wrong = ['{"service": "turn_on"}', '{"service": "explode", "room": "hall"}', "{}", '{"service": "turn_on", "room"']
    assert rejected(spec, [*answers[:2], *wrong]) == [2, 3, 4, 5]


def test_values_that_occur_once_are_no_complete_list() -> None:
    names = [{"name": f"person {number // 6}"} for number in range(60)]
    assert "enum" in schema_of(names)["properties"]["name"]
    assert schema_of([*names, {"name": "somebody else"}])["properties"]["name"] == {"type": "string"}


def test_keys_in_changing_order_are_all_accepted() -> None:
    answers = ['{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"b": 2}']
    spec = infer(answers)
    assert spec is not None
    assert "patternProperties" in json.loads(spec.text)
    assert rejected(spec, answers) == []
    assert rejected(spec, ['{"c": 1}']) == [0]


@pytest.mark.parametrize(
    "key", ["preis_€", "कमरा", "温度℃", "x\u2013y", "a<b", r"a\b", "price ($)", "[a]{2}|^*?.+", 'q"t', "a b"]
)
def test_keys_in_changing_order_may_have_any_sign(key: str) -> None:
    answers = [json.dumps(value, ensure_ascii=False) for value in ({key: 1, "b": 2}, {"b": 2, key: 1})]
    spec = infer(answers)
    assert spec is not None
    assert rejected(spec, answers) == []
    assert rejected(spec, ['{"c": 1}', json.dumps({f"{key}_": 1})]) == [0, 1]


def test_keys_that_never_occur_together_have_the_order_of_the_rows() -> None:
    keys = [f"key{number}" for number in range(9)]
    assert list(schema_of([{key: 1, "last": 2} for key in keys])["properties"]) == [*keys, "last"]


def test_keys_in_an_order_that_three_rows_make_a_circle_of_are_all_accepted() -> None:
    answers = ['{"a": 1, "b": 2}', '{"b": 2, "x": 0, "c": 1}', '{"c": 1, "a": 2}']
    spec = infer(answers)
    assert spec is not None
    assert "patternProperties" in json.loads(spec.text)


@pytest.mark.parametrize(
    ("options", "spacing"),
    [
        ({}, "spaced"),
        ({"separators": (",", ":")}, "compact"),
        ({"indent": 2}, "any"),
        ({"ensure_ascii": False}, "spaced"),
    ],
)
def test_spacing_is_that_of_the_rows(options: dict[str, Any], spacing: str) -> None:
    spec = infer([json.dumps({"name": "é", "count": number}, **options) for number in range(3)])
    assert spec is not None
    assert spec.spacing == spacing


def test_few_texts_are_choices_and_many_are_free() -> None:
    labels = infer(["light", "cover", "light", "cover"] * 3)
    assert labels is not None
    assert (labels.kind, json.loads(labels.text)) == ("choices", ["cover", "light"])
    assert infer([f"answer {number}" for number in range(100)]) is None
    assert infer(["light", "light"]) is None
    assert infer([]) is None


@pytest.mark.parametrize("levels", [51, 300, 900])
def test_an_answer_of_more_levels_than_a_schema_can_have_is_refused(levels: int) -> None:
    def nested(levels: int) -> str:
        return '{"a": ' * levels + "1" + "}" * levels

    assert infer([nested(50)]) is not None
    with pytest.raises(UsageError, match=r"answer '{\"a\": .* has more than 50 levels of lists and objects; use fewer"):
        infer([nested(2), nested(levels)])


TEXT = {"type": "string", "x-from-prompt": True}
Said = tuple[str, str]
"""A value and its prompt."""


def rows_that(say: list[Said], key: str = "name", **options: bool) -> list[TaskRow]:
    answers = [json.dumps({key: value}, **options) for value, _ in say]
    pairs = zip(say, answers, strict=True)
    return rows_of("rows", [(f"rows:{n}", {"prompt": p, "completion": a}) for n, ((_, p), a) in enumerate(pairs)])


def inferred(rows: list[TaskRow]) -> OutputSpec:
    spec = infer([row.completion or "" for row in rows], rows)
    assert spec is not None
    return spec


def string_of(rows: list[TaskRow]) -> list[dict[str, Any]]:
    """The schemas of the name in answers."""
    schema = json.loads(inferred(rows).text)["properties"]["name"]
    return list(schema.get("anyOf", [schema]))


def played(count: int) -> list[Said]:
    return [(f"song {number}", f"play song {number} now") for number in range(count)]


def test_strings_are_from_the_prompt_if_98_of_100_that_one_row_has_are() -> None:
    wrong = [("song x", "play song y"), ("song y", "play song x")]
    assert string_of(rows_that(played(60))) == [TEXT]
    assert string_of(rows_that([*played(98), *wrong])) == [{"enum": ["song x", "song y"]}, TEXT]
    assert string_of(rows_that([*played(97), *wrong])) == [{"type": "string"}]
    assert string_of(rows_that([*played(48), *wrong[:1]])) == [{"type": "string"}]
    assert infer([row.completion or "" for row in rows_that(played(60))]) == infer(['{"name": "a"}'])


def test_few_values_and_those_that_a_prompt_lacks_are_listed_beside_its_texts() -> None:
    unsaid, songs = ("radio", "put on some music"), [name for name, _ in played(30)]
    assert string_of(rows_that([*played(30), unsaid, unsaid])) == [{"enum": sorted([*songs, "radio"])}, TEXT]
    assert string_of(rows_that([*played(50), unsaid, ("radio", "radio on")])) == [{"enum": ["radio"]}, TEXT]
    assert string_of(rows_that([*played(30), unsaid])) == [{"type": "string"}]
    many = [(f"radio {number // 2}", "put on some music") for number in range(102)]
    assert string_of(rows_that([*played(500), *many[:100]]))[0]["enum"] == sorted({name for name, _ in many[:100]})
    assert string_of(rows_that([*played(500), *many])) == [{"type": "string"}]


def test_values_that_are_often_made_of_the_prompt_are_not_from_it() -> None:
    made = [(f"living_{n // 2}", f"light in the living room {n // 2}") for n in range(10)]
    assert string_of(rows_that([*played(32), *made])) == [{"type": "string"}]
    assert string_of(rows_that([*played(32), *made[:8]]))[-1] == TEXT


def test_a_value_in_copies_and_answers_of_one_row_is_of_one_row() -> None:
    rows = rows_that([*played(40), ("radio", "put on some music")])
    again = [
        replace(rows[-1], where=f"{rows[-1].where}{part}")
        for part in (", copy 1", ", copy 1, message 2", ", message 2")
    ]
    assert string_of([*rows, *again]) == [{"type": "string"}]
    assert string_of([*rows, replace(rows[-1], where="rows:99")])[-1] == TEXT


@pytest.mark.parametrize(
    ("rows", "others", "is_said"),
    [(10, [], True), (9, [], False), (10, ["song-1"] * 4, False), (10, ["radio", "radio"], False)],
    ids=["30 said", "27 said", "9 of 10 not said", "some at this place not said"],
)
def test_fewer_than_thirty_values_are_from_the_prompt_if_nearly_all_at_other_places_are(
    rows: int, others: list[str], is_said: bool
) -> None:
    said = [{key: f"{key} {number}" for key in ("song", "room", "day")} for number in range(rows)]
    given = [({**row}, ", ".join(row.values())) for row in said]
    given += [({"song": other if other == "radio" else f"{other}-{n}"}, "on") for n, other in enumerate(others)]
    found = inferred(
        rows_of("rows", [(f"rows:{n}", {"prompt": p, "completion": json.dumps(a)}) for n, (a, p) in enumerate(given)])
    )
    place = json.loads(found.text)["properties"]["song"]
    known = [{"enum": [row["song"] for row in said]}, TEXT]
    assert place == ({"anyOf": known} if is_said else {"type": "string"})


def test_strings_in_lists_are_from_the_prompt_and_escaped_ones_are_not() -> None:
    pairs = [([f"ü {number}", f"é {number}"], f"play ü {number} and é {number}") for number in range(30)]

    def listed(**options: bool) -> dict[str, Any]:
        entries = [{"prompt": prompt, "completion": json.dumps({"names": names}, **options)} for names, prompt in pairs]
        rows = rows_of("rows", [(f"rows:{n}", entry) for n, entry in enumerate(entries)])
        return dict(json.loads(inferred(rows).text)["properties"]["names"])

    items = {"type": "array", "items": TEXT, "minItems": 1}
    assert listed(ensure_ascii=False) == items
    # The constraint writes texts as they are.
    assert listed() == {**items, "items": {"type": "string"}}


def test_a_row_that_breaks_a_constraint_is_judged_by_its_own_prompt() -> None:
    spec = inferred(rows_that(played(60)))
    said = [("song 1", "play song 1"), ("song 2", "play song 1"), ("Björk", "play Björk"), ("song 1", "word " * 200)]
    lacks = "has a text that its prompt lacks, where x-from-prompt is true"
    assert [problem_of(spec, row) for row in rows_that(said, ensure_ascii=False)] == [None, lacks, None, None]
    assert rejected(spec, [row.completion or "" for row in rows_that(said)]) == []
    escaped = "writes a text of the prompt with \\u escapes, where x-from-prompt is true"
    assert [problem_of(spec, row) for row in rows_that(said)] == [None, lacks, escaped, None]
    assert [problem_of(spec, row) for row in rows_that(said[:1], "song")] == ["breaks the schema of the recipe"]
    assert unsaid_strings(rows_that(said)[1]) == {"song 2"}

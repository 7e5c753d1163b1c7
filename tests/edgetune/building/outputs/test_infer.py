from __future__ import annotations

import json
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError

from edgetune.building.outputs.infer import infer, problem_of, rejected
from edgetune.tasks.data import rows_of

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


def string_of(said: list[tuple[str, str]], **options: bool) -> list[dict[str, Any]]:
    """The schemas of a name that is one of some strings, each with its prompt."""
    answers = [json.dumps({"name": name}, ensure_ascii=False, **options) for name, _ in said]
    spec = infer(answers, [[prompt] for _, prompt in said])
    assert spec is not None
    schema = json.loads(spec.text)["properties"]["name"]
    return list(schema.get("anyOf", [schema]))


def played(count: int, first: int = 0) -> list[tuple[str, str]]:
    return [(f"song {number}", f"play song {number} now") for number in range(first, first + count)]


def test_strings_are_from_the_prompt_if_all_seen_once_are() -> None:
    assert string_of(played(60)) == [TEXT]
    assert string_of([*played(60), ("song x", "play song y")]) == [{"type": "string"}]
    assert infer([json.dumps({"name": name}) for name, _ in played(60)]) == infer(['{"name": "a"}'])


def test_few_values_and_those_that_a_prompt_lacks_are_listed_beside_its_texts() -> None:
    unsaid, songs = ("radio", "put on some music"), [name for name, _ in played(12)]
    assert string_of([*played(12), unsaid, unsaid]) == [{"enum": sorted([*songs, "radio"])}, TEXT]
    assert string_of([*played(50), unsaid, ("radio", "radio on")]) == [{"enum": ["radio"]}, TEXT]
    assert string_of([*played(12), unsaid]) == [{"type": "string"}]
    many = [(f"radio {number // 2}", "put on some music") for number in range(102)]
    assert string_of([*played(500), *many[:100]]) == [{"enum": sorted({name for name, _ in many[:100]})}, TEXT]
    assert string_of([*played(500), *many]) == [{"type": "string"}]


def test_values_that_are_often_made_of_the_prompt_are_not_from_it() -> None:
    made = [("living_room", "light in the living room")] * 2 + [("dining_room", "light in the dining room")] * 2
    assert string_of([*played(12), *made])[-1] == {"type": "string"}
    assert string_of([*played(12), *made[:2]])[-1] == TEXT


@pytest.mark.parametrize(("rows", "unsaid", "is_said"), [(7, [], True), (6, [], False), (7, ["id"], False)])
def test_fewer_than_ten_values_are_from_the_prompt_if_most_at_other_places_are(
    rows: int, unsaid: list[str], is_said: bool
) -> None:
    said = [{key: f"{key} {number}" for key in ("song", "room", "day")} for number in range(rows)]
    answers = [json.dumps({**row, **{key: f"{key}-{n}" for key in unsaid}}) for n, row in enumerate(said)]
    spec = infer(answers, [[", ".join(row.values())] for row in said])
    assert spec is not None
    place = json.loads(spec.text)["properties"]["song"]
    known = [{"enum": [row["song"] for row in said]}, TEXT]
    assert place == ({"anyOf": known} if is_said else {"type": "string"})


def test_strings_in_lists_are_from_the_prompt_and_escaped_ones_are_not() -> None:
    names = [[f"ü {number}", f"é {number}"] for number in range(30)]
    prompts = [["play " + " and ".join(pair)] for pair in names]
    answers = [json.dumps({"names": pair}, ensure_ascii=False) for pair in names]
    items = {"type": "array", "items": TEXT, "minItems": 1}
    spec = infer(answers, prompts)
    assert spec is not None
    assert json.loads(spec.text)["properties"]["names"] == items
    # The constraint writes texts as they are.
    escaped = infer([json.dumps({"names": pair}) for pair in names], prompts)
    assert escaped is not None
    assert json.loads(escaped.text)["properties"]["names"] == {**items, "items": {"type": "string"}}


def test_rows_that_break_a_constraint_are_judged_by_their_own_prompts() -> None:
    answers = [json.dumps({"name": name}) for name, _ in played(60)]
    spec = infer(answers, [[prompt] for _, prompt in played(60)])
    assert spec is not None
    rows = rows_of(
        "rows", [(f"{n}", {"prompt": "play song 1", "completion": f'{{"name": "song {n}"}}'}) for n in (1, 2)]
    )
    assert rejected(spec, [row.completion or "" for row in rows]) == []
    assert [problem_of(spec, row) for row in rows] == [
        None,
        "has a text that its prompt lacks, where x-from-prompt is true",
    ]
    (bad,) = rows_of("rows", [("3", {"prompt": "play song 1", "completion": '{"song": 1}'})])
    assert problem_of(spec, bad) == "breaks the schema of the recipe"

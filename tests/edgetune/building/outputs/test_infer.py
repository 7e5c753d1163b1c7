from __future__ import annotations

import json
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError

from edgetune.building.outputs.infer import infer, rejected

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

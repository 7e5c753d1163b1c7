from __future__ import annotations

from typing import Any, Literal

import pytest
from edgetune_runtime import UsageError
from edgetune_runtime.tools.definitions import check_schemas, tool_set

LIGHT = {"name": "set_light", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}}}


def with_parameters(parameters: object) -> list[dict[str, Any]]:
    return [{"name": "f", "parameters": parameters}]


def test_definitions_may_be_bare_or_within_a_function() -> None:
    bare, wrapped = tool_set([LIGHT]), tool_set([{"type": "function", "function": LIGHT}])
    assert bare is not None
    assert bare == wrapped
    assert bare.definitions == [{"type": "function", "function": {**LIGHT, "description": ""}}]


def test_a_function_becomes_a_tool_with_its_docstring_and_type_hints() -> None:
    def set_light(area: Literal["hall", "kitchen"], brightness: int = 100) -> None:
        """Set the light of an area."""

    found = tool_set([set_light])
    assert found is not None
    assert found.definitions[0]["function"] == {
        "name": "set_light",
        "description": "Set the light of an area.",
        "parameters": {
            "type": "object",
            "properties": {
                "area": {"type": "string", "enum": ["hall", "kitchen"]},
                "brightness": {"type": "integer", "default": 100},
            },
            "required": ["area"],
        },
    }


def test_a_function_without_parameters_has_no_arguments() -> None:
    found = tool_set([{"name": "now"}, {"name": "then", "parameters": {"type": "object"}}])
    assert found is not None
    for tool in found.tools:
        assert tool.schema == {"type": "object", "properties": {}, "additionalProperties": False}


def test_no_tools_are_none() -> None:
    assert tool_set(None) is tool_set([]) is tool_set([], "none") is None


@pytest.mark.parametrize(
    ("tools", "choice", "told"),
    [
        (None, "required", "tool_choice is 'required', but there are no tools; give tools"),
        (LIGHT, None, "tools is dict, not a list"),
        ([LIGHT], "set_lights", "tool_choice is 'set_lights'; did you mean 'set_light'?"),
        ([LIGHT, LIGHT], None, "tool 'set_light' is given twice; leave one out"),
        ([{"description": "x"}], None, "tool 1 has no name; give"),
        ([LIGHT, "x"], None, "tool 2 has no name; give"),
        ([{"name": "a b"}], None, "tool 1 has the name 'a b'; use 1 to 64"),
        ([{"name": "f", "description": 1}], None, "the description of tool 'f' is not text"),
        ([{"name": "f", "parameters": "{}"}], None, "the parameters of tool 'f' are not a JSON schema of an object"),
        ([{"name": "f", "parameters": []}], None, "the parameters of tool 'f' are not a JSON schema of an object"),
        (with_parameters({"type": "string"}), None, "the parameters of tool 'f' are not a JSON schema of an object"),
        (with_parameters({"properties": {"a": {"type": "strng"}}}), None, "the parameters of tool 'f': schema"),
        (with_parameters({"x": object}), None, "tools are not JSON"),
        ([{"name": f"f{n}"} for n in range(129)], None, "129 tools are given; give at most 128"),
        ([lambda x: x], None, "tool 1 has the name '<lambda>'"),
    ],
)
def test_an_invalid_tool_is_refused_in_one_line(tools: Any, choice: str | None, told: str) -> None:  # noqa: ANN401
    with pytest.raises(UsageError) as raised:
        check_schemas(tool_set(tools, choice))  # type: ignore[arg-type]
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)

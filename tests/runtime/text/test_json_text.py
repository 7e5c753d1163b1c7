from __future__ import annotations

import json

import pytest
from edgetune_runtime.text.json_text import is_deeper, leaves


@pytest.mark.parametrize(
    ("text", "levels"), [("1", 0), ("[]", 1), ('{"a": [1, {}], "b": "[[["}', 3), ("[" * 300 + "]" * 300, 300)]
)
def test_a_value_has_as_many_levels_as_brackets_in_each_other(text: str, levels: int) -> None:
    value = json.loads(text)
    assert [is_deeper(value, most) for most in (levels - 1, levels)] == [True, False]


def test_the_leaves_of_a_value_are_in_order_and_without_keys() -> None:
    assert list(leaves({"a": ["x", {"b": None}, (1, True)], "c": {}, "d": [], "e": ""})) == ["x", None, 1, True, ""]

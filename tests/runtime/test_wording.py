from __future__ import annotations

import pytest
from edgetune_runtime.wording import first_line


@pytest.mark.parametrize(
    ("text", "line"), [("one", "one"), ("\n one \ntwo", "one "), ("", "ValueError"), (" \n", "ValueError")]
)
def test_an_errors_first_line_is_its_type_without_a_text(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line

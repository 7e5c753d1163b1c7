from __future__ import annotations

import pytest
from edgetune_runtime import UsageError
from edgetune_runtime.text.controls import MARK, ControlTokens

CONTROLS = ControlTokens(["<|im_end|>", "<|im_start|>", "[INST]", "<s>"])


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("turn on the lamp", "turn on the lamp"),
        ("a<|im_end|>b", f"a<{MARK}|im_end|>b"),
        ("[INST][INST]", f"[{MARK}INST][{MARK}INST]"),
        ("<<s>", f"<<{MARK}s>"),
        ("<[INST]>", f"<[{MARK}INST]>"),
        ("<|im_|<|im_end|>end|>", f"<|im_|<{MARK}|im_end|>end|>"),
        ("<|other|>", "<|other|>"),
        (f"<{MARK}s>", "<\ufffds>"),
    ],
)
def test_names_of_control_tokens_are_marked_wherever_they_begin(text: str, marked: str) -> None:
    assert CONTROLS.as_text(text) == marked
    assert CONTROLS.as_text({"content": [text, 5, None, {text: text}]}) == {
        "content": [marked, 5, None, {marked: marked}]
    }


def test_a_text_is_cut_at_its_marks_only() -> None:
    assert CONTROLS.pieces("<s>turn on <|im_end|>") == ["<s>turn on <|im_end|>"]
    assert CONTROLS.pieces(f"<s>turn on <{MARK}|im_end|> and <{MARK}s>") == ["<s>turn on <", "|im_end|> and <", "s>"]


@pytest.mark.parametrize("run", ["a", "\n", "7"])
def test_a_long_run_without_a_boundary_is_cut(run: str) -> None:
    text = "on " + run * 10_000 + " off"
    pieces = CONTROLS.pieces(text)
    assert "".join(pieces) == text
    assert len(pieces) == 3
    assert CONTROLS.pieces("turn on " * 10_000) == ["turn on " * 10_000]


def test_many_control_tokens_are_tokenized_a_few_at_a_time() -> None:
    text = "on <|im_end|> " * 1000
    pieces = CONTROLS.pieces(text)
    assert "".join(pieces) == text
    assert max(piece.count("<|im_end|>") for piece in pieces) == 16
    assert all(piece.startswith("<|im_end|>") for piece in pieces[1:])


def test_control_tokens_and_marks_are_a_lower_bound_of_the_tokens() -> None:
    assert CONTROLS.count(f"<s>on<|im_end|><|other|><{MARK}s>") == 3


def test_too_many_levels_are_refused() -> None:
    value: object = "on"
    for _ in range(10_000):
        value = [value]
    with pytest.raises(UsageError, match="too many levels"):
        CONTROLS.as_text(value)

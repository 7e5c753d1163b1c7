from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.cli.main import make_parser
from edgetune_runtime.cli.options import answer_options, opening_options
from edgetune_runtime.inference.opening_options import ALL

GENERATE = ["generate", "home", "--prompt", "p"]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["--regex", "[0-9]+"], {"regex": "[0-9]+"}),
        (["--choices", "on, off"], {"choices": ["on", "off"]}),
        (["--unconstrained"], {"unconstrained": True}),
        (["--min-confidence", "0.9", "--unsure", "base"], {"min_confidence": 0.9, "unsure": "base"}),
        (["--min-confidence", "0.9", "--ask", "Which?"], {"min_confidence": 0.9, "ask": "Which?"}),
        (["--top-k", "3", "--stop", "a", "--stop", "b"], {"top_k": 3, "stop": ["a", "b"]}),
    ],
)
def test_flags_are_options_of_an_answer(words: list[str], given: dict[str, Any]) -> None:
    names = ("min_confidence", "unsure", "ask", "tool_choice", "regex")
    default: dict[str, Any] = dict.fromkeys(names) | {"unconstrained": False}
    assert answer_options(make_parser().parse_args([*GENERATE, *words])) == default | given


def test_a_grammar_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.lark"
    file.write_text('start: "ä"', encoding="utf-8")
    assert answer_options(make_parser().parse_args([*GENERATE, "--grammar", str(file)]))["grammar"] == 'start: "ä"'


@pytest.mark.parametrize(
    ("words", "name", "value", "default"),
    [
        (["--no-drafts"], "drafts", False, True),
        (["--learn-drafts", "memory"], "learn_drafts", "memory", "off"),
        (["--preload", "a", "--preload", "b"], "preload", ["a", "b"], []),
        (["--preload", "all"], "preload", ALL, []),
        (["--preload", "all", "--preload", "one"], "preload", ALL, []),
        (["--priority", "low"], "priority", "low", "normal"),
        (["--no-repack"], "repack", False, None),
        (["--repack"], "repack", True, None),
        (["--no-verify"], "verify", False, True),
        (["--no-preflight"], "preflight", False, True),
    ],
)
def test_flags_are_options_of_opening_a_bundle(words: list[str], name: str, value: object, default: object) -> None:
    plain, changed = (opening_options(make_parser().parse_args([*GENERATE, *more])) for more in ([], words))
    assert plain[name] == default
    assert changed == {**plain, name: value}


@pytest.mark.parametrize(
    ("words", "is_answering"),
    [
        (GENERATE, True),
        (["chat", "home"], True),
        (["serve", "home"], True),
        (["wyoming", "home"], True),
        (["info", "home"], False),
        (["classify", "home", "--prompt", "p"], False),
        (["bench", "home"], False),
        (["check", "home"], False),
        (["warm", "home"], False),
        (["doctor", "home"], False),
        (["adapters", "add", "home", "other"], False),
    ],
)
def test_only_commands_that_answer_have_the_options_of_answers(
    words: list[str], is_answering: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opening_options(make_parser().parse_args(words))["learn_drafts"] == "off"
    learning = [*words, "--learn-drafts", "memory"]
    if is_answering:
        assert opening_options(make_parser().parse_args(learning))["learn_drafts"] == "memory"
        return
    with pytest.raises(SystemExit):
        make_parser().parse_args(learning)
    assert "unrecognized arguments: --learn-drafts" in capsys.readouterr().err

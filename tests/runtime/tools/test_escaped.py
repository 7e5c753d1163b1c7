"""Calls as FunctionGemma and Gemma 4 write them, also with bases whose vocabulary has their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.tools.definitions import tool_set
from edgetune_runtime.tools.escaped import MARKS, read, write
from edgetune_runtime.tools.formats import CallFormat, Placeholder, template_tools
from edgetune_runtime.tools.grammar import control_tokens, grammar_of
from jsonschema import validate
from runtime.bundles import Adapter, change_manifest, low_rank, write_bundle
from runtime.tools.templates import FAMILIES
from tiny import make_folder, make_tokenizer

MARK = MARKS["escaped"]
CONTROLS = {
    "function-gemma": ("<start_function_call>", "<end_function_call>", "<start_function_response>", MARK),
    "gemma4": ("<|tool_call>", "<tool_call|>", "<|tool_response>", MARKS["quoted"]),
}
CONTEXT = 2048
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "minLength": 2, "maxLength": 9},
        "note": {"type": "string", "maxLength": 5},
        "level": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        "days": {"type": "array", "items": {"enum": ["mo", "tu"]}, "minItems": 1, "maxItems": 3},
        "place": {"$ref": "#/$defs/place"},
        "mode": {"anyOf": [{"const": "eco"}, {"type": "boolean"}]},
    },
    "required": ["room", "days"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"floor": {"type": "integer", "minimum": 0, "maximum": 9}},
            "additionalProperties": False,
        }
    },
}
HEAT = {"name": "heat", "description": "Set the heat", "parameters": SCHEMA}
VALUES = [{}, {"b": [1, -2.5, True, None], "a": "x, {y}: [z]"}, {"a": {"b": {"c": []}}, "d": ["", "e"]}]


@pytest.fixture(scope="module", params=["function-gemma", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def gemma(
    family: str, convert: Callable[[Path, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """A Gemma 3 with FunctionGemma's control tokens, or a Gemma 4, and the form of its chat template."""
    root, arch = tmp_path_factory.mktemp("gemma"), "gemma4" if family == "gemma4" else "gemma3"
    folder = make_folder(arch, root / arch, make_tokenizer(root, CONTROLS[family], begins_with_space=False))
    # Newer versions of transformers save the template in a file of its own.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name, changes in {
        "config.json": {"max_position_embeddings": CONTEXT},
        "tokenizer_config.json": {"chat_template": FAMILIES[family]},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    path = folder.with_suffix(".gguf")
    convert(folder, path)
    bundle = write_bundle(root / "home", path, {"one": Adapter(low_rank(path, seed=1))})
    change_manifest(bundle, lambda raw: raw.update(context_length=CONTEXT))
    with Runtime.open(bundle, disk_mb=0) as runtime:
        yield runtime


def test_a_call_is_learned_as_it_will_be_written_also_before_its_result(gemma: Runtime) -> None:
    from edgetune.tasks.data import rows_of  # noqa: PLC0415 - a part of the host
    from edgetune.tasks.tokenization import tokenize_rows  # noqa: PLC0415

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "heat", "arguments": {"room": "hall"}}}]}
    turns = [{"role": "user", "content": "warm"}, call, {"role": "tool", "content": "done"}]
    turns.append({"role": "assistant", "content": "It is warm."})
    (row,) = rows_of("x", [("x", {"messages": turns, "tools": [{"name": "heat", "parameters": {}}]})])
    tokenizer = loaded_bundle(gemma).context(None)[0].engine.tokenizer
    options: dict[str, Any] = {"system": None, "loss_on": "completion", "max_tokens": CONTEXT}
    (called, whole), _ = tokenize_rows(row.beginnings, tokenizer, **options)
    answer = called.tokens[called.prompt_length :]
    assert [tokenizer.is_end(token) for token in answer].index(True) == len(answer) - 1
    learned = [token for token, is_learned in zip(whole.tokens, whole.learned, strict=True) if is_learned]
    assert learned[: len(answer) - 1] == list(answer[:-1])
    assert sum(whole.learned[: whole.prompt_length]) >= len(answer) - 1


@pytest.fixture
def letters(templated: Callable[[str], Runtime]) -> Runtime:
    """A base whose vocabulary has none of the control tokens."""
    return templated(FAMILIES["function-gemma"])


@pytest.mark.parametrize("mark", MARKS.values())
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_are_read_as_they_were_written(value: dict[str, Any], mark: str) -> None:
    text = write(value, mark)
    assert read(f"call:x{text}<end>", 6, mark) == (value, 6 + len(text))
    assert all(read(text[:length], 0, mark) is None for length in range(len(text)))


@pytest.mark.parametrize("text", ["{a}", "{a:}", "{:1}", "[1 2]", "[1,]", "{a:x}", "[" * 99 + "]" * 99])
def test_other_texts_are_no_values(text: str) -> None:
    assert read(text, 0, MARK) is None


def test_names_are_sorted_as_the_template_sorts_them() -> None:
    assert write({"b": "on", "C": [], "a": 1}, MARK) == "{a:1,b:<escape>on<escape>,C:[]}"


def check_calls(runtime: Runtime, begin: str, end: str, mark: str) -> None:
    whole = 0
    for seed in range(8):
        options: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 300}
        answer = runtime.generate("warm", tools=[HEAT], tool_choice="heat", seed=seed, **options)
        if answer.stop_reason == "end":
            (call,) = answer.tool_calls
            validate(call.arguments, SCHEMA)
            assert answer.text == f"{begin}call:heat{write(call.arguments, mark)}{end}"
            whole += 1
    assert whole > 4


def test_calls_with_own_tokens_parse_and_fit_their_schema(family: str, gemma: Runtime) -> None:
    begin, end, response, mark = CONTROLS[family]
    # Gemma 4 ends answers with the token of a response.
    check_calls(gemma, begin, end if family == "gemma4" else end + response, mark)


def test_calls_in_letters_parse_and_fit_their_schema(family: str, templated: Callable[[str], Runtime]) -> None:
    begin, end, response, mark = CONTROLS[family]
    check_calls(templated(FAMILIES[family]), begin, end + response, mark)


def test_its_marks_are_tokens(family: str, gemma: Runtime) -> None:
    tokenizer = loaded_bundle(gemma).context()[0].engine.tokenizer
    form = template_tools(tokenizer.chat_template, tokenizer.bos, tokenizer.eos).format
    assert all(len(tokenizer.tokenize(name, continues=True)) == 1 for name in CONTROLS[family])
    # Of those of Gemma 4, llama.cpp writes all but the last one into texts.
    controls = {"<|tool_response>"} if family == "gemma4" else set(CONTROLS[family])
    assert set(control_tokens(form, tokenizer)) == controls


def test_a_session_continues_after_a_call(gemma: Runtime) -> None:
    with gemma.session() as session:
        answer = session.send("warm", tools=[HEAT], tool_choice="heat", max_tokens=300, seed=3)
        assert answer.tool_calls
        result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "done"}
        assert session.send([result], tools=[HEAT], max_tokens=5).stop_reason


def fitting(properties: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a text is a call of a tool `t` with these properties."""
    tools = tool_set([{"name": "t", "parameters": {"properties": properties}}], "required")
    form = CallFormat("call:", (Placeholder.NAME, Placeholder.ARGUMENTS), None, "", "escaped")
    assert tools is not None
    return grammar_of(tools, form, {}, None).accepts


def test_objects_that_list_no_properties_have_any_names() -> None:
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    fits = fitting({"a": texts, "b": {"type": "object"}})
    for value in ({"a": {}, "b": {}}, {"a": {"x": "1", "y": ""}}, {"b": {"x": 1, "y": "z", "z": None}}):
        assert fits(f"call:t{write(value, MARK)}")
    for value in ({"a": {"x": 1}}, {"c": {}}):
        assert not fits(f"call:t{write(value, MARK)}")


def test_objects_and_lists_are_known_without_their_type() -> None:
    number = {"type": "integer"}
    fits = fitting({"a": {"properties": {"x": number}}, "b": {"additionalProperties": number}, "c": {"items": number}})
    assert fits(f"call:t{write({'a': {'x': 1}, 'b': {'y': 2}, 'c': [3]}, MARK)}")
    for name in "abc":
        assert not fits(f"call:t{write({name: 1}, MARK)}")


@pytest.mark.parametrize(
    ("properties", "named"),
    [
        ({"number": {"type": "string", "pattern": "[0-9]+"}}, "pattern"),
        ({"a:b": {"type": "integer"}}, "a:b"),
        ({"never": False}, "False"),
        ({"either": {"properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["a"]}]}}, "anyOf"),
        ({"either": {"additionalProperties": {"type": "integer"}, "oneOf": [{"type": "string"}]}}, "oneOf"),
        ({"place": {"type": "object", "required": ["floor"]}}, "floor"),
    ],
)
def test_a_schema_that_the_format_cannot_hold_is_refused(
    properties: dict[str, Any], named: str, letters: Runtime
) -> None:
    tool = {"name": "dial", "parameters": {"properties": properties}}
    told = rf"the parameters of tool 'dial': a schema has '{named}', .*; leave it out"
    with pytest.raises(UsageError, match=told):
        letters.generate("dial", tools=[tool], tool_choice="dial", max_tokens=5)


def test_a_text_of_the_prompt_is_any_string_in_a_call(letters: Runtime) -> None:
    tool = {"name": "dial", "parameters": {"properties": {"name": {"type": "string", "x-from-prompt": True}}}}
    assert letters.generate("dial", tools=[tool], tool_choice="dial", max_tokens=5).text


@pytest.mark.parametrize(
    "schema", [{"type": 5}, {"enum": 5}, {"anyOf": 3}, {"type": "array", "minItems": "1"}, {"$ref": 3}], ids=str
)
def test_a_schema_with_a_keyword_of_the_wrong_type_is_refused(schema: dict[str, Any], letters: Runtime) -> None:
    tool = {"name": "dial", "parameters": {"properties": {"number": schema}}}
    with pytest.raises(UsageError, match="the parameters of tool 'dial'"):
        letters.generate("dial", tools=[tool], tool_choice="dial", max_tokens=5)

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import IncompatibleError, UsageError
from edgetune_runtime.text.chat import messages_for, render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "é" & <b>'},
    {"role": "assistant", "content": "é"},
]
TEMPLATES = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "[{{ m.content }}]{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}{{ strftime_now('%Y')[:2] }}",
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_renders_as_transformers_renders_it(
    template: str, add_generation_prompt: bool, tiny_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("llama"))
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    text = render(
        template,
        MESSAGES,
        add_generation_prompt=add_generation_prompt,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
    )
    assert text == expected


def test_without_a_template_the_contents_are_lines() -> None:
    assert render(None, MESSAGES[:2], add_generation_prompt=True) == 'Be brief.\nSay "é" & <b>'


def test_a_template_that_refuses_the_messages_is_a_usage_error() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate"):
        render(template, MESSAGES, add_generation_prompt=False)


@pytest.mark.parametrize("template", ["{% for %}", "{{ x", "{% nosuchtag %}"])
def test_a_broken_template_is_incompatible(template: str) -> None:
    with pytest.raises(IncompatibleError, match="template"):
        render(template, MESSAGES, add_generation_prompt=False)


def test_a_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(UsageError):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}", MESSAGES, add_generation_prompt=False)
    with pytest.raises(UsageError):
        render("{{ messages.append(1) }}", MESSAGES, add_generation_prompt=False)


def test_a_text_becomes_the_users_message_behind_the_system_prompt() -> None:
    assert messages_for("hi", None) == [{"role": "user", "content": "hi"}]
    assert messages_for("hi", "Be brief.") == [MESSAGES[0], {"role": "user", "content": "hi"}]


def test_messages_that_bring_a_system_prompt_keep_their_own() -> None:
    assert messages_for(MESSAGES, "Be long.") == MESSAGES
    assert messages_for(MESSAGES[1:], "Be long.")[0] == {"role": "system", "content": "Be long."}


@pytest.mark.parametrize("wrong", [[], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_messages_without_role_or_content_are_refused(wrong: list[object]) -> None:
    with pytest.raises(UsageError):
        messages_for(wrong, None)


@pytest.mark.parametrize("wrong", [None, 5, b"hi", {"role": "user", "content": "hi"}, iter(MESSAGES)])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match=r"the prompt is .*; give a text, or a list of messages"):
        messages_for(wrong, None)  # type: ignore[arg-type]


def call(arguments: object, **more: object) -> dict[str, object]:
    return {"function": {"name": "f", "arguments": arguments}, **more}


def test_a_content_of_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "turn "}, {"type": "text", "text": "on"}]
    assert messages_for([{"role": "user", "content": parts}], None) == [{"role": "user", "content": "turn on"}]


def test_calls_get_objects_as_arguments_and_an_empty_content() -> None:
    talk = [{"role": "assistant", "tool_calls": [call('{"a": 1}', id="x"), call(None, id="y"), call("", id="z")]}]
    (message,) = messages_for(talk, None)
    assert message["content"] == ""
    assert [each["function"]["arguments"] for each in message["tool_calls"]] == [{"a": 1}, {}, {}]
    assert messages_for([{"role": "assistant", "content": "a", "tool_calls": None}], None) == [
        {"role": "assistant", "content": "a"}
    ]


def test_results_without_an_id_belong_to_the_calls_before() -> None:
    other = {"function": {"name": "g"}, "id": "own"}
    talk = [
        {"role": "assistant", "tool_calls": [call({}), other]},
        {"role": "tool", "name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "tool_call_id": "lost", "content": "3"},
    ]
    first, *results = messages_for(talk, None)
    assert [each["id"] for each in first["tool_calls"]] == ["call00001", "own"]
    assert [result["tool_call_id"] for result in results] == ["own", "call00001", "lost"]
    assert [result.get("name") for result in results] == ["g", "f", None]


def test_results_belong_to_the_latest_calls_if_those_before_got_none() -> None:
    turns = [{"role": "assistant", "tool_calls": [call({})]}, {"role": "user", "content": "again"}]
    *_, result = messages_for([*turns, turns[0], {"role": "tool", "content": "1"}], None)
    assert result["tool_call_id"] == "call00002"


@pytest.mark.parametrize("result", [{"tool_call_id": "lost"}, {"tool_call_id": "call00001"}, {"name": "g"}, {}])
def test_thousands_of_calls_and_results_take_no_time(result: dict[str, str]) -> None:
    calls, count = [call({}) for _ in range(20_000)], 20_000
    talk = [{"role": "assistant", "tool_calls": calls}, *[{"role": "tool", "content": "", **result}] * count]
    begin_s = time.process_time()
    _, *results = messages_for(talk, None)
    # Looking through all calls for each result takes 10 s and more.
    assert time.process_time() - begin_s < 3
    if "tool_call_id" not in result:
        assert [each["tool_call_id"] for each in results] == [f"call{number:05d}" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "message 2 is {"),
        ({"role": "tool"}, "message 2 is {'role': 'tool'}; give"),
        (
            {"role": "user", "content": "a", "tool_calls": [call({})]},
            "message 2 has tool_calls, but its role is 'user'",
        ),
        ({"role": "user", "content": "a", "at": {1, 2}}, "message 2 is not JSON: Object of type set"),
        ({"role": "assistant", "tool_calls": [call({"a": {1}})]}, "message 2 is not JSON: Object of type set"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "message 2 has tool_calls of type dict; give a list"),
        ({"role": "tool", "content": "a", "tool_call_id": ["b"]}, r"message 2 has tool_call_id \['b'\]; give a text"),
        ({"role": "assistant", "tool_calls": ["f"]}, "message 2 has a tool call without a function's name: 'f'"),
        ({"role": "assistant", "tool_calls": [call("{")]}, "message 2 calls 'f' with arguments '{'; give an object"),
        ({"role": "assistant", "tool_calls": [call("[1]")]}, r"message 2 calls 'f' with arguments '\[1\]'; give"),
    ],
)
def test_the_error_about_an_invalid_message_has_its_number(message: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        messages_for([{"role": "user", "content": "hi"}, message], None)
    assert "\n" not in str(raised.value)

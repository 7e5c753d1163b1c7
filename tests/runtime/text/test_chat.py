from __future__ import annotations

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

from __future__ import annotations

import time

import pytest
from edgetune_runtime import EdgetuneError, IncompatibleError, UsageError
from edgetune_runtime.limits import Stopped
from edgetune_runtime.text import templates
from edgetune_runtime.text.chat import render

MESSAGES = [{"role": "user", "content": "turn on the light " * 20}]
LONG_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "nested loops": LONG_LOOP,
    "a loop over itself": "{% for a in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a list times a number": "{{ ([0] * 10**10) | length }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "numbers that double": "{% set n = namespace(v=9) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "texts that double": "{% set n = namespace(v='a') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "sums that double": "{% set n = namespace(v='a') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
    "lists that double": "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
    "nested lists": "{% set n = namespace(v=[]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
    "{{ n.v }}",
    "nested items": "{% set n = namespace(v={}) %}{% for i in range(99) %}"
    "{% set n.v = dict(a=n.v.items(), b=n.v.items()) %}{% endfor %}{{ n.v }}",
    "nested arguments": "{% set n = namespace(v=()) %}{% macro f() %}{% set n.v = varargs %}{% endmacro %}"
    "{% for i in range(99) %}{{ f(n.v, n.v) }}{% endfor %}{{ n.v }}",
    "blocks that double": "{% set n = namespace(v='aa') %}{% for i in range(99) %}"
    "{% set v %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = v %}{% endfor %}",
    "a long literal": "{% set s %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
    "a wide column": "{{ 'a' | center(10**10) }}",
    "a wide column of a method": "{{ 'a'.ljust(10**10) }}",
    "a wide indent": "{{ 'a\n' | indent(99999999999) }}",
    "a wide number": "{{ '%9999999999d' % 1 }}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "a wide format of a filter": "{{ '%9999999999d' | format(1) }}",
    "a width that is given": "{{ '{:{}}'.format(1, 9999999999) }}",
    "a replacement of nothing": "{% set s = 'a' * 999 %}{{ s.replace('', s * 999) }}",
    "a replacement by a filter": "{% set s = 'a' * 999 %}{{ s | replace('a', s * 999) }}",
    "a long separator": "{{ range(99999) | join('a' * 999) }}",
    "a long separator of a series": "{{ range(99999) | map('string') | join('a' * 999) }}",
    "a precise number": "{{ 1.5 | round(10**9) }}",
    "steps called by name": "{{ range(99999) | map('a step') | list }}" + LONG_LOOP,
    "a long test": "{{ range(99999) | select('in', range(99999) | list) | list }}" * 99,
}
REFUSED = {
    "a division by nothing": ("{{ 1 // 0 }}", "division or modulo by zero"),
    "a wrong type": ("{{ 1 + 'a' }}", "unsupported operand"),
    "another template": ("{% include 'a' %}", "loader"),
    "a missing attribute": ("{{ messages.a.b }}", "has no attribute 'a'"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_too_much_ends_soon_with_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LONGEST_S", 0.5)
    began = time.monotonic()
    with pytest.raises(IncompatibleError, match="exceeds a limit") as raised:
        render(ENDLESS[name], MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", REFUSED)
def test_any_failure_of_a_template_is_one_line(name: str) -> None:
    template, told = REFUSED[name]
    with pytest.raises(UsageError, match=told) as raised:
        render(template, MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("template", ["{{ " + "(" * 5000, "{% for a in b %}" * 30 + "{% endfor %}" * 30, "a" * 200_000])
def test_a_template_that_cannot_be_compiled_is_incompatible(template: str) -> None:
    with pytest.raises(IncompatibleError, match="chat template") as raised:
        render(template, MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [Stopped("deadline"), EdgetuneError("busy")])
def test_a_check_ends_the_rendering_with_its_own_error(error: Exception) -> None:
    steps = 0

    def check() -> None:
        nonlocal steps
        steps += 1
        if steps == 100:
            raise error

    with pytest.raises(type(error)) as raised:
        render(LONG_LOOP, MESSAGES, add_generation_prompt=True, check=check)
    assert raised.value is error


def test_long_messages_render() -> None:
    template = "{% for m in messages %}{{ m.content.replace('a', 'b') | trim }}{{ m | tojson }}{% endfor %}"
    content = "turn on the light " * 50_000
    assert len(render(template, [{"role": "user", "content": content}], add_generation_prompt=True)) > 2 * 800_000


def test_filters_get_what_they_get_in_jinja2() -> None:
    template = (
        "{{ missing | join(',') }}|{{ missing | replace('a', 'b') }}|{{ [1, 2] | map('string') | join(',') }}|"
        "{{ 'a' | center(3) }}|{{ 'x\ny' | indent(2) }}|{{ 1.25 | round(1) }}|{{ [3, 4] | sum }}|{{ 'a' * 3 }}|"
        "{{ [messages | length, 2] }}|{{ ('%s' % 'a') ~ 1 ~ none }}|{{ {'a': 1 + 1}.items() | list }}|"
        "{{ range(5) | batch(2) | list }}|{{ namespace(a=1) }}|{{ loop is defined }}"
    )
    text = render(template, MESSAGES, add_generation_prompt=True)
    assert text == ("||1,2| a |x\n  y|1.2|7|aaa|[1, 2]|a1None|[('a', 2)]|[[0, 1], [2, 3], [4]]|<Namespace>|False")

"""Forms of answers that take long, or much memory, to compile."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import threading
import time
from typing import Any

import pytest
from edgetune_runtime import BusyError, UsageError
from edgetune_runtime.decoding import child_compiler
from edgetune_runtime.decoding.output import output_of, spec_of
from edgetune_runtime.limits import Stopped
from edgetune_runtime.tools.definitions import tool_set
from edgetune_runtime.tools.formats import CallFormat, Placeholder
from edgetune_runtime.tools.grammar import grammar_of
from runtime.conftest import without_free_files

DEAR: list[dict[str, Any]] = [
    {"type": "integer", "multipleOf": 999983},
    {"type": "integer", "multipleOf": 99999989},
    {"type": "string", "allOf": [{"pattern": f".*x{{{n}}}y.*"} for n in range(1, 15)]},
    {"allOf": [{"type": "integer", "multipleOf": number} for number in (97, 89, 83)]},
]


@pytest.mark.parametrize("schema", DEAR, ids=str)
def test_an_expensive_schema_is_refused_in_the_child_process(schema: dict[str, Any]) -> None:
    begin = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(UsageError, match="takes too long or too much memory: more than 2 s or 64 MB; simplify it"):
        output_of(schema=schema)
    end = resource.getrusage(resource.RUSAGE_SELF)
    assert end.ru_utime - begin.ru_utime < 1
    if sys.platform == "linux":
        assert (end.ru_maxrss - begin.ru_maxrss) * 1024 < 50e6


def test_a_refusal_is_remembered() -> None:
    grammar = spec_of(schema=DEAR[0]).grammar
    assert child_compiler.reason_against(grammar)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert child_compiler.reason_against(grammar)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == children


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "multipleOf": 5}, "35"),
        ({"type": "string", "pattern": "^a+b$"}, '"aab"'),
        ({"enum": [f"value {n}" for n in range(2000)]}, '"value 1999"'),
    ],
)
def test_a_schema_that_may_be_expensive_is_compiled_after_its_trial(schema: dict[str, Any], text: str) -> None:
    spec = output_of(schema=schema)
    assert child_compiler.may_be_expensive(spec.grammar)
    assert spec.accepts(text)


def test_a_plain_schema_is_compiled_without_a_trial() -> None:
    schema = {"type": "object", "properties": {"an": {"enum": ["ä"]}}, "required": ["an"]}
    assert not child_compiler.may_be_expensive(spec_of(schema=schema).grammar)
    tools = tool_set([{"name": "light", "parameters": schema}], "required")
    form = CallFormat("", (Placeholder.NAME, Placeholder.ARGUMENTS), None, "", "compact")
    assert tools is not None
    assert not child_compiler.may_be_expensive(grammar_of(tools, form, {}, None).grammar)
    rule = f"start: %json {json.dumps({**schema, 'patternProperties': {'^a': {}}})}"
    for hidden in (rule, rule.replace("pattern", r"\u0070attern")):
        assert child_compiler.may_be_expensive(spec_of(grammar=hidden).grammar)


def test_an_error_of_the_trial_is_that_of_the_compiler() -> None:
    with pytest.raises(UsageError, match=r"repetition operator missing expression"):
        output_of(schema={"type": "string", "pattern": "a(+b"})


def test_a_call_that_must_stop_ends_its_trial_and_others_make_it_again() -> None:
    # A prime that no other test tries: a refusal is remembered.
    grammar = spec_of(schema={"type": "integer", "multipleOf": 999931}).grammar
    started = threading.Event()

    def stop() -> None:
        started.set()
        if time.monotonic() > begin + 0.1:
            raise Stopped("deadline")

    def try_to_the_end() -> None:
        started.wait()
        reasons.append(child_compiler.reason_against(grammar))

    reasons: list[str] = []
    begin = time.monotonic()
    other = threading.Thread(target=try_to_the_end)
    other.start()
    with pytest.raises(Stopped):
        child_compiler.reason_against(grammar, stop)
    other.join()
    assert child_compiler.TOO_EXPENSIVE in reasons[0]


def test_a_constraint_whose_trial_took_too_long_on_a_busy_machine_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar = spec_of(schema={"type": "string", "pattern": "^ab+c$"}).grammar
    with monkeypatch.context() as patch, pytest.raises(BusyError, match="try again later"):
        patch.setattr(child_compiler, "_MAX_S", 0.0)
        child_compiler.reason_against(grammar)
    assert child_compiler.reason_against(grammar) == ""


def test_a_constraint_that_no_process_can_be_started_for_is_tried_again() -> None:
    grammar = spec_of(schema={"type": "string", "pattern": "^ab+d$"}).grammar
    with without_free_files(), pytest.raises(BusyError, match=r"no process .* can be started: .* Too many open files"):
        child_compiler.reason_against(grammar)
    assert child_compiler.reason_against(grammar) == ""


def test_references_in_reverse_order_are_checked_in_linear_time() -> None:
    count = 5000
    parts = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
    root = {"anyOf": [{"$ref": f"#/$defs/d{n}"} for n in range(count, -1, -1)]}
    schema = {**root, "$defs": {**parts, f"d{count}": {"type": "null"}}}
    assert len(json.dumps(schema)) < 262_144 * 2
    begin = time.process_time()
    with pytest.raises(UsageError):
        spec_of(schema=schema)
    assert time.process_time() - begin < 2


def test_many_references_to_one_large_part_are_refused() -> None:
    part: dict[str, Any] = {"anyOf": [{}] * 4000}
    for _ in range(8):
        part = {"a": part}
    references = ["#/x" + "".join(steps) for steps in itertools.product(["/a", "//a"], repeat=8)]
    schema = {"x": part, "anyOf": [{"$ref": reference} for reference in references]}
    assert len(json.dumps(schema)) < 262_144
    with pytest.raises(UsageError, match="schema has more than 100,000 parts, references included; simplify it"):
        spec_of(schema=schema)

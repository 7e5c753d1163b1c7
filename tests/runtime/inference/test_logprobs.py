from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime import Answer, Runtime, TokenLogprob, UsageError, cli
from edgetune_runtime.inference.options import AnswerForm
from runtime.inference.test_structured import HOT, SCHEMA

SERVICES = [f"turn the warm light {state} in the hall and in the kitchen" for state in ("on", "off")]


def logprobs_of(answer: Answer) -> tuple[TokenLogprob, ...]:
    assert answer.logprobs is not None
    return answer.logprobs


def recomputed(runtime: Runtime, prompt: str, tokens: Sequence[int]) -> np.ndarray:
    """The log-probabilities [token, vocabulary] at each place of an answer, one step per token."""
    job = runtime._loaded.call(prompt, "one", form=AnswerForm(unconstrained=True)).job
    context = runtime._loaded.context("one")[0]
    with context.hold():
        rows = [context.run(job).logits]
        rows += [context.extend([token])[0] for token in tokens[:-1]]
        logits = np.array(rows, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_recomputed(runtime: Runtime, prompt: str, answer: Answer) -> None:
    found = logprobs_of(answer)
    assert len(found) == answer.tokens
    rows = recomputed(runtime, prompt, [one.token for one in found])
    for one, row in zip(found, rows, strict=True):
        assert one.logprob == pytest.approx(row[one.token], abs=5e-3)
        assert [each.logprob for each in one.top] == pytest.approx(sorted(row, reverse=True)[: len(one.top)], abs=5e-3)
        assert [each.logprob for each in one.top] == pytest.approx(row[[each.token for each in one.top]], abs=5e-3)


def test_log_probabilities_are_computed_on_request_only(opened: Runtime) -> None:
    assert opened.generate("play", adapter="one", max_tokens=3).logprobs is None
    alone = logprobs_of(opened.generate("play", adapter="one", max_tokens=3, logprobs=0))
    assert [one.top for one in alone] == [()] * 3


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}, {"repeat_penalty": 1.3}])
def test_they_are_those_of_the_model_before_temperature_and_penalty(opened: Runtime, sampling: dict[str, Any]) -> None:
    plain = opened.generate("play", adapter="one", max_tokens=12, **sampling)
    answer = opened.generate("play", adapter="one", max_tokens=12, logprobs=4, **sampling)
    assert answer.text == plain.text
    assert_recomputed(opened, "play", answer)
    found = logprobs_of(answer)
    assert b"".join(one.bytes for one in found).decode("utf-8", "replace") == answer.text
    if not sampling:
        assert [one.top[0].token for one in found] == [one.token for one in found]


@pytest.mark.parametrize("sampling", [{"max_tokens": 120}, {**HOT, "seed": 5}, {"max_tokens": 9}])
def test_tokens_that_a_constraint_forces_have_the_models_own(opened: Runtime, sampling: dict[str, Any]) -> None:
    plain = opened.generate("light", adapter="one", schema=SCHEMA, **sampling)
    answer = opened.generate("light", adapter="one", schema=SCHEMA, logprobs=2, **sampling)
    assert (answer.text, answer.stop_reason) == (plain.text, plain.stop_reason)
    assert answer.timings.forced > 0
    assert_recomputed(opened, "light", answer)
    # The model, which knows nothing of the constraint, would hardly write this.
    assert min(one.logprob for one in logprobs_of(answer)) < math.log(0.5)


def test_an_answer_that_ends_with_forced_tokens_has_all(opened: Runtime) -> None:
    for choices in (SERVICES, ["warm " * 90 + "light"]):
        answer = opened.generate("play", adapter="one", choices=choices, max_tokens=250, logprobs=0)
        assert (answer.text in choices, answer.stop_reason) == (True, "end")
        assert_recomputed(opened, "play", answer)


def test_they_fill_the_context_to_its_last_token(prompted_of: Callable[[str], Path]) -> None:
    for engine in ("gguf", "onnx"):
        with Runtime.open(prompted_of("llama"), engine=engine, disk_mb=0, context_length=64) as runtime:
            options: dict[str, Any] = {"choices": ["turn on the warm light " * 40], "max_tokens": 250}
            plain, answer = runtime.generate("play", **options), runtime.generate("play", logprobs=0, **options)
        assert answer.text == plain.text
        assert answer.stop_reason == "length"
        assert answer.timings.prompt_tokens + answer.tokens == 65
        assert len(logprobs_of(answer)) == answer.tokens


def test_an_answer_that_is_cancelled_has_none(opened: Runtime) -> None:
    cancel = threading.Event()
    cancel.set()
    assert opened.generate("play", cancel=cancel, logprobs=0).logprobs == ()


@pytest.mark.parametrize("number", [-1, 21, 1.5, True, "3"])
def test_a_wrong_number_is_refused(opened: Runtime, number: int) -> None:
    with pytest.raises(UsageError, match=r"logprobs is .*; give an integer from 0 to 20"):
        opened.generate("play", logprobs=number)


def test_the_command_prints_them(prompted_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(prompted_of("llama")), "--prompt", "play", "--max-tokens", "4", "--logprobs", "2"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(one["top"]) for one in found["logprobs"]] == [2] * found["tokens"]
    data = b"".join(bytes(one["bytes"]) for one in found["logprobs"])
    assert data.decode("utf-8", "replace") == found["text"]
    assert cli.main(command) == UsageError.exit_code
    assert "add --json" in capsys.readouterr().err

from __future__ import annotations

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.inference.measuring import loaded_bundle

TEXT = "turn on the light in"


def test_a_raw_prompt_is_tokenized_as_it_is(runtime: Runtime) -> None:
    loaded = loaded_bundle(runtime)
    with loaded.pool("command")[0].tokenizer() as tokenizer:
        expected = tokenizer.tokenize(TEXT)
    job = loaded.call(TEXT, "command", raw=True).job
    assert (list(job.tokens), job.fixed) == (expected, 0)
    answer = runtime.generate(TEXT, adapter="command", raw=True, max_tokens=8)
    assert answer.timings.prompt_tokens == len(expected)
    assert answer.text != runtime.generate(TEXT, adapter="command", max_tokens=8).text
    assert "".join(runtime.stream(TEXT, adapter="command", raw=True, max_tokens=8)) == answer.text


def test_a_raw_prompt_is_one_text_without_tools(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="a raw prompt has no messages"):
        runtime.generate([{"role": "user", "content": TEXT}], raw=True)
    with pytest.raises(UsageError, match="a raw prompt has no tools"):
        runtime.generate(TEXT, raw=True, tools=[{"name": "lamp"}])
    with pytest.raises(UsageError, match="0 tokens"):
        runtime.generate("", raw=True)

"""Clients that speak OpenAI's API by themselves: the command line `llm`, and the library `litellm`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import pytest
from runtime.server.conftest import Running

PROMPT = "turn on the light"
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
KEY = "-"
LLM = """
import json, sys
from llm.cli import cli
for words in json.loads(sys.argv[1]):
    cli(words, standalone_mode=False)
    print(end="\\0", flush=True)
"""


@pytest.fixture
def llm_folder(server: Running, tmp_path: Path) -> Path:
    """The settings of `llm` with an entry for the server."""
    entry = f"- model_id: lamp\n  model_name: command\n  api_base: {server.url}/v1\n  api_key_name: edgetune\n"
    abilities = "  supports_schema: true\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry + abilities, encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"edgetune": KEY}), encoding="utf-8")
    return tmp_path


def run_llm(folder: Path, *commands: Sequence[str]) -> list[str]:
    """What each of these commands prints, all in one process, as llm takes 2 s to import."""
    pytest.importorskip("llm", reason="llm comes with the extra demo")
    arguments = [["prompt", "-m", "lamp", "-o", "max_tokens", "12", PROMPT, *words] for words in commands]
    environment = {"LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": "", "PATH": ""}
    command = [sys.executable, "-c", LLM, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_llm_asks_an_adapter_by_an_entry_for_models_of_openais_api(server: Running, llm_folder: Path) -> None:
    json_only = ("--no-stream", "--schema", json.dumps(SCHEMA), "-o", "max_tokens", "60")
    answer, fitting = run_llm(llm_folder, (), json_only)
    assert answer == server.runtime.generate(PROMPT, adapter="command", max_tokens=12).text + "\n"
    assert set(json.loads(fitting)) == {"on"}


def test_litellm_answers_streams_and_reports_errors_as_with_openai(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it, the prices of all models are downloaded.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm  # noqa: PLC0415 - reads the variable

    arguments: dict[str, Any] = {
        "model": "openai/command",
        "messages": [{"role": "user", "content": PROMPT}],
        "api_base": f"{server.url}/v1",
        "api_key": KEY,
        "max_tokens": 12,
    }
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=12)
    reply = litellm.completion(**arguments)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens == expected.timings.prompt_tokens
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**arguments, stream=True)]
    assert "".join(pieces) == expected.text
    with pytest.raises(litellm.NotFoundError, match="comand"):
        litellm.completion(**{**arguments, "model": "openai/comand"})
    ollama = {**arguments, "model": "ollama_chat/command", "api_base": server.url}
    assert litellm.completion(**ollama).choices[0].message.content == expected.text
    # It keeps them to the end of the process, with a connection each; those for asyncio have none.
    for client in (litellm.module_level_client, *litellm.in_memory_llm_clients_cache.cache_dict.values()):
        if not iscoroutinefunction(client.close):
            client.close()

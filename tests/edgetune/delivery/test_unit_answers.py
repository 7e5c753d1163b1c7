"""The golden answers that the board program asks a running server for, with the real server and tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
from edgetune_export.backends.base import EncoderSource
from edgetune_runtime.bundle import ASK, ConfidenceCurve, UnsureRule
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.server.settings import Access
from edgetune_runtime.store import answers
from ports import http_server
from runtime.bundles import LIGHT_ON, Adapter, add_golden, change_manifest, low_rank, write_bundle
from runtime.encoders import write_encoder_bundle
from runtime.server.conftest import started

KEY = "0123456789abcdef"
TOOLS = ({"type": "function", "function": {"name": "turn_on", "parameters": {"type": "object", "properties": {}}}},)


@pytest.fixture(scope="module")
def home(tiny_source: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a golden answer to a chat, with a rule for unsure ones, a text, a chat with tools, and labels."""
    base = tiny_source("llama").path
    adapters = {name: Adapter(low_rank(base, seed=seed)) for seed, name in enumerate(("chat", "text", "tools", "none"))}
    adapters["label"] = Adapter(low_rank(base, seed=9), labels=("on", "off"))
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "home", base, adapters, context_length=512)
    rule = {
        "confidence": {"gguf": {"value": asdict(ConfidenceCurve(3, 1.0))}},
        "unsure": asdict(UnsureRule(1.0, ASK, "Which room do you mean?")),
    }
    change_manifest(bundle, lambda manifest: manifest["adapters"]["chat"].update(rule))
    prompts = {
        "chat": LIGHT_ON,
        "text": replace(LIGHT_ON, prompt="turn on"),
        "tools": replace(LIGHT_ON, tools=TOOLS),
        "label": LIGHT_ON,
    }
    return add_golden(bundle, ("gguf",), prompts)


@contextmanager
def served(bundle: Path, access: Access = Access(), **opening: object) -> Iterator[str]:  # noqa: B008 - it is frozen
    """The address of a server for a bundle."""
    with started(bundle, access=access, **opening) as server:
        yield server.url


def test_a_server_of_the_bundle_gives_all_golden_answers(home: Path) -> None:
    asked = answers.questions(home, "gguf")
    assert {question.adapter for question in asked} == {"chat", "text", "tools", "label"}
    assert {question.adapter for question in asked if question.expected} == {"chat", "text"}
    with served(home, Access(keys=(KEY,))) as url:
        assert answers.is_ready(url)
        answers.check(url, KEY, asked)
        with pytest.raises(VerificationError, match="adapter chat does not answer: HTTP Error 401"):
            answers.check(url, None, asked)
        for question in asked[:2]:
            with pytest.raises(VerificationError, match=f"adapter {question.adapter} answers .*, expected 'other'"):
                answers.check(url, KEY, [replace(question, expected="other")])
    assert not answers.is_ready(url)


def test_a_server_of_another_bundle_fails(home: Path, tiny_source: Callable[[str], Any], tmp_path: Path) -> None:
    base = tiny_source("llama").path
    other = write_bundle(tmp_path / "other", base, {"other": Adapter(low_rank(base, seed=1))})
    with served(other) as url, pytest.raises(VerificationError, match="adapter chat does not answer: HTTP Error 404"):
        answers.check(url, None, answers.questions(home, "gguf"))


def test_an_encoder_is_asked_for_a_vector(encoder_source: Callable[[str], EncoderSource], tmp_path: Path) -> None:
    bundle = write_encoder_bundle(encoder_source("bert"), tmp_path / "encoder")
    names = list(json.loads((bundle / "manifest.json").read_text())["adapters"])
    add_golden(bundle, ("onnx",), {names[0]: LIGHT_ON, names[1]: replace(LIGHT_ON, prompt="is it on")})
    asked = answers.questions(bundle, "onnx")
    assert [question.path for question in asked] == ["/v1/embeddings"] * 2
    with served(bundle, engine="onnx") as url:
        answers.check(url, None, asked)


def test_a_manifest_of_another_version_has_no_questions(home: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text((home / "manifest.json").read_text().replace('"schema": 2', '"schema": 99'))
    assert answers.questions(tmp_path, "gguf") == []


class Busy(BaseHTTPRequestHandler):
    """Has too many clients at first."""

    refused: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.refused else 503)
        self.end_headers()
        if self.refused:
            self.wfile.write(b'{"choices": [{"text": "on"}]}')
        self.refused.append(503)


def test_a_busy_server_is_asked_again_and_no_proxy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with http_server(Busy) as address:
        answers.check(address, None, [answers.Question("one", "/v1/completions", {}, "on")])
    assert len(Busy.refused) == 2

"""Asks a running server over HTTP: whether it is ready, and for the golden answers of its bundle."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import MARK, GoldenAnswer, Manifest, read_manifest
from edgetune_runtime.errors import EdgetuneError, VerificationError

_READY_S = 5.0
_ANSWER_S = 300.0
"""The server's own limit of a request."""
_BUSY = 503
# The server runs on this machine: a proxy of the environment is never asked.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Question:
    """A golden prompt as a request to OpenAI's API. Without an `expected` text, any answer will do."""

    adapter: str
    path: str
    body: Mapping[str, Any]
    expected: str | None = None


def is_ready(url: str) -> bool:
    """Whether the server at this address is ready: it has computed the states of its prompts."""
    return _succeeds(f"{url}/readyz")


def is_alive(url: str) -> bool:
    """Whether the server at this address answers at all."""
    return _succeeds(f"{url}/healthz")


def served_bundle(url: str) -> str | None:
    """The digest of the manifest that the server at this address serves; None if it does not say."""
    try:
        with _DIRECT.open(f"{url}/healthz", timeout=_READY_S) as reply:
            digest = json.load(reply)["bundle"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return None
    return str(digest)


def have_same_base(*bundles: Path) -> bool:
    """Whether these bundles have one base; False if this program cannot read a manifest."""
    try:
        first, *others = map(read_manifest, bundles)
    except EdgetuneError:
        return False
    return all(other.base == first.base for other in others)


def _succeeds(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=_READY_S):
            return True
    except (OSError, http.client.HTTPException):
        return False


def questions(bundle: Path, engine: str) -> list[Question]:
    """A question for each adapter that has a golden answer for the engine.

    There are none if this program cannot read the manifest: the bundle may be of an older or a newer version.
    """
    try:
        manifest = read_manifest(bundle)
    except VerificationError:
        return []
    answers = {name: entry.golden.get(engine) for name, entry in manifest.adapters.items()}
    return [_question(manifest, name, golden) for name, golden in answers.items() if golden is not None]


def check(url: str, key: str | None, questions: Sequence[Question]) -> None:
    """Ask the server at this address; VerificationError if it fails to answer, or answers differently."""
    for question in questions:
        answer = _ask(url, key, question)
        if question.expected not in (None, answer):
            message = f"adapter {question.adapter} answers {answer!r}, expected {question.expected!r}"
            raise VerificationError(message, "compare: edgetune-run check")


def _question(manifest: Manifest, name: str, golden: GoldenAnswer) -> Question:
    if not manifest.base.is_decoder:
        # The API has no labels: it gives the vectors that the adapter's head reads.
        text = golden.prompt if isinstance(golden.prompt, str) else golden.prompt[-1]["content"]
        return Question(name, "/v1/embeddings", {"model": name, "input": text})
    options: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": golden.max_tokens}
    # The API generates the text of a label, which need not be the label with the highest score.
    expected = None if manifest.adapter(name).labels else golden.answer
    if isinstance(golden.prompt, str):
        return Question(name, "/v1/completions", {**options, "prompt": golden.prompt}, expected)
    options |= {"messages": golden.prompt, "unsure": MARK}
    if golden.tools is not None:
        # The API splits the text into content and calls.
        return Question(name, "/v1/chat/completions", {**options, "tools": golden.tools})
    return Question(name, "/v1/chat/completions", options, expected)


def _ask(url: str, key: str | None, question: Question) -> str:
    """The text of an answer, or of a vector; VerificationError if there is none."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(f"{url}{question.path}", json.dumps(question.body).encode(), headers)
    try:
        return _text_of(_reply(request))
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        message = f"adapter {question.adapter} does not answer: {error}"
        raise VerificationError(message, "compare: edgetune-run check") from error


def _reply(request: urllib.request.Request) -> Any:  # noqa: ANN401 - JSON
    """The JSON of a reply; waits its turn while the server is busy with its clients."""
    end = time.monotonic() + _ANSWER_S
    while True:
        try:
            with _DIRECT.open(request, timeout=_ANSWER_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != _BUSY or time.monotonic() > end:
                raise
            error.close()
        time.sleep(1)


def _text_of(reply: Any) -> str:  # noqa: ANN401 - JSON
    if "data" in reply:
        return str(reply["data"][0]["embedding"])
    (choice,) = reply["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])

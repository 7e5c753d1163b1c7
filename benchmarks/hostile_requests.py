"""Attacks by prompts, messages and options: what is costly to tokenize, to render or to count, and odd numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from benchmarks.hostile_attack import WRONG, Attack, Replies
from benchmarks.hostile_server import Reply, Target, chat_body

_BYTES = 1_000_000
_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/api/chat",
    "/api/generate",
    "/v1/embeddings",
    "/api/embed",
)
_ODD_NUMBERS = (1e308, -1e308, 1e-320, 1e-300, 10**400, -1, 2**63, 2**64, 0.0, 1e38)


def _long(text: str, size: int = _BYTES) -> str:
    return text * (size // len(text.encode()))


def _prompt(name: str, does: str, text: str, item: str = "3") -> Attack:
    return Attack(name, item, does, lambda target: [target.chat(text)])


def _body(name: str, item: str, does: str, **fields: object) -> Attack:
    return Attack(name, item, does, lambda target: [target.chat(**fields)])


def _messages(name: str, item: str, does: str, messages: Sequence[Mapping[str, Any]]) -> Attack:
    return Attack(name, item, does, lambda target: [target.chat(messages=messages)])


def _everywhere(name: str, does: str, text: str) -> Attack:
    """The same text to every path that takes one."""

    def run(target: Target) -> Replies:
        return [target.post(path, _on_path(target, path, text)) for path in _PATHS]

    return Attack(name, "3", does, run)


def _on_path(target: Target, path: str, text: str) -> dict[str, Any]:
    body = {**chat_body(target.names.base, text), "prompt": text, "input": text, "stream": False}
    if path == "/v1/responses":
        return {"model": target.names.base, "input": text, "max_output_tokens": 8}
    return {**body, "options": {"num_predict": 8}} if path.startswith("/api") else body


def _raw_json(name: str, does: str, text: str) -> Attack:
    """A body that is not what json.dumps writes; MODEL stands for the model's name."""

    def run(target: Target) -> Replies:
        data = text.replace("MODEL", json.dumps(target.names.base)).encode("utf-8", "surrogatepass")
        return [target.post("/v1/chat/completions", data)]

    return Attack(name, "6", does, run)


def _options(field: str, values: Sequence[object] = _ODD_NUMBERS) -> Attack:
    """Every value of an option, in both APIs."""

    def run(target: Target) -> Replies:
        replies: list[Reply] = []
        for value in values:
            replies.append(target.chat(**{field: value}))
            ollama = chat_body(target.names.base, "hi", stream=False, options={"num_predict": 8, field: value})
            replies.append(target.post("/api/chat", ollama))
        return replies

    return Attack(field.replace("_", "-"), "6", f"{field} of {len(values)} odd values", run)


def _scales(target: Target) -> Replies:
    name = next(iter(target.names.adapters), "none")
    return [target.chat(adapters={name: scale}, temperature=1.0) for scale in (1e38, 3e38, -1e38, 1e-320, 1e308)]


def _merged(target: Target) -> Replies:
    """A request to each adapter, merged ones among them."""
    return [target.post(_PATHS[0], chat_body(name, "hi")) for name in target.names.adapters]


def _system_prompts(target: Target) -> Replies:
    """Changing system prompts, each of which may be kept as a state."""
    texts = (f"{number} " + "answer in one word and play " * 30 for number in range(50))
    return [target.chat(messages=[_message("system", text), _message("user", "hi")]) for text in texts]


def _surrogate(target: Target) -> Replies:
    body = {"model": target.names.base, "input": "hi", "instructions": "\ud800", "metadata": {"a": "\ud800"}}
    return [target.post("/v1/responses", body | {"max_output_tokens": 4}), target.chat("\ud800\udfff\ud83d")]


def _contexts(target: Target) -> Replies:
    """More answers at once than there are contexts."""
    return target.at_once(16, _PATHS[0], chat_body(target.names.base, "tell a story", max_tokens=64))


def _disconnects(target: Target) -> Replies:
    body = chat_body(target.names.base, _long("play ", 1000), max_tokens=1000)
    return [target.leave(_PATHS[0], body) for _ in range(20)]


def _many_bodies(target: Target) -> Replies:
    return target.at_once(20, _PATHS[0], chat_body(target.names.base, _long("a ", 1_900_000)))


def _forged(target: Target) -> Replies:
    """A user's text of control tokens, which must not count as one token each."""
    replies = [target.chat("<|im_end|>" * count) for count in (1, 51)]
    counts = [json.loads(reply.body or b"{}").get("usage", {}).get("prompt_tokens") for reply in replies]
    if None in counts:
        return replies
    per_text = (counts[1] - counts[0]) / 50
    return [*replies, Reply(f"{WRONG}a control token" if per_text <= 1 else "escaped", b"", 0.0)]


def _message(role: str, content: object, **fields: object) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _call(arguments: object) -> dict[str, Any]:
    function = {"name": "a", "arguments": arguments}
    return _message("assistant", "", tool_calls=[{"id": "1", "type": "function", "function": function}])


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


_USER = _message("user", "hi")
_STORY = {"max_tokens": 200, "temperature": 1.0}
PROMPTS: Sequence[Attack] = (
    _prompt("control-tokens", "1 MB of <|im_end|>", _long("<|im_end|>")),
    _prompt("digits", "1 MB of digits", _long("7")),
    _prompt("newlines", "1 MB of line breaks", _long("\n")),
    _prompt("spaces", "1 MB of spaces", _long(" ")),
    _prompt("letter", "1 MB of one letter", _long("a")),
    _prompt("emoji", "1 MB of one emoji", _long("\U0001f468\u200d\U0001f469\u200d\U0001f467")),
    _prompt("combining", "1 MB of combining characters", "e" + _long("\u0301")),
    _prompt("right-to-left", "1 MB of direction marks", _long("\u202e\u202d")),
    _prompt("zero", "1 MB of NUL", _long("\0")),
    _prompt("quotes", "1 MB of apostrophes", _long("'s")),
    _prompt("half-control", "1 MB of the start of a control token", _long("<|im_")),
    _everywhere("control-tokens-everywhere", "1 MB of <|im_end|> to each path", _long("<|im_end|>")),
    _everywhere("words-everywhere", "1 MB of words to each path", _long("play the warm light in the hall ")),
    Attack(
        "control-tokens-at-once",
        "3",
        "8 times 1 MB of <|im_start|>",
        lambda target: target.at_once(8, _PATHS[0], chat_body(target.names.base, _long("<|im_start|>"))),
    ),
    Attack("bodies", "3", "20 bodies of 1.9 MB at once", _many_bodies),
)
OPTIONS: Sequence[Attack] = (
    *map(_options, ("temperature", "top_p", "min_p", "repeat_penalty", "top_k", "seed", "max_tokens")),
    _options("n", (0, -1, 8, 9, 10**9, 2**64, 1e308, "8")),
    _options("top_logprobs", (-1, 0, 20, 10**6, 10**12, 2**64, 1e308)),
    _body("logprobs", "6", "20 logprobs of 8 answers", n=8, logprobs=True, top_logprobs=20, **_STORY),
    _body("logprobs-all", "6", "10^5 logprobs per token", logprobs=True, top_logprobs=100_000, **_STORY),
    _body("stops", "6", "150,000 stop texts", stop=[f"s{number}" for number in range(150_000)], **_STORY),
    _body("stop-long", "6", "a stop text of 1.9 MB", stop="x" * 1_900_000, **_STORY),
    _body("stops-empty", "6", "empty stop texts", stop=["", "", ""]),
    Attack("scales", "6", "scales of adapters up to 10^308", _scales),
    _raw_json(
        "numbers",
        "numbers beyond 10^308",
        '{"model": MODEL, "temperature": 1e999, "messages": [{"role": "user", "content": "hi"}]}',
    ),
    _raw_json("number-long", "a number of 1 MB", '{"model": MODEL, "seed": ' + "9" * _BYTES + ', "messages": []}'),
    _raw_json("json-deep", "JSON 500,000 levels deep", '{"model": MODEL, "messages": ' + _deep(500_000) + "}"),
    _raw_json("json-keys", "JSON with 100,000 keys", "{" + ", ".join(f'"k{n}": {n}' for n in range(100_000)) + "}"),
    _raw_json("json-same-key", "the same key 100,000 times", "{" + '"messages": [], ' * 100_000 + '"model": MODEL}'),
    _raw_json("not-text", "bytes that are not UTF-8", "\ud800\ud800"),
    Attack("surrogate", "6", "lone surrogates, which responses repeat", _surrogate),
    Attack("merged", "8", "each adapter, merged ones among them", _merged),
    Attack("system-prompts", "9", "50 changing system prompts", _system_prompts),
    Attack("contexts", "8", "16 answers at once", _contexts),
    Attack("disconnects", "1", "20 clients that leave at once", _disconnects),
    _body("model-long", "6", "a model's name of 1.9 MB", model="x" * 1_900_000),
    _body("model-many", "6", "a combination of 100,000 adapters", model="+".join(f"a{n}:1" for n in range(100_000))),
)
MESSAGES: Sequence[Attack] = (
    _messages("parts", "6", "640,000 content parts", [_message("user", [{}] * 640_000)]),
    _messages(
        "parts-text", "6", "50,000 content parts of text", [_message("user", [{"type": "text", "text": "a"}] * 50_000)]
    ),
    _messages("messages", "6", "60,000 messages", [_message("user", "")] * 60_000),
    _messages(
        "messages-roles",
        "6",
        "36,000 messages of both roles",
        [*chain.from_iterable([_USER, _message("assistant", "b")] for _ in range(18_000))],
    ),
    _messages("arguments-deep", "6", "arguments of a call 100,000 levels deep", [_USER, _call(_deep(100_000)), _USER]),
    _messages(
        "arguments-number",
        "6",
        "arguments of a call with a number of 1 MB",
        [_USER, _call('{"a": ' + "9" * _BYTES + "}"), _USER],
    ),
    _messages(
        "arguments-types",
        "6",
        "arguments of odd types",
        [_USER, _call([{"a": None}]), _message("tool", None, tool_call_id=""), _USER],
    ),
    _messages(
        "tool-calls",
        "6",
        "18,000 calls in a message",
        [_USER, _message("assistant", "", tool_calls=_call("{}")["tool_calls"] * 18_000), _USER],
    ),
    _messages(
        "tool-calls-types",
        "6",
        "calls that are not a list",
        [_USER, _message("assistant", "", tool_calls={"a": 1}), _USER],
    ),
    Attack("forged-roles", "7", "control tokens in a user's text", _forged),
)
ATTACKS = [*PROMPTS, *OPTIONS, *MESSAGES]

"""Attacks by output constraints and tools: what a schema costs to read, check and compile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.hostile_attack import Attack, Replies
from benchmarks.hostile_server import Reply, Target, chat_body, schema_format

_TOOL_BYTES = 1_800_000


def _schema(target: Target, schema: object) -> Reply:
    return target.chat(response_format=schema_format(schema), max_tokens=16)


def _attack(item: str, name: str, does: str, schema: object) -> Attack:
    return Attack(name, item, does, lambda target: [_schema(target, schema)])


def reversed_references(count: int) -> dict[str, Any]:
    """A chain of references, of which the last is named first: so none is deep, and each is known after the next."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count - 1)}
    parts = [{"$ref": f"#/$defs/d{n}"} for n in reversed(range(count))]
    return {"anyOf": parts, "$defs": {**links, f"d{count - 1}": {"type": "null"}}}


def _nested(depth: int, key: str) -> object:
    schema: object = {"type": "null"}
    for _ in range(depth):
        schema = {key: [schema]} if key in ("allOf", "anyOf") else {"type": "array", key: schema}
    return schema


def _deep_json(depth: int) -> bytes:
    """A body whose schema is nested deeper than json.dumps goes."""
    body = json.dumps({**chat_body("x", "hi"), "response_format": schema_format("HERE")})
    return body.replace('"HERE"', '{"items":' * depth + "{}" + "}" * depth).encode()


def _products(count: int, width: int) -> object:
    """All of `count` schemas, each one of `width`: width to the power of count combinations."""
    kinds = [{"pattern": f"^.*{chr(97 + n)}{{{n + 1}}}.*$"} for n in range(width)]
    return {"type": "string", "allOf": [{"anyOf": kinds} for _ in range(count)]}


def _properties(count: int) -> object:
    names = [f"p{n}" for n in range(count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


def tools_of(size: int, mark: str = "") -> list[dict[str, Any]]:
    """100 tools of together about `size` bytes, of many small objects; `mark` makes them different from others."""
    examples = [{"a": 0}] * (size // 100 // len('{"a": 0}, '))
    parameters = {"type": "object", "properties": {f"{mark}p": {"type": "string", "examples": examples}}}
    return [{"type": "function", "function": {"name": f"tool{n}", "parameters": parameters}} for n in range(100)]


def _tool_lists(target: Target) -> Replies:
    """Six lists, each different, as each may be kept."""
    return [target.chat(tools=tools_of(_TOOL_BYTES, mark=f"m{n}")) for n in range(6)]


def _ollama_schema(target: Target) -> Replies:
    return [target.post("/api/chat", _ollama(target, format={"type": "integer", "multipleOf": 999_983}))]


def _ollama_tools(target: Target) -> Replies:
    return [target.post("/api/chat", _ollama(target, tools=tools_of(_TOOL_BYTES)))]


def _responses_schema(target: Target) -> Replies:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "integer", "multipleOf": 999_983}}
    return [target.post("/v1/responses", {"model": target.names.base, "input": "hi", "text": {"format": form}})]


def _gone(target: Target) -> Replies:
    """Senders of a expensive schema that have gone."""
    body = chat_body(target.names.base, "hi", response_format=schema_format(reversed_references(4000)))
    return [target.leave("/v1/chat/completions", body) for _ in range(3)]


def _many(target: Target) -> Replies:
    body = chat_body(target.names.base, "hi", response_format=schema_format({"type": "integer", "multipleOf": 65_537}))
    return target.at_once(8, "/v1/chat/completions", body)


def _ollama(target: Target, **fields: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": target.names.base, "messages": messages, "stream": False, "options": {"num_predict": 8}, **fields}


def _text(**limits: object) -> dict[str, object]:
    return {"type": "string", **limits}


_PATTERNS = {"type": "string", "allOf": [{"pattern": f".*x{{{n}}}y.*"} for n in range(1, 15)]}
ATTACKS: Sequence[Attack] = (
    _attack("1", "multiple-of", "multipleOf 999983", {"type": "integer", "multipleOf": 999_983}),
    _attack("1", "multiple-of-8-digits", "multipleOf 99999989", {"type": "integer", "multipleOf": 99_999_989}),
    _attack("1", "multiple-of-fraction", "multipleOf 1e-300", {"type": "number", "multipleOf": 1e-300}),
    _attack("1", "patterns", "14 patterns under allOf", _PATTERNS),
    _attack(
        "1", "pattern-repeats", "a pattern with nested counts", _text(pattern="((((a{1,99}){1,99}){1,99}){1,99}){1,99}")
    ),
    _attack("1", "pattern-lookahead", "(a|aa)+ with 200 optional parts", _text(pattern="(a|aa)+" + "(b?c?)" * 200)),
    _attack("1", "pattern-classes", "2,000 classes of Unicode", _text(pattern=r"[\p{L}\p{N}]{2000}")),
    _attack("1", "pattern-long", "a pattern of 1 MB", _text(pattern="(a|b)" * 200_000)),
    _attack("1", "products", "6 of 10 patterns each, all at once", _products(6, 10)),
    _attack("1", "all-of-deep", "allOf, 150 deep", _nested(150, "allOf")),
    _attack("1", "any-of-deep", "anyOf, 400 deep", _nested(400, "anyOf")),
    _attack("1", "items-deep", "items, 190 deep", _nested(190, "items")),
    _attack("1", "enum", "an enum of 100,000 texts", {"enum": [f"text {n}" for n in range(100_000)]}),
    _attack("1", "const-long", "a const of 1.5 MB", {"const": "x" * 1_500_000}),
    _attack("1", "min-items", "minItems 10^9", {"type": "array", "items": {"type": "null"}, "minItems": 10**9}),
    _attack(
        "1", "max-items", "maxItems 10^6 of objects", {"type": "array", "items": _properties(10), "maxItems": 10**6}
    ),
    _attack("1", "min-length", "minLength 10^9", _text(minLength=10**9)),
    _attack("1", "max-length", "maxLength 10^6", _text(maxLength=10**6)),
    _attack(
        "1",
        "number-bounds",
        "an integer between -10^300 and 10^300",
        {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    ),
    _attack("1", "properties", "20,000 required properties", _properties(20_000)),
    _attack(
        "1",
        "pattern-properties",
        "300 patterns of properties",
        {"type": "object", "patternProperties": {f"^.*a{{{n}}}b": {} for n in range(300)}},
    ),
    _attack("2", "references", "4,000 references in reverse order", reversed_references(4000)),
    _attack("2", "references-2MB", "28,000 references in reverse order", reversed_references(28_000)),
    _attack(
        "2",
        "references-many",
        "200,000 times the same reference",
        {"anyOf": [{"$ref": "#/$defs/a"}] * 60_000, "$defs": {"a": {"type": "null"}}},
    ),
    _attack("2", "reference-long", "a reference of 1 MB of slashes", {"$ref": "#" + "/a" * 500_000}),
    _attack("2", "reference-outside", "a reference to a file", {"$ref": "file:///etc/passwd"}),
    Attack("references-gone", "2", "senders of 4,000 references disconnect", _gone),
    Attack(
        "json-deep",
        "2",
        "a schema 100,000 levels deep",
        lambda target: [target.post("/v1/chat/completions", _deep_json(100_000))],
    ),
    Attack("schemas-at-once", "1", "8 times multipleOf 65537 at once", _many),
    Attack("tools", "4", "six lists of tools of 1.8 MB", _tool_lists),
    _attack("6", "required-list", "required: [[]]", {"type": "object", "properties": {}, "required": [[]]}),
    _attack(
        "6",
        "schema-values",
        "keywords of wrong types",
        {"type": 5, "properties": [], "items": "x", "enum": {}, "minLength": "a"},
    ),
    Attack("ollama-schema", "1", "Ollama: multipleOf 999983", _ollama_schema),
    Attack("ollama-tools", "4", "Ollama: tools of 1.8 MB", _ollama_tools),
    Attack("responses-schema", "1", "responses: multipleOf 999983", _responses_schema),
)

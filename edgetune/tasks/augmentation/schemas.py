"""What JSON schemas say of the fields of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, spec_of
from edgetune_runtime.errors import EdgetuneError

from .answers import Scalar


def listed_in(schemas: Sequence[Mapping[str, Any]]) -> list[Scalar] | None:
    """The values that a field's schemas list; None if there are none or one lists none."""
    lists = [schema.get("enum", [schema["const"]] if "const" in schema else None) for schema in schemas]
    if not lists or None in lists:
        return None
    return list(dict.fromkeys(v for values in lists for v in values or () if isinstance(v, str | int | float)))


def accepts(schemas: Sequence[Mapping[str, Any]], value: Scalar) -> bool:
    """Whether one of a field's schemas allows a value, or there are none that can be used."""
    return not schemas or _accepts(json.dumps(schemas), json.dumps(value, ensure_ascii=False))


@lru_cache(maxsize=1 << 14)
def _accepts(schemas: str, value: str) -> bool:
    try:
        return any(spec.accepts(value) for spec in _specs(schemas))
    except EdgetuneError:
        return True


@lru_cache(maxsize=256)
def _specs(schemas: str) -> list[OutputSpec]:
    return [spec_of(schema=schema) for schema in json.loads(schemas)]


@lru_cache(maxsize=64)
def fields_of(schema: str) -> Mapping[str, list[Mapping[str, Any]]]:
    """The schemas of each field that a JSON schema has, by name, such as `slots.area`."""
    fields: dict[str, list[Mapping[str, Any]]] = {}
    root = json.loads(schema)
    for field, own in _fields(root, root):
        fields.setdefault(field, []).append(own)
    return fields


def _fields(
    schema: Mapping[str, Any], root: Mapping[str, Any], field: str = "", refs: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas of texts, numbers and truth values in the fields; an empty one where a reference leads nowhere."""
    if not isinstance(schema, Mapping):
        return
    ref = schema.get("$ref")
    if ref is not None:
        # One that leads to itself has been read already.
        if ref not in refs:
            yield from _fields(_target(ref, root), root, field, (*refs, ref))
        return
    properties = schema.get("properties")
    for key, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield from _fields(inner, root, f"{field}.{key}" if field else key, refs)
    parts = [schema.get("items"), *(part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key) or ())]
    for inner in parts:
        if isinstance(inner, dict):
            yield from _fields(inner, root, field, refs)
    if field and not any(parts) and schema.get("type") not in ("object", "array", "null"):
        yield field, {} if '"$ref"' in json.dumps(schema) else schema


def _target(ref: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference within the schema leads to; an empty schema if that is not in it."""
    found: Any = root if ref.startswith("#") else {}
    for key in ref.split("/")[1:]:
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}

"""Prepares JSON schemas for llguidance: closes objects, refuses schemas that nothing fits or that nest too deep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from edgetune_runtime.errors import UsageError

MAX_DEPTH = 200
"""Levels of a schema, each reference followed once. llguidance overflows a stack of 8 MB at about 600."""
_MAX_PARTS = 100_000
"""Parts of a schema, those that each reference leads to included: references may lead to the same part by other ways.
"""

Schema = dict[str, Any]

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")
COMBINING = frozenset({"anyOf", "oneOf", "allOf", "$ref"})
_OPENING = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"})


def closed(schema: Schema) -> Schema:
    """The schema with `additionalProperties: false` in objects that list their properties and say nothing of others.

    JSON Schema allows any others there, and a model that may always add a key need never end. Schemas that combine
    objects (`allOf`, or properties beside `anyOf`, `oneOf` or `$ref`) stay as they are, because closed parts would
    exclude each other's properties. What fits the result fits the schema.
    """
    if _combines(schema):
        return schema
    return dict(changed(schema, lambda part: {**part, "additionalProperties": False} if _lists_all(part) else part))


def check(schema: Schema) -> None:
    """UsageError for a schema of too many levels or parts, or one that only an endless JSON fits."""
    seen: set[str] = set()
    parts = 0
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        part, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise UsageError(f"schema has more than {MAX_DEPTH} levels, references included", "simplify it")
        parts += 1
        if parts > _MAX_PARTS:
            raise UsageError(f"schema has more than {_MAX_PARTS:,} parts, references included", "simplify it")
        _check_required(part)
        # The first child is looked at first, as in llguidance: a reference is followed where it occurs first.
        pending += [(child, depth + 1) for child in reversed(children(part))]
        reference = part.get("$ref") if isinstance(part, dict) else None
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            pending.append((_target(reference, schema), depth + 1))
    if not _is_finite(schema):
        raise UsageError("schema has a part that requires another like itself", "make the inner one optional")


def _check_required(part: object) -> None:
    required = part.get("required", []) if isinstance(part, dict) else []
    # Draft 3 has a flag here, which llguidance ignores.
    if isinstance(required, list) and not all(isinstance(name, str) for name in required):
        raise UsageError(f"schema has required {str(required)[:80]}", "give a list of names")


def children(schema: object) -> list[Any]:
    """The schemas directly in a schema."""
    if not isinstance(schema, dict):
        return []
    found: list[Any] = []
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            found += value.values()
        elif key in _LISTS and isinstance(value, list):
            found += value
        elif key in _SINGLE:
            found.append(value)
    return found


def changed(schema: Any, change: Callable[[Schema], Schema]) -> Any:  # noqa: ANN401 - any JSON
    """The schema as `change` returns it, which gets its parts changed in the same way."""
    if not isinstance(schema, dict):
        return schema
    result: Schema = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            result[key] = {name: changed(child, change) for name, child in value.items()}
        elif key in _LISTS and isinstance(value, list):
            result[key] = [changed(child, change) for child in value]
        else:
            result[key] = changed(value, change) if key in _SINGLE else value
    return change(result)


def _combines(schema: object) -> bool:
    """Whether the schema, or one in it, combines several that must all hold."""
    if not isinstance(schema, dict):
        return False
    here = "allOf" in schema or ("properties" in schema and not COMBINING.isdisjoint(schema))
    return here or any(map(_combines, children(schema)))


def _lists_all(schema: Schema) -> bool:
    """Whether the schema lists the properties of an object, all that it requires among them, and says nothing more."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list) or not _OPENING.isdisjoint(schema):
        return False
    return all(name in properties for name in required)


def _is_finite(root: Schema) -> bool:
    """Whether a finite JSON may fit.

    A part may have one as soon as each of its requirements has an option that may, so these are found first, and each
    requirement is counted off once.
    """
    open_requirements: dict[int, int] = {}
    users: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    finite: list[int] = []
    pending: list[Any] = [root]
    while pending:
        part = pending.pop()
        if id(part) in open_requirements:
            continue
        requirements = _requirements(part, root)
        open_requirements[id(part)] = len(requirements)
        if not requirements:
            finite.append(id(part))
        for number, options in enumerate(requirements):
            for option in options:
                users[id(option)].append((id(part), number))
            pending += options
    counted: set[tuple[int, int]] = set()
    while finite:
        for requirement in users.pop(finite.pop(), ()):
            if requirement not in counted:
                counted.add(requirement)
                user = requirement[0]
                open_requirements[user] -= 1
                if not open_requirements[user]:
                    finite.append(user)
    return not open_requirements[id(root)]


def _requirements(schema: object, root: Schema) -> list[list[Any]]:
    """What a JSON that fits the schema must fit too: for each requirement, the schemas of which one is enough."""
    if not isinstance(schema, dict):
        return []
    requirements = [[part] for part in _needed(schema)]
    if isinstance(schema.get("$ref"), str):
        requirements.append([_target(schema["$ref"], root)])
    return requirements + [
        options for key in ("anyOf", "oneOf") if isinstance(options := schema.get(key), list) and options
    ]


def _needed(schema: Schema) -> list[Any]:
    """The schemas of what a JSON cannot do without."""
    parts = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") == "object" and isinstance(properties, dict) and isinstance(required, list):
        parts += [properties[name] for name in required if name in properties]
    if schema.get("type") == "array" and schema.get("minItems"):
        parts.append(schema.get("items"))
    return parts


def _target(reference: str, root: Schema) -> Any:  # noqa: ANN401 - any JSON
    """What a reference within the schema points to; None if nothing, or for one to elsewhere."""
    target: Any = root if reference.startswith("#") else None
    for step in filter(None, reference.removeprefix("#").split("/")):
        target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    return target

"""Read a recipe's YAML with line numbers, and turn pydantic's errors into one plain line per problem."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.wording import nearest, suggestion
from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent

Loc = tuple[str | int, ...]
"""Path of a value in a document: keys and list indexes."""
Plain = Any
"""A YAML value: dict, list, str, int, float, bool or None."""
ModelAt = Callable[[Loc, dict[str, Any]], type[BaseModel] | None]
"""Returns the model that validates the mapping at a path of these values; None if its keys are not fixed."""

MAX_SHOWN = 60
MOST_BYTES, MOST_DEPTH, MOST_ALIASES, MOST_VALUES = 250_000, 50, 100, 100_000
"""Limits of a recipe file: bytes, levels of nesting, YAML aliases and values."""
AUTO = "auto"
"""Of `quantization`: stands for a mapping with all defaults."""
NAME = "name"
"""The key of an adapter's name in a file of its own."""
_SHORT_FORMS: Mapping[str, Callable[[str], Plain]] = {
    "method": lambda name: {"name": name},
    "training": lambda word: {word: True},
    "quantization": lambda name: {} if name == AUTO else name,
}
"""The mapping that a text stands for, by its key, or the text if it stands for none."""
PLAIN = {
    "missing": "is missing",
    "float_type": "{value} is not a number",
    "float_parsing": "{value} is not a number",
    "finite_number": "{value} is not a finite number",
    "int_type": "{value} is not an integer",
    "int_parsing": "{value} is not an integer",
    "int_from_float": "{value} is not an integer",
    "bool_type": "{value} is not a boolean; use true or false",
    "bool_parsing": "{value} is not a boolean; use true or false",
    "string_type": "{value} is not a string; put it in quotes",
    "string_too_short": "is empty",
    "literal_error": "{value} is not one of: {expected}",
    "greater_than": "{value} must be greater than {gt:g}",
    "greater_than_equal": "{value} must be at least {ge:g}",
    "less_than": "{value} must be less than {lt:g}",
    "less_than_equal": "{value} must be at most {le:g}",
    "dict_type": "{value} is not a mapping of keys to values",
    "model_type": "{value} is not a mapping of keys to values",
    "model_attributes_type": "{value} is not a mapping of keys to values",
    "tuple_type": "{value} is not a list",
    "list_type": "{value} is not a list",
    "too_short": "has too few entries; give at least {min_length}",
}


class FileMapping(dict[str, Any]):
    """A mapping that is a file of its own, at whose folder its relative paths start."""

    def __init__(self, values: Mapping[str, Any], folder: Path) -> None:
        super().__init__(values)
        self.folder = folder


@dataclass(frozen=True)
class Document:
    """A recipe as plain values; for a YAML file, `lines` has the line of each key and list item, counted from 1.

    `parts` are the files that some of its values come from, by the path of the value.
    """

    values: dict[str, Any]
    path: Path | None = None
    lines: Mapping[Loc, int] = field(default_factory=dict)
    parts: Mapping[Loc, Document] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it was read from."""
        return tuple(part.path for part in (self, *self.parts.values()) if part.path is not None)

    def line(self, loc: Loc) -> int:
        """The line of `loc`, or of its nearest parent that is in the file."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)

    def place(self, line: int) -> str:
        """The beginning of a message about a line."""
        return "recipe: " if self.path is None else f"{self.path}:{line}: "

    def part_of(self, loc: Loc) -> tuple[int, Document, Loc]:
        """The file that `loc` is in, with its number, and the path of the value in that file."""
        for number, (start, part) in enumerate(self.parts.items(), 1):
            if loc[: len(start)] == start:
                return number, part, loc[len(start) :]
        return 0, self, loc


def read_document(path: Path, kind: str = "recipe") -> Document:
    """Read a YAML file that contains one mapping, which messages call `kind`.

    Raises NotFoundError if the file is missing, and UsageError with file and line if it is something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise NotFoundError(f"no recipe {path}", "write one with `edgetune init`") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder", "give the recipe file in it") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text at byte {error.start}", "save it as UTF-8") from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES} bytes", "see the template of `edgetune init`")
    lines: dict[Loc, int] = {}
    try:
        root = _parse(text)
        values = _plain(root, (), lines)
    except YAMLError as error:
        raise UsageError(f"{path}:{_yaml_problem(error)}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply", "see the template of `edgetune init`") from error
    if not isinstance(root, dict):
        problem = "is empty" if root is None else "is not a mapping of keys to values"
        raise UsageError(f"{path}:1: the {kind} {problem}", "see the template of `edgetune init`")
    return Document(values, path, lines)


def override(values: dict[str, Any], key: str, value: Plain, model_at: ModelAt) -> str | None:
    """Set the dotted `key` in `values`, in place; strings are parsed as YAML. Returns the problem if there is one."""
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if parents[:depth] == ["adapters"] and part not in node:
            return f"no adapter {part!r}; {suggestion(part, list(node))}"
        if part in _SHORT_FORMS and isinstance(node.get(part), str):
            node[part] = _SHORT_FORMS[part](node[part])
        is_switch = isinstance(node.get(part), bool) and model_at(tuple(parents[: depth + 1]), values) is not None
        if node.get(part) is None or is_switch:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return f"{'.'.join(parents[: depth + 1])} is not a mapping in this recipe"
    for other in other_names(last, model_at(tuple(parents), values)):
        node.pop(other, None)
    try:
        node[last] = _plain(_parse(value), (), {}) if isinstance(value, str) else value
    except (YAMLError, RecursionError):
        return f"{value!r} is not valid YAML; put strings with special characters in quotes"
    if isinstance(value, str) and _has_comment(value):
        return f"{shown(value)} has a # that begins a comment; put it in quotes"
    return None


def json_in_yaml(value: Plain, indent: int | None = None) -> str:
    """A value as JSON from which YAML reads the same."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # Of the others, YAML takes some for the end of a line and refuses some. It takes all above U+FFFF as they are, but
    # does not join the two surrogates that JSON escapes them as.
    return "".join(
        each if each.isprintable() or each == "\n" or each > "\uffff" else f"\\u{ord(each):04x}" for each in text
    )


def check_set_once(settings: Iterable[str], flags: Mapping[str, Iterable[str]]) -> None:
    """UsageError if a setting is a key, or a part of it, that one of the other options in `flags` sets too."""
    for flag, keys in flags.items():
        for key in keys:
            both = next((other for other in settings if f"{other}.".startswith(f"{key}.")), None)
            if both is not None:
                raise UsageError(f"{flag} and setting {both} are both given, and set the same", "keep one")


def explain(
    error: ValidationError, values: dict[str, Any], document: Document, flags: Mapping[str, str], model_at: ModelAt
) -> list[str]:
    """One line per invalid value: first those of the dotted keys that options set, which `flags` names, then the others
    in the file's order."""
    problems: dict[Loc, str] = {}
    for item in error.errors():
        loc = _existing(item["loc"], item["type"], values)
        field = _field_at(loc, values, model_at)
        if loc[-1:] != item["loc"][-1:] and item["loc"][-1] != "[key]" and field is not None:
            meaning = " ".join(str(field.description).split()).rstrip(".")
            problems[loc] = f"{shown(value_at(loc, values))} is not valid; expected: {meaning}"
        else:
            problems.setdefault(
                loc, _in_english(item, model_at(loc[:-1], values), _keys_at(loc[:-1], values, model_at))
            )
    # Of a union's members, the one with keys says which of them is wrong; the others only that it is a mapping.
    problems = {
        loc: problem
        for loc, problem in problems.items()
        if not any(loc == other[: len(loc)] != other for other in problems)
    }
    options = {tuple(key.split(".")): flag for key, flag in flags.items()}
    lines = []
    for loc, problem in problems.items():
        # What the file does not have, the option of a value in it has added.
        added = loc and value_at(loc, document.values) is None
        option = next((key for key in options if loc[: len(key)] == key or (added and key[: len(loc)] == loc)), None)
        if option is not None:
            name = "" if loc == option else f"{'.'.join(map(str, loc))}: "
            lines.append((0, 0, f"{options[option]}: {name}{problem}"))
            continue
        number, part, inside = document.part_of(loc)
        line = part.line(inside or (NAME,))
        name = f"{'.'.join(map(str, inside))}: " if inside else ""
        lines.append((number, line, f"{part.place(line)}{name}{problem}"))
    return [text for *_, text in sorted(lines, key=lambda line: line[:2])]


def _suggested_key(name: str, keys: Sequence[str]) -> str:
    """Like `suggestion`, for a key that may belong to a nested section: a similar key is given with its path; if there
    is none, the keys of this section are listed."""
    short = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = nearest(name, short)
    direct = [key for key in keys if "." not in key]
    return f"did you mean {short[near]!r}?" if near in short else f"choose one of: {', '.join(direct or keys)}"


def shown(value: object) -> str:
    """`value` for an error message: one line, shortened if long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else " ".join(repr(value).split())
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def value_at(loc: Loc, values: Plain) -> Plain:
    """The value at `loc`; None if there is none."""
    for part in loc:
        inside = part in values if isinstance(values, dict) else isinstance(values, list)
        values = values[part] if inside else None
    return values


def other_names(key: str, model: type[BaseModel] | None) -> list[str]:
    """The other names (aliases) of the option called `key`."""
    for option in model.model_fields.values() if model is not None else ():
        if isinstance(option.validation_alias, AliasChoices) and key in option.validation_alias.choices:
            return [str(choice) for choice in option.validation_alias.choices if choice != key]
    return []


class _Composer(Composer):
    """Ends early at a text that has many aliases or is nested deeply, which take time and memory without end."""

    _aliases = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - ruamel carries no types
        self._aliases += self.parser.check_event(AliasEvent)
        self._depth += 1
        if self._aliases > MOST_ALIASES:
            raise YAMLError(f"more than {MOST_ALIASES} aliases; write their values instead")
        if self._depth > MOST_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _parse(text: str) -> Plain:
    """The values of a YAML text as ruamel has them; YAMLError for an invalid text, RecursionError for depth."""
    yaml = YAML()
    yaml.Composer = _Composer
    try:
        return yaml.load(StringIO(text))
    except (ValueError, OverflowError, IndexError, TypeError) as error:
        # Of numbers and dates, of tags without a value, and of keys that are not values.
        raise YAMLError(str(error)) from error


def _has_comment(text: str) -> bool:
    """Whether a part of a YAML text is a comment."""
    # ruamel keeps empty lines as comments too.
    return any("#" in str(token.comment) for token in YAML().scan(StringIO(text)) if hasattr(token, "comment"))


def _plain(node: Plain, loc: Loc, lines: dict[Loc, int]) -> Plain:
    """ruamel's values as plain Python ones; records the line of each key and item in `lines`."""
    if isinstance(node, TaggedScalar):
        return str(node.value)
    if isinstance(node, CommentedMap | CommentedSeq):
        for part, position in (node.lc.data or {}).items():
            lines[(*loc, part)] = position[0] + 1
        if len(lines) > MOST_VALUES:
            raise YAMLError(f"more than {MOST_VALUES} values; use fewer aliases")
    if isinstance(node, dict):
        return {key: _plain(value, (*loc, key), lines) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value, (*loc, index), lines) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _in_english(error: Mapping[str, Any], model: type[BaseModel] | None, keys: Sequence[str]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        same = other_names(key, model)
        return f"is an alias of {same[0]!r}; keep one" if same else f"unknown key; {_suggested_key(key, keys)}"
    if kind in PLAIN:
        text = PLAIN[kind].format(value=shown(error["input"]), **context)
        if kind == "literal_error":
            near = nearest(str(error["input"]), re.findall(r"'([^']+)'", context["expected"]))
            return text + (f"; did you mean {near!r}?" if near else "")
        return text
    if kind == "value_error":
        return str(context["error"])
    message: str = error["msg"]
    return message[:1].lower() + message[1:]


def _existing(loc: Loc, kind: str, values: Plain) -> Loc:
    """`loc` without the type names that pydantic has for the members of a union."""
    existing: Loc = ()
    for depth, part in enumerate(loc):
        if part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int):
            existing, values = (*existing, part), values[part]
        elif kind == "missing" and depth == len(loc) - 1:
            existing = (*existing, part)
    return existing


def _field_at(loc: Loc, values: dict[str, Any], model_at: ModelAt) -> FieldInfo | None:
    model = model_at(loc[:-1], values) if loc else None
    return model.model_fields.get(str(loc[-1])) if model is not None else None


def _keys_at(loc: Loc, values: dict[str, Any], model_at: ModelAt) -> list[str]:
    """The keys allowed at `loc`, then those one level deeper as dotted names."""
    keys = _own_keys(model_at(loc, values))
    return [*keys, *(f"{key}.{deeper}" for key in keys for deeper in _own_keys(model_at((*loc, key), values)))]


def _own_keys(model: type[BaseModel] | None) -> list[str]:
    return [] if model is None else list(model.model_fields)


def _yaml_problem(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"1: not YAML: {' '.join(str(error).split())}"
    line = error.problem_mark.line + 1
    duplicate = re.match(r'found duplicate key "(.*?)"', str(error.problem))
    if duplicate:
        return f"{line}: the key {duplicate[1]!r} appears twice; keep one"
    return f"{line}: not YAML: {error.problem}"

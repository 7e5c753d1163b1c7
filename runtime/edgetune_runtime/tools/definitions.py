"""The tools that a call offers: definitions checked, and which of them the answer must call."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, output_of, spec_of
from edgetune_runtime.decoding.schema import closed
from edgetune_runtime.errors import UsageError, importing, naming
from edgetune_runtime.wording import first_line, suggestion

MODES = ("auto", "none", "required")
MAX_TOOLS = 128
MAX_CHARACTERS = 131_072
"""Length of all definitions as JSON."""
_MAX_KEPT = 8
"""Lists of definitions that are kept: apps give the same ones with each call."""

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
"""Tools as an app gives them: definitions as in OpenAI's API, with or without the `function` around, or functions."""

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_GIVE = 'give {"type": "function", "function": {"name": TEXT, "description": TEXT, "parameters": JSON SCHEMA}}'
_PLAIN = frozenset({"type", "title", "description", "$schema"})


@dataclass(frozen=True)
class Tool:
    """One tool: its name, its definition as templates read it, and the schema that its arguments are held to."""

    name: str
    definition: Mapping[str, Any]
    schema: Mapping[str, Any]

    def ordered(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as a model that is held to the schema writes them: fields in its order, whole numbers plain."""
        written: dict[str, Any] = _ordered(arguments, self.schema)
        return written

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a model that is held to the schema can write these arguments."""
        return _spec_of(json.dumps(self.schema)).accepts(json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True)
class ToolSet:
    """The tools of a call, and `choice`: one of MODES, or the name of the one to call. Made by `tool_set`.

    Sets with the same `text`, the definitions as JSON, render the same prompt.
    """

    text: str
    choice: str = "auto"
    tools: tuple[Tool, ...] = field(default=(), compare=False)

    @property
    def definitions(self) -> list[Mapping[str, Any]]:
        """The definitions that chat templates get as `tools`."""
        return [tool.definition for tool in self.tools]

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.choice == "none":
            return ()
        return self.tools if self.choice in MODES else tuple(tool for tool in self.tools if tool.name == self.choice)


def tool_set(tools: Tools | None, choice: str | None = None) -> ToolSet | None:
    """The tools, checked; None where there are none.

    UsageError, which names the tool, for a definition of another form, for too many or too long ones, and for a choice
    that is neither one of MODES nor a tool. IncompatibleError when pydantic is not installed, for functions. Schemas
    are compiled with the first answer; `check_schemas` does it before.
    """
    choice = "auto" if choice is None else choice
    if tools is None or (isinstance(tools, Sequence) and not tools):
        if choice not in ("auto", "none"):
            raise UsageError(f"tool_choice is {choice!r}, but there are no tools", "give tools")
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise UsageError(f"tools is {type(tools).__name__}, not a list", "give a list of tools")
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"{len(tools)} tools are given", f"give at most {MAX_TOOLS}")
    plain = [_of_function(tool) if callable(tool) else tool for tool in tools]
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"tools are not JSON: {error}", _GIVE) from error
    if len(text) > MAX_CHARACTERS:
        message = f"the definitions of tools have {len(text)} characters, and at most {MAX_CHARACTERS} are allowed"
        raise UsageError(message, "give fewer tools")
    checked = _checked(text)
    names = [tool.name for tool in checked]
    if choice not in MODES and choice not in names:
        raise UsageError(f"tool_choice is {choice!r}", suggestion(str(choice), (*MODES, *names)))
    definitions = json.dumps([tool.definition for tool in checked], ensure_ascii=False)
    return ToolSet(definitions, choice, checked)


def naming_parameters(tool: str) -> AbstractContextManager[None]:
    """Say in the errors of a block that they are about the parameters of this tool."""
    return naming(f"the parameters of tool {tool!r}")


@lru_cache(maxsize=_MAX_KEPT)
def check_schemas(tools: ToolSet) -> None:
    """Compile the schema of each tool alone.

    UsageError, which names the tool, for one that cannot be used. IncompatibleError when llguidance is not installed.
    """
    for tool in tools.tools:
        with naming_parameters(tool.name):
            output_of(schema=tool.schema)


@lru_cache(maxsize=_MAX_KEPT)
def _checked(text: str) -> tuple[Tool, ...]:
    tools = tuple(_tool(number, tool) for number, tool in enumerate(json.loads(text), 1))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"tool {twice!r} is given twice", "leave one out")
    return tools


def _tool(number: int, value: object) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"tool {number} has no name", _GIVE)
    name, parameters = function["name"], function.get("parameters")
    parameters = {} if parameters is None else parameters
    if not _NAME.fullmatch(name):
        raise UsageError(f"tool {number} has the name {name!r}", "use 1 to 64 letters, digits and _ . : / -")
    if not isinstance(function.get("description", ""), str | None):
        raise UsageError(f"the description of tool {name!r} is not text", _GIVE)
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise UsageError(f"the parameters of tool {name!r} are not a JSON schema of an object", _GIVE)
    # Templates expect the description and the parameters to be there.
    plain = {"type": "object", "properties": {}}
    definition = {**function, "description": function.get("description") or "", "parameters": parameters or plain}
    schema = {"type": "object", **parameters}
    if _PLAIN.issuperset(schema):
        # Without properties, a function has no arguments.
        schema["properties"] = {}
    with naming_parameters(name):
        spec_of(schema=schema)
    return Tool(name, {"type": "function", "function": definition}, closed(schema))


@lru_cache(maxsize=256)
def _spec_of(schema: str) -> OutputSpec:
    return output_of(schema=schema)


def _ordered(value: Any, schema: object) -> Any:  # noqa: ANN401 - any JSON value
    own = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, Mapping):
        properties = own.get("properties")
        schemas = properties if isinstance(properties, Mapping) else {}
        names = dict.fromkeys((*(name for name in schemas if name in value), *value))
        return {name: _ordered(value[name], schemas.get(name)) for name in names}
    if isinstance(value, list):
        return [_ordered(inner, own.get("items")) for inner in value]
    is_whole = isinstance(value, float) and value.is_integer() and own.get("type") == "integer"
    return int(value) if is_whole else value


def _of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The definition of a Python function: its name, docstring, and the schema of its parameters' type hints."""
    with importing("functions as tools need", "pydantic, or give definitions"):
        from pydantic import PydanticUserError, TypeAdapter  # noqa: PLC0415 - optional
    name = getattr(function, "__name__", type(function).__name__)
    try:
        adapter: Any = TypeAdapter
        schema = adapter(function).json_schema()
    except (PydanticUserError, NameError) as error:
        message = f"function {name!r} is not a tool: {first_line(error)}"
        raise UsageError(message, "use types that JSON has, or give a definition") from error
    for parameter in schema.get("properties", {}).values():
        # Pydantic's title is the name again, and costs tokens.
        parameter.pop("title", None)
    parameters = {key: value for key, value in schema.items() if key != "additionalProperties"}
    return {"name": name, "description": inspect.getdoc(function) or "", "parameters": parameters}

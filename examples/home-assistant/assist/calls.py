"""The short form of Home Assistant's tool calls, which the adapter writes, and the schema that it must fit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .devices import Device, Home

Call = dict[str, Any]
"""A call in short form: `{"call": "TurnOn", "domain": "light", "name": "Desk Lamp"}`."""
Json = dict[str, Any]

READ_ONLY = frozenset(
    {"sensor", "binary_sensor", "weather", "person", "device_tracker", "camera", "sun", "zone", "event", "calendar"}
)
MAY_BE_MISSING = (
    "light", "switch", "fan", "cover", "lock", "valve", "climate", "media_player", "vacuum", "todo", "timer", "device",
)  # fmt: skip
"""What an answer may say that the home does not have."""
MAX_CALLS = 6
PERCENT: Json = {"type": "integer", "minimum": 0, "maximum": 100}
TEXT: Json = {"type": "string", "minLength": 1, "maxLength": 80}
COUNT: Json = {"type": "integer", "minimum": 1, "maximum": 999}
KELVIN: Json = {"type": "integer", "minimum": 1000, "maximum": 10000}


@dataclass(frozen=True)
class Tool:
    """A tool: its name at Home Assistant, the domains that it is for, and its arguments beside the target.

    `domains` are None for a tool that is for all of them, and empty for one that has no target. `targets`: which of
    name, area and floor it takes. `sends_domain`: whether Home Assistant takes `domain`; `says_domain`: whether the
    short form has it, because it does not follow from the tool.
    """

    name: str
    domains: frozenset[str] | None = None
    arguments: Mapping[str, Json] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    sends_domain: bool = True
    targets: tuple[str, ...] = ("name", "area", "floor")
    says_domain: bool = False


_CONTROLLED = Tool("", says_domain=True)
_POSITIONED = Tool("", frozenset({"cover", "valve"}), says_domain=True)
_PLAYER = Tool("", frozenset({"media_player"}))
_FOUND_PLAYER = Tool("", frozenset({"media_player"}), sends_domain=False)
_VACUUM = Tool("", frozenset({"vacuum"}))
_ON_LIST = Tool("", frozenset({"todo"}), {"item": TEXT}, ("name", "item"), sends_domain=False, targets=("name",))
_NO_TARGET = Tool("", frozenset(), sends_domain=False, targets=())


def _hass(tool: Tool, short: str, **changes: Any) -> dict[str, Tool]:  # noqa: ANN401 - fields of Tool
    """A tool under its short name: without changes, its name at Home Assistant is the short one after `Hass`."""
    return {short: replace(tool, **{"name": f"Hass{short}", **changes})}


TOOLS: dict[str, Tool] = {
    **_hass(_CONTROLLED, "TurnOn"),
    **_hass(_CONTROLLED, "TurnOff"),
    **_hass(
        Tool("", frozenset({"light"})),
        "LightSet",
        arguments={"brightness": PERCENT, "color": TEXT, "temperature": KELVIN},
    ),
    **_hass(_POSITIONED, "SetPosition", arguments={"position": PERCENT}, required=("position",)),
    **_hass(_POSITIONED, "StopMoving"),
    **_hass(
        Tool("", frozenset({"climate"}), sends_domain=False),
        "ClimateSetTemperature",
        arguments={"temperature": {"type": "number"}},
        required=("temperature",),
    ),
    **_hass(Tool("", frozenset({"fan"})), "FanSetSpeed", arguments={"percentage": PERCENT}, required=("percentage",)),
    **_hass(_PLAYER, "MediaPause"),
    **_hass(_PLAYER, "MediaUnpause"),
    **_hass(_PLAYER, "MediaNext"),
    **_hass(_PLAYER, "MediaPrevious"),
    **_hass(_PLAYER, "SetVolume", arguments={"volume_level": PERCENT}, required=("volume_level",)),
    **_hass(_PLAYER, "MediaPlayerUnmute"),
    **_hass(
        _FOUND_PLAYER,
        "SetVolumeRelative",
        arguments={"volume_step": {"enum": ["up", "down"]}},
        required=("volume_step",),
    ),
    **_hass(_FOUND_PLAYER, "MediaSearchAndPlay", arguments={"search_query": TEXT}, required=("search_query",)),
    **_hass(_VACUUM, "VacuumStart"),
    **_hass(_VACUUM, "VacuumReturnToBase"),
    **_hass(_ON_LIST, "ListAddItem"),
    **_hass(_ON_LIST, "ListCompleteItem"),
    **_hass(_ON_LIST, "ListRemoveItem"),
    **_hass(_ON_LIST, "ListItems", name="todo_get_items", arguments={}, required=("name",)),
    **_hass(_CONTROLLED, "GetLiveContext", name="GetLiveContext", targets=("name", "area")),
    **_hass(_NO_TARGET, "GetDateTime", name="GetDateTime"),
    **_hass(_NO_TARGET, "StartTimer", arguments={"hours": COUNT, "minutes": COUNT, "seconds": COUNT, "name": TEXT}),
    **_hass(_NO_TARGET, "CancelTimer", arguments={"name": TEXT}),
    **_hass(_NO_TARGET, "TimerStatus", arguments={"name": TEXT}),
    **_hass(_NO_TARGET, "CancelAllTimers"),
}
"""The tools by their short names."""

_SHORT = {tool.name: short for short, tool in TOOLS.items()}
_NO_SCRIPTS = {"todo_get_items", "calendar_get_events"}
_KEYS = {"todo_get_items": {"name": "todo_list"}}
"""Arguments whose names at Home Assistant differ."""


def offered(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The definitions of a request's tools by name, with or without the object `function` around."""
    plain = [tool.get("function", tool) for tool in tools]
    return {tool["name"]: tool for tool in plain}


def script_devices(tools: Iterable[str]) -> tuple[Device, ...]:
    """Tools that are a user's scripts, as devices: Home Assistant offers each script as a tool of its own."""
    own = (name for name in tools if re.fullmatch(r"[a-z0-9_]+", name) and name not in _NO_SCRIPTS)
    return tuple(Device((name.replace("_", " ").strip().title(),), "script") for name in own)


def schema(
    devices: Sequence[Device], tools: Iterable[str] | None = None, floors: Sequence[str] = (), here: str | None = None
) -> Json:
    """The schema of answers about these devices with these tools (names at Home Assistant; None: all).

    Names and areas are those of the devices, `here` and `floors`, so an answer cannot name another device. Scripts that
    are tools can be run, and nothing else.
    """
    names = {tool.name for tool in TOOLS.values()} if tools is None else set(tools)
    scripts = script_devices(names)
    entities = [device for device in devices if device not in scripts]
    groups: dict[str, tuple[Json, list[str]]] = {}
    for short, tool in TOOLS.items():
        if tool.name not in names:
            continue
        for shape in _shapes(short, tool, devices if short == "TurnOn" else entities, floors, here):
            _, alike = groups.setdefault(json.dumps(shape), (shape, []))
            alike.append(short)
    calls = [_object({"call": {"enum": of}, **shape["properties"]}, shape["required"]) for shape, of in groups.values()]
    several = [domain for domain, number in Counter(device.domain for device in devices).items() if number > 1]
    others = [
        _object({"missing": {"enum": list(MAY_BE_MISSING)}}, ["missing"]),
        _object({"talk": {"const": True}}, ["talk"]),
    ]
    if several:
        others.append(_object({"ask": {"enum": several}}, ["ask"]))
    if not calls:
        return {"anyOf": others}
    return {"anyOf": [{"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_CALLS}, *others]}


def open_schema() -> Json:
    """The schema of answers about any home, with any names: that of the adapter's training rows."""
    calls = []
    for short, tool in TOOLS.items():
        target = dict.fromkeys((*(["domain"] if tool.says_domain else []), *tool.targets), TEXT)
        required = ["domain"] if tool.says_domain and short != "GetLiveContext" else []
        calls.append(
            _object({"call": {"const": short}, **target, **tool.arguments}, ["call", *required, *tool.required])
        )
    others = [_object({key: TEXT}, [key]) for key in ("ask", "missing")]
    others.append(_object({"talk": {"const": True}}, ["talk"]))
    return {"anyOf": [{"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_CALLS}, *others]}


def expand(call: Call, home: Home, tools: Mapping[str, Mapping[str, Any]]) -> Json:
    """The call as Home Assistant takes it: `name` and `arguments`, without those that the tool does not list."""
    tool = TOOLS[call["call"]]
    arguments = {key: value for key, value in call.items() if key not in {"call", "domain"}}
    domain = call.get("domain")
    if call["call"] == "TurnOn" and domain == "script" and (script := _script_tool(str(call.get("name")), home, tools)):
        return {"name": script, "arguments": {}}
    if domain is None and tool.sends_domain and tool.domains:
        domain = min(tool.domains)
    if domain is not None and tool.sends_domain:
        arguments["domain"] = [domain]
    renamed = _KEYS.get(tool.name, {})
    arguments = {renamed.get(key, key): value for key, value in arguments.items()}
    listed = (tools.get(tool.name, {}).get("parameters") or {}).get("properties")
    return {
        "name": tool.name,
        "arguments": arguments if not listed else {k: v for k, v in arguments.items() if k in listed},
    }


def shorten(name: str, arguments: Mapping[str, Any]) -> Call | None:
    """The short form of a call of an earlier turn; None for a tool that the adapter does not know."""
    short = _SHORT.get(name)
    if short is None:
        return None
    tool = TOOLS[short]
    back = {value: key for key, value in _KEYS.get(name, {}).items()}
    given = {back.get(key, key): value for key, value in arguments.items() if value not in (None, "", [])}
    domain = given.get("domain")
    call: Call = {"call": short}
    if tool.says_domain and domain:
        call["domain"] = domain[0] if isinstance(domain, list) else domain
    return call | {key: given[key] for key in (*tool.targets, *tool.arguments) if key in given}


def target_of(device: Device, devices: Sequence[Device]) -> Call:
    """What names this device: its name, and its area where another device of its domain has the same name."""
    same = [other for other in devices if other.name == device.name and other.domain == device.domain]
    return {"name": device.name} | ({"area": device.area} if len(same) > 1 and device.area else {})


def _script_tool(name: str, home: Home, tools: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The tool that is this script; None if the script is an entity of the home."""
    if any(device.name == name for device in home.devices if device.domain == "script"):
        return None
    return next((tool for tool in tools if tool.replace("_", " ").strip().title() == name), None)


def _shapes(
    short: str, tool: Tool, devices: Sequence[Device], floors: Sequence[str], here: str | None
) -> Iterable[Json]:
    """What may follow `call`: one object per domain if the short form says it, otherwise one; none without devices."""
    if not tool.targets:
        yield _object(dict(tool.arguments), ["call", *tool.required])
    elif not tool.says_domain:
        if fit := [device for device in devices if tool.domains and device.domain in tool.domains]:
            yield _object(_targets(tool, fit, floors, here) | dict(tool.arguments), ["call", *tool.required])
    else:
        domains = Counter(device.domain for device in devices)
        if short == "GetLiveContext":
            yield _object(_targets(tool, devices, floors, here), ["call"])
        elif tool.domains is None:
            domains = Counter({name: n for name, n in domains.items() if name not in READ_ONLY | {"todo"}})
        else:
            domains = Counter({name: n for name, n in domains.items() if name in tool.domains})
        for domain in domains:
            fit = [device for device in devices if device.domain == domain]
            target = {"domain": {"const": domain}} | _targets(tool, fit, floors, here)
            yield _object(target | dict(tool.arguments), ["call", "domain", *tool.required])


def _targets(tool: Tool, devices: Sequence[Device], floors: Sequence[str], here: str | None) -> Json:
    areas = [device.area for device in devices if device.area] + ([here] if here else [])
    values = {"name": [device.name for device in devices], "area": areas, "floor": list(floors)}
    return {key: {"enum": list(dict.fromkeys(values[key]))} for key in tool.targets if values[key]}


def _object(properties: Json, required: Sequence[str]) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}

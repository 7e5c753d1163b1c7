"""The prompt of the adapter that says a result: the sentence, the calls and what Home Assistant answered, in short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .calls import Call
from .devices import Device, Home, read_devices
from .pick import pick

MAX_STATES = 6
_SHOWN = (
    "current_temperature", "temperature", "humidity", "brightness", "current_position", "percentage", "volume_level",
    "media_title", "media_artist",
)  # fmt: skip
"""Attributes of states that can answer a question."""


def reply_prompt(sentence: str, calls: Sequence[Call], results: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of the adapter `reply`: one line per call, with the names of what it changed, a state or an error."""
    lines = []
    for number, result in enumerate(results):
        call = calls[number] if number < len(calls) else {"call": "?"}
        lines.append(f"{json.dumps(call, ensure_ascii=False)} = {_outcome(sentence, result)}")
    return "\n".join([*lines, f"> {sentence.strip()}"])


def state_line(device: Device) -> str:
    """A device's state in short: `light Desk Lamp (Study): on, brightness 40`."""
    place = f" ({device.area})" if device.area else ""
    values = [
        f"{key.replace('_', ' ')} {_value(key, device.attributes[key])}" for key in _SHOWN if key in device.attributes
    ]
    unit = device.attributes.get("unit_of_measurement")
    state = f"{device.state} {unit}" if unit else str(device.state)
    return f"{device.domain} {device.name}{place}: {', '.join([state, *values])}"


def _outcome(sentence: str, result: Mapping[str, Any]) -> str:
    """What a result says: an error, what was asked for, or the names of what was changed."""
    if "error" in result or result.get("success") is False:
        return f"error: {result.get('error_text') or result.get('error', 'failed')}"
    if (requested := result.get("result")) is not None:
        return _result_text(sentence, requested)
    data = result.get("data")
    if not isinstance(data, dict):
        return "done"
    if failed := _names(data.get("failed")):
        return f"failed: {failed}"
    return f"done: {_names(data.get('success'))}".rstrip(": ")


def _result_text(sentence: str, requested: object) -> str:
    """What was asked for: states that the sentence is about, the time, or the items of a list."""
    if isinstance(requested, dict):
        return ", ".join(f"{key} {value}" for key, value in requested.items() if key != "timezone")
    if isinstance(requested, list):
        texts = [str(item.get("summary", item)) if isinstance(item, dict) else str(item) for item in requested]
        return ", ".join(texts) or "nothing"
    devices = pick(Home(read_devices(str(requested))), f"{sentence}?", MAX_STATES)
    return "; ".join(state_line(device) for device in devices) or str(requested).strip()[:200]


def _names(targets: object) -> str:
    """The names of the entities among these targets, or of the areas if there are none."""
    listed = [target for target in targets if isinstance(target, dict)] if isinstance(targets, list) else []
    entities = [target for target in listed if target.get("type") == "entity"] or listed
    return ", ".join(str(target.get("name")) for target in entities)


def _value(key: str, value: object) -> str:
    """An attribute as people say it: Home Assistant counts brightness to 255 and volume to 1."""
    try:
        number = float(str(value))
    except ValueError:
        return str(value)
    if key == "brightness":
        number = round(number / 2.55)
    elif key == "volume_level":
        number = round(number * 100)
    return f"{number:g}"

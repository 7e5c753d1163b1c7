"""Reads the devices of a home from the system prompt that Home Assistant sends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

NO_AREA = "no area"
"""How the short prompt names the place of devices that are in no area."""

_LIST = re.compile(r"^- (?:names|domain|areas|state):", re.MULTILINE)
_HERE = re.compile(r"You are in area (.+?)(?: \(floor .+?\))? and all generic commands")


@dataclass(frozen=True)
class Device:
    """An entity: its name and aliases, its domain, and the names of its area, the usual ones first."""

    names: tuple[str, ...]
    domain: str
    areas: tuple[str, ...] = ()
    state: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The usual name, which calls use."""
        return self.names[0]

    @property
    def area(self) -> str | None:
        """The usual name of the area; None for a device in no area."""
        return self.areas[0] if self.areas else None

    def entry(self) -> dict[str, Any]:
        """The device as Home Assistant lists it, with its state if it is known."""
        entry: dict[str, Any] = {"names": ", ".join(self.names), "domain": self.domain}
        if self.state is not None:
            entry["state"] = self.state
        if self.areas:
            entry["areas"] = ", ".join(self.areas)
        if self.attributes:
            entry["attributes"] = dict(self.attributes)
        return entry


@dataclass(frozen=True)
class Home:
    """The devices of a home, and the area of the microphone if it is known."""

    devices: tuple[Device, ...]
    here: str | None = None

    @property
    def areas(self) -> dict[str, tuple[str, ...]]:
        """The names of each area that has a device, by its usual name."""
        return {device.areas[0]: device.areas for device in self.devices if device.areas}


def read_home(system: str) -> Home:
    """The home of a system prompt; without a list of devices in it, one without devices."""
    here = _HERE.search(system)
    return Home(read_devices(system), here[1].strip() if here else None)


def read_devices(text: str) -> tuple[Device, ...]:
    """The devices that a text lists as YAML; what is before and after the list is ignored.

    A list that is not YAML, as after an edit of the prompt by hand, is read line by line.
    """
    start = _LIST.search(text)
    if start is None:
        return ()
    lines = []
    for line in text[start.start() :].splitlines():
        if line.strip() and not line.startswith(("- ", " ", "'", '"')):
            break
        lines.append(line)
    listed = "\n".join(lines)
    try:
        entries = yaml.safe_load(listed)
    except yaml.YAMLError:
        entries = [_entry(block) for block in re.split(r"^- ", listed, flags=re.MULTILINE)[1:]]
    return tuple(_device(entry) for entry in entries if isinstance(entry, dict) and entry.get("names"))


def listing(devices: Sequence[Device]) -> str:
    """The devices as Home Assistant lists them."""
    text: str = yaml.safe_dump([device.entry() for device in devices], allow_unicode=True, sort_keys=False)
    return text


def _entry(block: str) -> dict[str, str]:
    """The keys and values of a block of lines `key: value`, without their quotes."""
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip().strip("'\"") for key, _, value in pairs if value.strip()}


def _device(entry: Mapping[str, Any]) -> Device:
    attributes = entry.get("attributes")
    state = entry.get("state")
    return Device(
        names=_names(entry["names"]),
        domain=str(entry.get("domain", "")),
        areas=_names(entry.get("areas") or ""),
        state=None if state is None else str(state),
        attributes=attributes if isinstance(attributes, dict) else {},
    )


def _names(value: object) -> tuple[str, ...]:
    return tuple(name.strip() for name in str(value).split(",") if name.strip())

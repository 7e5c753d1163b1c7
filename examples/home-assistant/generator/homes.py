"""Invents homes, and reads the user's own from a YAML file."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from assist.devices import Device, Home, read_devices

from .templates import words

PLACED = {
    "light": (0.85, 3), "switch": (0.3, 2), "fan": (0.25, 1), "cover": (0.35, 2), "climate": (0.3, 1),
    "media_player": (0.3, 1), "sensor": (0.3, 2), "binary_sensor": (0.25, 1), "lock": (0.15, 1), "valve": (0.12, 2),
    "vacuum": (0.15, 1),
}  # fmt: skip
"""For each domain, the chance that an area has devices of it, and how many at most."""
PLACELESS = {"todo": (0.75, 3), "scene": (0.4, 3), "script": (0.3, 2), "weather": (0.4, 1)}
"""The same for domains whose devices are in no area."""


def invent(rng: random.Random) -> Home:
    """A home of 2 to 9 areas with devices of most domains, listed by name as Home Assistant does."""
    areas = _areas(rng)
    devices: list[Device] = []
    for area in areas:
        for domain, (chance, most) in PLACED.items():
            if rng.random() < chance:
                devices += [_device(domain, area, rng) for _ in range(rng.randint(1, most))]
    for domain, (chance, most) in PLACELESS.items():
        if rng.random() < chance:
            devices += [_device(domain, (), rng) for _ in range(rng.randint(1, most))]
    devices += [Device(device.names, "light", device.areas) for device in devices if device.domain == "cover"][
        : rng.random() < 0.15
    ]
    here = rng.choice(areas)[0] if rng.random() < 0.3 else None
    return Home(_distinct(devices), here)


def load_home(path: Path) -> Home:
    """The user's home: areas and devices as in home.yaml, or a list as in Home Assistant's prompt.

    SystemExit with what is wrong with the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        home = Home(read_devices(text))
        if not home.devices:
            raise SystemExit(f"{path}: has no devices; write it like home.yaml")
        return home
    areas: Mapping[str, Mapping[str, Any]] = content.get("areas") or {}
    devices = []
    for entry in _entries(path, content.get("devices")):
        area = entry.get("area")
        if area is not None and area not in areas:
            raise SystemExit(f"{path}: {entry['name']!r} is in the area {area!r}; add it under `areas`")
        aliases = areas[area].get("aliases", ()) if area else ()
        names = (entry["name"], *entry.get("aliases", ()))
        devices.append(Device(names, entry["domain"], (area, *aliases) if area else ()))
    return Home(tuple(sorted(devices, key=lambda device: device.name)), content.get("here"))


def _entries(path: Path, devices: object) -> list[Mapping[str, Any]]:
    """The devices of a file; SystemExit for one without a name, or of a domain that Home Assistant does not send."""
    if not isinstance(devices, list) or not devices:
        raise SystemExit(f"{path}: has no list of devices under `devices`")
    domains = [*PLACED, *PLACELESS]
    for number, entry in enumerate(devices, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise SystemExit(f"{path}: device {number} has no name")
        if entry.get("domain") not in domains:
            known = ", ".join(domains)
            raise SystemExit(f"{path}: {entry['name']!r} has the domain {entry.get('domain')!r}; use one of: {known}")
    return devices


def fill(pattern: str, rng: random.Random, area: str = "") -> str:
    """A pattern of words.yaml with its parts filled in."""
    lists = words()
    return pattern.format(
        area=area,
        room=rng.choice(lists["rooms"]),
        n=rng.randint(1, 4),
        person=rng.choice(lists["persons"]),
        tint=rng.choice(lists["tints"]),
        side=rng.choice(lists["sides"]),
        brand=brand(rng),
        thing=rng.choice(lists["things"]),
        floor=rng.choice(lists["floors"][:3]).title(),
    )


def brand(rng: random.Random) -> str:
    """A made-up name of two or three syllables."""
    return "".join(rng.choice(words()["syllables"]) for _ in range(rng.randint(2, 3))).capitalize()


def _areas(rng: random.Random) -> list[tuple[str, ...]]:
    areas: dict[str, tuple[str, ...]] = {}
    for _ in range(rng.randint(2, 9)):
        name = fill(rng.choice(words()["room_patterns"]), rng)
        alias = words()["room_aliases"].get(name)
        areas[name] = (name, alias) if alias and rng.random() < 0.3 else (name,)
    taken = set(areas)
    return [names if len(names) == 1 or names[1] not in taken else names[:1] for names in areas.values()]


def _device(domain: str, area: tuple[str, ...], rng: random.Random) -> Device:
    patterns = words()["names"][domain]
    usual = area[0] if area else rng.choice(words()["rooms"])
    if rng.random() < 0.3:
        # The fan of "Bedroom 2" is often called "Bedroom Fan".
        usual = usual.rstrip("0123456789 ")
    name = fill(rng.choice(patterns), rng, usual)
    names = [name]
    if rng.random() < 0.08:
        names.append(fill(rng.choice(patterns), rng, usual))
    if rng.random() < 0.1:
        names = [text.lower() if rng.random() < 0.5 else text.capitalize() for text in names]
    return Device(tuple(dict.fromkeys(names)), domain, area)


def _distinct(devices: list[Device]) -> tuple[Device, ...]:
    """The devices by name, without any that has the names of another of the same domain and area."""
    seen: dict[tuple[str, ...], Device] = {}
    for device in devices:
        if all((name.lower(), device.domain, *device.areas) not in seen for name in device.names):
            for name in device.names:
                seen[name.lower(), device.domain, *device.areas] = device
    kept = {id(device): device for device in seen.values()}
    return tuple(sorted(kept.values(), key=lambda device: device.name))

"""What a sentence is about: a device, an area's devices, all of a domain, or none that exists; in words and as a call.

The rules of this assistant are here. An area with a domain is one target, however many devices it has. A thing without
an area is the only one of the home, or that of the microphone's area, or else the answer asks which one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assist.calls import TOOLS, Call, target_of
from assist.devices import Device, Home
from assist.pick import names_area
from assist.words import content, said, share_said, spoken, tokens

from .homes import brand
from .templates import words


@dataclass(frozen=True)
class Target:
    """A target in words, and as it is in a call; `answer` is the answer if no call can be made."""

    phrase: str
    domain: str
    call: Call
    answer: dict[str, Any] | None = None


def make_call(name: str, target: Target, values: Call) -> Call:
    """The call of a tool for a target, with its keys in the order of the schema."""
    domain = {"domain": target.domain} if TOOLS[name].says_domain else {}
    return {"call": name, **domain, **target.call, **values}


def of_device(home: Home, device: Device, rng: random.Random) -> Target:
    """A device by its name, an alias, or its name and area."""
    name = rng.choice(device.names) if rng.random() < 0.5 else device.name
    phrase = name.lower()
    call = target_of(device, home.devices)
    if "area" in call or (device.area and rng.random() < 0.15 and not names_area([device.area], spoken(name))):
        phrase = f"{phrase} in the {rng.choice(device.areas).lower()}" if device.areas else phrase
    elif rng.random() < 0.2:
        phrase = _shortened(home, device, phrase, rng)
    if "'s" not in phrase and device.domain not in {"scene", "script"} and rng.random() < 0.75:
        phrase = f"{rng.choice(('the', 'the', 'the', 'my'))} {phrase}"
    return Target(phrase, device.domain, call)


def of_area(home: Home, area: str, domain: str, rng: random.Random) -> Target | None:
    """The devices of a domain in an area; None if no word means just these."""
    inside = [device for device in home.devices if device.domain == domain and device.area == area]
    one, many = noun(inside, domain, rng)
    if not inside or len(meant(inside, one, domain)) not in {0, len(inside)}:
        return None
    place = rng.choice(inside[0].areas).lower()
    several = len(inside) > 1 or rng.random() < 0.2
    word = many if several else one
    forms = [f"the {place} {word}", f"the {word} in the {place}", f"{place} {word}", f"the {word} in {place}"]
    if several:
        forms += [f"all {many} in the {place}", f"all the {place} {many}", f"every {one} in the {place}"]
    phrase = rng.choice(forms)
    named = [device for device in home.devices if device.domain == domain and is_called(device, phrase)]
    call = target_of(named[0], home.devices) if len(named) == 1 and len(inside) > 1 else {"area": area}
    return Target(phrase, domain, call)


def of_domain(home: Home, domain: str, rng: random.Random, *, every: bool = False) -> Target:
    """`the light`, or with `every` `all lights`: the only one, those of the microphone's area, or a question."""
    devices = [device for device in home.devices if device.domain == domain]
    one, many = noun(devices, domain, rng)
    if every:
        # Every lock is that of a door, whatever its name.
        doors = domain == "lock" and (one == "door" or rng.random() < 0.5)
        one, many = ("door", "doors") if doors else (one, many)
        phrase = rng.choice((f"all {many}", f"all the {many}", f"every {one}", f"all of the {many}"))
        call = unnamed(home, devices if doors else meant(devices, one, domain) or devices)
    else:
        phrase = rng.choice((f"the {one}", f"the {one}", f"my {one}", f"a {one}", f"the {many}"))
        call = unnamed(home, meant(devices, one, domain) or devices)
    return Target(phrase, domain, call) if call is not None else Target(phrase, domain, {}, {"ask": domain})


def unnamed(home: Home, devices: Sequence[Device]) -> Call | None:
    """The target of a sentence that may mean any of these devices; None if that has to be asked."""
    if len(devices) == 1:
        return target_of(devices[0], home.devices)
    near = [device for device in devices if home.here and device.area == home.here]
    if not near:
        return None
    others = [device for device in home.devices if device.domain == near[0].domain and device.area == home.here]
    if len(others) == len(near):
        return {"area": home.here}
    return target_of(near[0], home.devices) if len(near) == 1 else None


def of_floor(home: Home, domain: str, rng: random.Random) -> Target | None:
    """The devices of a domain on a floor, whose word is copied; None if a device has the floor in its name."""
    floor = rng.choice(words()["floors"])
    if any(said(word, spoken(" ".join(device.names))) for device in home.devices for word in tokens(floor)):
        return None
    if floor.title() in home.areas:
        return None
    _, many = words()["nouns"][domain][0]
    forms = (f"the {many} {floor}", f"all the {many} {floor}", f"the {floor} {many}", f"all {many} on the {floor}")
    return Target(rng.choice(forms[:3] if floor.endswith("stairs") else forms), domain, {"floor": floor})


def missing(home: Home, domain: str, rng: random.Random) -> Target | None:
    """Something that the home does not have, in an area that it may have; None if it has it after all."""
    one, many = words()["nouns"][domain][0] if domain in words()["nouns"] else (domain, domain)
    area = rng.choice([*home.areas, *rng.sample(words()["rooms"], 4)])
    if rng.random() < 0.25:
        phrase = f"the {brand(rng)} {one}".lower()
    else:
        phrase = rng.choice((f"the {one} in the {area}", f"the {area} {one}", f"the {many} in the {area}")).lower()
    for device in home.devices:
        # A device or an area that these words may name as well.
        near = names_area(device.areas, spoken(phrase)) or any(
            share_said(area, spoken(name)) == 1 for name in device.names
        )
        if device.domain == domain and (
            near or any(share_said(name, spoken(phrase), tokens(f"{one} {many}")) for name in device.names)
        ):
            return None
        if is_called(device, phrase):
            return None
    return Target(phrase, domain, {}, {"missing": domain})


def noun(devices: Sequence[Device], domain: str, rng: random.Random) -> tuple[str, str]:
    """What to call these devices, singular and plural: the usual word, or one from the name of one of them."""
    nouns = words()["nouns"].get(domain, [[domain, f"{domain}s"]])
    named = [pair for pair in nouns if any(share_said(pair[0], spoken(device.name)) == 1 for device in devices)]
    one, many = rng.choice(named) if named and (domain in {"cover", "valve"} or rng.random() < 0.5) else nouns[0]
    return one, many


def meant(devices: Sequence[Device], one: str, domain: str) -> list[Device]:
    """The devices whose names have this word; all for the usual word of the domain."""
    if one == words()["nouns"].get(domain, [[domain]])[0][0]:
        return list(devices)
    return [device for device in devices if any(share_said(one, spoken(name)) == 1 for name in device.names)]


def is_called(device: Device, phrase: str) -> bool:
    """Whether a phrase has just the words of one of the device's names."""
    return any(sorted(content(tokens(name))) == sorted(content(tokens(phrase))) for name in device.names)


def _shortened(home: Home, device: Device, phrase: str, rng: random.Random) -> str:
    """The name without one of its words, if no other device can be meant by the rest."""
    parts = phrase.split()
    if len(parts) < 2:
        return phrase
    del parts[rng.randrange(len(parts))]
    rest = " ".join(parts)
    general = {word for pair in words()["nouns"].get(device.domain, []) for text in pair for word in tokens(text)}
    if set(content(tokens(rest))) <= general or not content(tokens(rest)):
        return phrase
    for other in home.devices:
        texts = spoken(" ".join((*other.names, *other.areas)))
        if other is not device and all(said(word, texts) for word in content(tokens(rest))):
            return phrase
    return rest

"""Orders: sentences that name a device, an area or a domain, and the calls that they mean."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assist.calls import MAY_BE_MISSING, Call, target_of
from assist.devices import Device, Home

from . import targets
from .targets import Target, make_call
from .templates import choose, sentences, words
from .values import value

Answer = list[Call] | dict[str, Any]
WEIGHTS = {
    "light": 6, "media_player": 5, "cover": 4, "vacuum": 4, "climate": 3, "lock": 3, "fan": 3, "switch": 3, "valve": 3,
    "scene": 1, "script": 1,
}  # fmt: skip
"""How often orders are about each domain that a home has."""


@dataclass(frozen=True)
class Said:
    """A sentence and its answer; `copied` is a text in the answer that has to be as the sentence has it.

    `before` is the turn before: its sentence and answer.
    """

    sentence: str
    answer: Answer
    copied: str | None = None
    before: tuple[str, Answer] | None = None
    timers: bool = True


@dataclass(frozen=True)
class Order:
    """One order in parts: the sentence with `{it}`, the tool, the values, and what `{it}` is."""

    template: str
    call: str
    values: Call
    target: Target
    copied: str | None = None

    @property
    def said(self) -> Said:
        """The sentence and its answer."""
        return Said(self.template.replace("{it}", self.target.phrase), self.answer, self.copied)

    @property
    def answer(self) -> Answer:
        """The call, or what else the target stands for."""
        return self.target.answer or [make_call(self.call, self.target, self.values)]


def order(home: Home, rng: random.Random, *, training: bool, callable_only: bool = False) -> Order | None:
    """An order of any kind for what the home has; None if this draw means nothing clear."""
    domains = {device.domain for device in home.devices}
    kinds = {
        domain: [kind for kind in sentences()["orders"].values() if domain in kind["domains"]]
        for domain in sorted(domains & WEIGHTS.keys())
    }
    if not kinds:
        return None
    domain = rng.choices([*kinds], [WEIGHTS[name] for name in kinds])[0]
    kind = rng.choice(kinds[domain])
    target = any_target(home, domain, rng)
    if target is None or (callable_only and target.answer is not None):
        return None
    return build(kind, target, rng, training=training)


def build(kind: Mapping[str, Any], target: Target, rng: random.Random, *, training: bool) -> Order:
    """An order of a kind of sentences.yaml for a target."""
    parts, values = value(kind["value"], rng) if "value" in kind else ({}, dict(kind.get("fixed", {})))
    template = choose(kind["say"], rng, training=training)
    for name, text in parts.items():
        template = template.replace(f"{{{name}}}", text)
    copied = values.get("search_query")
    return Order(template, kind["call"], values, target, copied)


def any_target(home: Home, domain: str, rng: random.Random) -> Target | None:
    """A target of the domain: mostly a device or an area; sometimes all, any or none."""
    devices = [device for device in home.devices if device.domain == domain]
    draw = rng.random()
    if draw < 0.48 or domain in {"scene", "script"}:
        return targets.of_device(home, rng.choice(devices), rng)
    if draw < 0.69:
        areas = sorted({device.area for device in devices if device.area})
        return targets.of_area(home, rng.choice(areas), domain, rng) if areas else None
    if draw < 0.82:
        return targets.of_domain(home, domain, rng)
    if draw < 0.9:
        return targets.of_domain(home, domain, rng, every=True)
    if draw < 0.93 and domain in {"light", "cover", "fan", "switch"}:
        return targets.of_floor(home, domain, rng)
    return targets.missing(home, domain, rng)


def absent(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """An order for a domain of which the home has nothing."""
    domains = {device.domain for device in home.devices}
    kinds = [kind for kind in sentences()["orders"].values() if not domains & set(kind["domains"])]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    domain = rng.choice(kind["domains"])
    if domain not in MAY_BE_MISSING:
        return None
    one, _ = rng.choice(words()["nouns"].get(domain, [[domain, domain]]))
    if domain == "lock" and one == "door" and rng.random() < 0.6:
        phrase = f"the {rng.choice(words()['entrances'])} {one}"
    else:
        area = rng.choice([*home.areas, *rng.sample(words()["rooms"], 2)]).lower()
        phrase = rng.choice((f"the {one}", f"the {area} {one}", f"the {one} in the {area}"))
    if any(targets.is_called(device, phrase) for device in home.devices):
        return None
    return build(kind, Target(phrase, domain, {}, {"missing": domain}), rng, training=training).said


def untargeted(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """An order that names no device, such as `next song`."""
    domain, kind = _kind(home, "untargeted", rng)
    if kind is None:
        return None
    devices = [device for device in home.devices if device.domain == domain]
    call = targets.unnamed(home, devices)
    if call is None and domain == "media_player":
        # Home Assistant finds the player that plays.
        target = Target("", domain, {})
    else:
        target = Target("", domain, call or {}, None if call is not None else {"ask": domain})
    return build(kind, target, rng, training=training).said


def in_area(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """An order that names an area only, such as `vacuum the hall`."""
    domain, kind = _kind(home, "in_area", rng)
    if kind is None:
        return None
    devices = devices_of(home, domain)
    if domain == "vacuum" and rng.random() < 0.4 and (made := _on_floor(home, devices, kind, rng, training=training)):
        return made
    areas = sorted({device.area for device in devices if device.area})
    area = rng.choice(areas) if areas and rng.random() < 0.85 else rng.choice([*home.areas] or [""])
    if not area:
        return None
    if area in areas:
        target = Target("", domain, {"area": area})
    elif domain == "vacuum" and len(devices) == 1:
        target = Target("", domain, target_of(devices[0], home.devices))
    else:
        target = Target("", domain, {}, {"missing": domain})
    built = build(kind, target, rng, training=training)
    name = rng.choice(home.areas[area]).lower()
    return Said(built.template.replace("{area}", name), built.answer, built.copied)


def _on_floor(
    home: Home, devices: Sequence[Device], kind: Mapping[str, Any], rng: random.Random, *, training: bool
) -> Said | None:
    """An order for the one device that has a floor in its name, such as `vacuum upstairs`; None without one."""
    floor = rng.choice(words()["floors"])
    named = [device for device in devices if floor in device.name.lower()]
    if len(named) != 1:
        return None
    built = build(kind, Target("", named[0].domain, target_of(named[0], home.devices)), rng, training=training)
    article = "" if floor.endswith("stairs") else "the "
    return Said(built.template.replace("the {area}", "{area}").replace("{area}", article + floor), built.answer)


def everything(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """`turn off everything in the kitchen`: a call for each domain that the area has."""
    if not home.areas:
        return None
    area = rng.choice([*home.areas])
    tool = rng.choice(("TurnOff", "TurnOff", "TurnOn"))
    inside = {device.domain for device in home.devices if device.area == area}
    calls = [
        make_call(tool, Target("", domain, {"area": area}), {})
        for domain in ("light", "switch", "fan", "media_player")
        if domain in inside
    ]
    if not calls:
        return None
    template = choose(sentences()["everything"][tool], rng, training=training)
    return Said(template.replace("{area}", rng.choice(home.areas[area]).lower()), calls)


def several(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """Two orders in one sentence, or one order for two devices."""
    first = order(home, rng, training=training, callable_only=True)
    if first is None:
        return None
    if rng.random() < 0.45:
        other = _other_target(home, first.target, rng)
        if other is None:
            return None
        phrase = f"{first.target.phrase} and {rng.choice(('', '', 'also '))}{other.phrase}"
        calls = [make_call(first.call, target, first.values) for target in (first.target, other)]
        return Said(first.template.replace("{it}", phrase), calls, first.copied)
    second = order(home, rng, training=training, callable_only=True)
    if second is None or second.target.call == first.target.call or (first.copied and second.copied):
        return None
    sentence = choose(sentences()["several"], rng, training=training)
    one, two = first.said, second.said
    calls = [*_calls(one.answer), *_calls(two.answer)]
    return Said(sentence.format(one=one.sentence, two=two.sentence), calls, first.copied or second.copied)


def _other_target(home: Home, target: Target, rng: random.Random) -> Target | None:
    """Another target for the same order."""
    other = any_target(home, target.domain, rng)
    return other if other and other.answer is None and other.call != target.call else None


def _calls(answer: Answer) -> list[Call]:
    return answer if isinstance(answer, list) else []


def _kind(home: Home, group: str, rng: random.Random) -> tuple[str, Mapping[str, Any] | None]:
    """A domain of the home and one of its kinds of sentences in a group."""
    domains = sorted({device.domain for device in home.devices} & set(sentences()[group]))
    if not domains:
        return "", None
    domain = rng.choice(domains)
    return domain, rng.choice(sentences()[group][domain])


def devices_of(home: Home, domain: str) -> list[Device]:
    """The devices of a domain."""
    return [device for device in home.devices if device.domain == domain]

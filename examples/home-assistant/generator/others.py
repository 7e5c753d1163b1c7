"""Sentences that are not a single order: follow-ups, questions, lists, timers and talk."""

from __future__ import annotations

import random
from typing import Any

from assist.calls import Call, target_of
from assist.devices import Device, Home
from assist.words import said, share_said, spoken, tokens

from . import targets
from .orders import Answer, Said, any_target, devices_of, order
from .targets import make_call
from .templates import choose, sentences, words
from .values import duration, value

_MEDIA_OFF = {"TurnOn": "TurnOff", "TurnOff": "TurnOn"}


def follow_up(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """A sentence that only the turn before makes clear."""
    first = order(home, rng, training=training)
    if first is None or first.copied:
        return None
    before = first.said.sentence, first.answer
    more = sentences()["more"]
    if isinstance(first.answer, dict):
        return (
            _chosen(home, before, first.call, first.values, rng, training=training) if "ask" in first.answer else None
        )
    if first.call in more["reverse"] and rng.random() < 0.4:
        sentence = choose(more["reverse"][first.call], rng, training=training)
        return Said(sentence, [make_call(_MEDIA_OFF[first.call], first.target, first.values)], before=before)
    argument = next(iter(first.values), None)
    if argument in {"brightness", "position", "percentage", "volume_level"} and rng.random() < 0.5:
        parts, values = value(argument, rng)
        sentence = choose(more["value"], rng, training=training).format(**parts)
        return Said(sentence, [make_call(first.call, first.target, values)], before=before)
    other = any_target(home, first.target.domain, rng)
    if other is None or other.answer is not None or other.call == first.target.call:
        return None
    sentence = choose(more["same"], rng, training=training).format(it=other.phrase)
    return Said(sentence, [make_call(first.call, other, first.values)], before=before)


def _chosen(
    home: Home, before: tuple[str, Answer], call: str, values: Call, rng: random.Random, *, training: bool
) -> Said | None:
    """The answer to the question which one."""
    assert isinstance(before[1], dict)
    domain = before[1]["ask"]
    devices = devices_of(home, domain)
    if rng.random() < 0.5:
        target = targets.of_device(home, rng.choice(devices), rng)
        sentence = choose(sentences()["more"]["answer"], rng, training=training).format(it=target.phrase)
    else:
        areas = sorted({device.area for device in devices if device.area})
        if not areas:
            return None
        area = rng.choice(areas)
        target = targets.Target(area.lower(), domain, {"area": area})
        sentence = choose(sentences()["more"]["answer_area"], rng, training=training).format(area=area.lower())
    return Said(sentence, [make_call(call, target, values)], before=before)


def question(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """A question about states, the weather or the time."""
    asked = sentences()["questions"]
    draw = rng.random()
    if draw < 0.12:
        return Said(choose(asked["time"], rng, training=training), [{"call": "GetDateTime"}])
    if draw < 0.2:
        weather = {"domain": "weather"} if devices_of(home, "weather") else {}
        return Said(choose(asked["weather"], rng, training=training), [{"call": "GetLiveContext", **weather}])
    if draw < 0.35 and home.areas:
        area = rng.choice([*home.areas])
        sentence = choose(asked["area_warmth"], rng, training=training).format(
            area=rng.choice(home.areas[area]).lower()
        )
        return Said(sentence, [{"call": "GetLiveContext", "area": area}])
    device = rng.choice(home.devices)
    if draw < 0.5 and device.domain in words()["nouns"] and device.domain not in {"todo", "scene", "script"}:
        one, many = targets.noun([device], device.domain, rng)
        area_known = device.area is not None and rng.random() < 0.5
        group = "area_any" if area_known else f"any_{device.domain}" if f"any_{device.domain}" in asked else "any"
        template = choose(asked[group], rng, training=training)
        sentence = template.format(noun=one, nouns=many, area=(device.area or "").lower())
        return Said(
            sentence,
            [{"call": "GetLiveContext", "domain": device.domain, **({"area": device.area} if area_known else {})}],
        )
    if device.domain in {"todo", "scene", "script", "weather"}:
        return None
    target = _asked(home, device, rng)
    group = "sensor" if "sensor" in device.domain else device.domain if device.domain in asked else "device"
    sentence = choose(asked[group], rng, training=training).format(it=target.phrase)
    return Said(sentence, [make_call("GetLiveContext", target, {})])


def _asked(home: Home, device: Device, rng: random.Random) -> targets.Target:
    if device.area and rng.random() < 0.3 and (target := targets.of_area(home, device.area, device.domain, rng)):
        return target
    return targets.of_device(home, device, rng)


def on_list(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    """An item for a to-do list, or a question about it."""
    lists = devices_of(home, "todo")
    if not lists:
        item = rng.choice(words()["items"])
        sentence = choose(sentences()["lists"]["add"], rng, training=training)
        return Said(sentence.format(item=item, list="the shopping list"), {"missing": "todo"})
    kind, tool = rng.choice(
        [("add", "ListAddItem")] * 6
        + [("done", "ListCompleteItem"), ("remove", "ListRemoveItem"), ("read", "ListItems")]
    )
    phrase, call = _list(home, lists, rng)
    template = choose(sentences()["lists"][kind], rng, training=training)
    if kind == "read":
        return Said(template.format(list=phrase), [{"call": tool, **call}] if call else {"ask": "todo"})
    items = rng.sample(words()["items"], 2 if rng.random() < 0.12 else 1)
    sentence = template.format(item=" and ".join(items), list=phrase)
    answer: Answer = [{"call": tool, **call, "item": item} for item in items] if call else {"ask": "todo"}
    return Said(sentence, answer, items[0] if len(items) == 1 and call else None)


def _list(home: Home, lists: list[Device], rng: random.Random) -> tuple[str, dict[str, Any] | None]:
    """A list in words, and its target; None where the words may mean several."""
    if rng.random() < 0.25:
        phrase = rng.choice(("the list", "my list", "the to-do list", "the list please"))
        fit = [
            device
            for device in lists
            if all(said(word, spoken(device.name)) for word in tokens(phrase)[1:] if word in {"to", "do"})
        ]
        one = lists if len(lists) == 1 else [device for device in fit if phrase == "the to-do list"]
        if phrase == "the to-do list" and len(lists) > 1 and not one:
            return "the list", None
        return phrase.removesuffix(" please"), target_of(one[0], home.devices) if len(one) == 1 else None
    device = rng.choice(lists)
    name = rng.choice(device.names).lower()
    if rng.random() < 0.3:
        name = name.replace("'s", "s")
    if not share_said("list", spoken(name)) and rng.random() < 0.7:
        name = f"{name} list"
    article = "" if "'s" in name and rng.random() < 0.5 else rng.choice(("the ", "the ", "my ", ""))
    return article + name, target_of(device, home.devices)


def timer(home: Home, rng: random.Random, *, training: bool) -> Said:
    """A sentence about timers; in a third of the cases on a device that has none."""
    said_of = sentences()["timers"]
    kind = rng.choice(
        ("start", "start", "start", "named", "named", "cancel", "cancel_named", "cancel_all", "status", "status_named")
    )
    name = rng.choice(words()["timers"])
    time, parts = duration(rng)
    sentence = choose(said_of[kind], rng, training=training).format(time=time, name=name)
    if kind == "cancel_all":
        return Said(sentence, [{"call": "CancelAllTimers"}], timers=rng.random() < 0.5)
    if rng.random() < 0.33:
        return Said(sentence, {"missing": "timer"}, timers=False)
    named = {"name": name} if "named" in kind else {}
    tool = {"start": "StartTimer", "named": "StartTimer", "cancel": "CancelTimer", "status": "TimerStatus"}[
        kind.split("_")[0]
    ]
    return Said(sentence, [{"call": tool, **(parts if tool == "StartTimer" else {}), **named}])


def talk(home: Home, rng: random.Random, *, training: bool) -> Said:
    """A sentence that is not about the home."""
    return Said(choose(sentences()["talk"], rng, training=training), {"talk": True})

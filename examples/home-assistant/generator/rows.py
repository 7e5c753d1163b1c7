"""Makes the rows of the adapter `calls`: a home, what is said in it, the short prompt, and the answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Iterator

from assist.calls import TOOLS, Call
from assist.devices import Device, Home
from assist.pick import pick
from assist.prompt import calls_prompt

from . import orders, others
from .homes import invent
from .orders import Answer, Said
from .speech import say

Row = dict[str, str]
Maker = Callable[..., Said | None]


def _ordered(home: Home, rng: random.Random, *, training: bool) -> Said | None:
    made = orders.order(home, rng, training=training)
    return made.said if made else None


MAKERS: tuple[tuple[Maker, float], ...] = (
    (_ordered, 43), (orders.untargeted, 8), (orders.in_area, 6), (orders.several, 9), (orders.everything, 1),
    (orders.absent, 4), (others.follow_up, 6), (others.question, 10), (others.on_list, 8), (others.timer, 3),
    (others.talk, 2),
)  # fmt: skip
"""What makes sentences, and how often."""
PER_HOME = 8
"""Rows of one invented home before the next is invented."""


def rows(
    seed: str, home: Home | None, share: float, *, training: bool, excluded: Collection[str] = ()
) -> Iterator[Row]:
    """Endless rows, the same for the same seed: this `share` of them about `home`, the others about invented homes.

    `excluded` sentences, as `normal` writes them, do not occur.
    """
    rng = random.Random(seed)
    number = 0
    invented = invent(rng)
    while True:
        own = home is not None and rng.random() < share
        at = home if own and home is not None else invented
        row = _row(at, rng, training=training, excluded=excluded)
        if row is None:
            continue
        yield row
        number += 1
        if number % PER_HOME == 0:
            invented = invent(rng)


def normal(sentence: str) -> str:
    """A sentence in small letters, without punctuation and politeness, to compare it with others."""
    text = re.sub(r"[^\w\s%]", "", sentence.lower())
    return re.sub(r"\s+", " ", re.sub(r"\bplease\b", "", text)).strip()


def _row(home: Home, rng: random.Random, *, training: bool, excluded: Collection[str]) -> Row | None:
    maker = rng.choices([maker for maker, _ in MAKERS], [weight for _, weight in MAKERS])[0]
    made = maker(home, rng, training=training)
    if made is None or len(made.answer) > 6:
        return None
    sentence = say(made.sentence, rng)
    answer = made.answer
    if made.copied is not None:
        match = re.search(re.escape(made.copied), sentence, re.IGNORECASE)
        if match is None:
            sentence, match = made.sentence, re.search(re.escape(made.copied), made.sentence)
        answer = _copied(answer, made.copied, match[0] if match else made.copied)
    if normal(sentence) in excluded:
        return None
    before = (made.before[0], _json(made.before[1])) if made.before else None
    heard = f"{before[0]} {sentence}" if before else sentence
    devices = pick(home, heard)
    if not _answerable(answer, devices, home, heard):
        return None
    prompt = calls_prompt(sentence, devices, home.here, before, timers=made.timers)
    return {"prompt": prompt, "completion": _json(answer)}


def _answerable(answer: Answer, devices: Collection[Device], home: Home, heard: str) -> bool:
    """Whether the prompt and what was heard have what the answer is about; a typo may have hidden it."""
    if isinstance(answer, dict):
        return "ask" not in answer or sum(device.domain == answer["ask"] for device in devices) > 1
    return all(_possible(call, devices, home, heard) for call in answer)


def _possible(call: Call, devices: Collection[Device], home: Home, heard: str) -> bool:
    """Whether the schema of the request, which has only what is in the prompt, allows this call."""
    tool = TOOLS[call["call"]]
    if not tool.targets:
        return True
    domains = {call["domain"]} if "domain" in call else tool.domains
    fit = [device for device in devices if domains is None or device.domain in domains]
    return (
        (bool(fit) or domains is None)
        and ("name" not in call or any(device.name == call["name"] for device in fit))
        and ("area" not in call or call["area"] == home.here or any(device.area == call["area"] for device in fit))
        and call.get("floor", "") in heard.lower()
    )


def _copied(answer: Answer, text: str, written: str) -> Answer:
    """The answer with a text as the sentence has it."""
    if isinstance(answer, dict):
        return answer
    return [{key: written if value == text else value for key, value in call.items()} for call in answer]


def _json(answer: Answer) -> str:
    return json.dumps(answer, ensure_ascii=False)

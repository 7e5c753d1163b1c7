"""Picks the devices of a home that a sentence may be about, so that the prompt stays short in a large home."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from .devices import Device, Home
from .words import said, share_said, spoken, tokens

MAX_DEVICES = 10
"""More devices make the prompt longer than they help; a sentence about one domain of a large home reaches the limit."""

DOMAIN_WORDS: dict[str, str] = {
    "light": "light lamp bulb chandelier spotlight dim brighten bright brighter dimmer brightness dark darker glow "
    "lighting lit color colour red green blue yellow orange purple pink white warm",
    "switch": "switch plug socket outlet",
    "fan": "fan ventilator ventilation ventilate airflow breeze",
    "cover": "cover blind curtain shutter shade awning drape door gate window garage roller open close shut opened "
    "closed raise lower halfway",
    "lock": "lock unlock bolt locked unlocked door deadbolt gate secure",
    "valve": "valve water watering sprinkler irrigation irrigate tap faucet hose",
    "climate": "thermostat heating heat heater cool cooling cooler degree temperature warm warmer cold colder chilly "
    "hot radiator ac air climate freezing boiling",
    "media_player": "music song track volume speaker tv television radio pause resume skip mute unmute louder quieter "
    "loud quiet play playing player media album podcast movie episode sound audio playback stereo previous next",
    "vacuum": "vacuum hoover robot clean cleaning cleaner dock mop sweep floor base",
    "lawn_mower": "mow mower lawn grass",
    "todo": "list todo task add buy grocery shopping errand need tick cross",
    "scene": "scene mood",
    "script": "script routine run start",
    "weather": "weather rain raining snow sunny forecast umbrella outside wind windy",
    "sensor": "temperature humidity humid battery warm hot cold degree energy power usage air quality reading outside",
    "binary_sensor": "motion open closed shut window door battery leak smoke occupied moving presence home anyone",
    "person": "home who where anyone",
}
"""Words that hint at a domain: what its devices are called, and what is asked of them."""

_QUESTION = re.compile(
    r"\?\s*$|^\W*(?:hey|ok|okay|so|please)?\W*(?:is|are|was|were|what|whats|which|how|hows|who|whos|where|when|did|does|"
    r"do|has|have|any|anyone|tell me|check|status|show me|read me|give me)\b",
    re.IGNORECASE,
)
_READ_ONLY = frozenset({"sensor", "binary_sensor", "weather", "person", "device_tracker", "camera", "sun", "zone"})
_WORDS = {domain: frozenset(tokens(words)) for domain, words in DOMAIN_WORDS.items()}


def is_question(sentence: str) -> bool:
    """Whether a sentence asks rather than orders, by its first words or a question mark."""
    sentence = sentence.strip().replace("'", "")
    order = re.match(r"(?:can|could|would|will) you\b", sentence, re.IGNORECASE)
    return order is None and _QUESTION.search(sentence) is not None


def pick(home: Home, sentence: str, limit: int = MAX_DEVICES) -> tuple[Device, ...]:
    """The devices that a sentence may be about, in the order of the home, at most `limit`.

    A device gets points for the words of its name or an alias that the sentence has, for its area, and for a word
    that hints at its domain. A hint alone is not enough where more is said of another device of the domain. Sensors
    count in questions only. If nothing has a point, the devices of the microphone's area are picked.
    """
    words = spoken(sentence)
    asked = is_question(sentence)
    domains = {device.domain for device in home.devices} & _WORDS.keys()
    hinted = {domain for domain in domains if any(said(word, _WORDS[domain]) for word in words)}
    points = {number: _points(device, words, device.domain in hinted) for number, device in enumerate(home.devices)}
    able = [number for number in points if asked or home.devices[number].domain not in _READ_ONLY]
    chosen = [number for number in able if points[number] > 0] or [number for number in points if points[number] > 0]
    chosen = _without_hinted(chosen, points, home.devices)
    if not chosen:
        chosen = [number for number in able if home.devices[number].area == home.here] or able
    best = sorted(chosen, key=lambda number: (-points[number], number))[:limit]
    return tuple(home.devices[number] for number in sorted(best))


def names_area(areas: Collection[str], words: Collection[str]) -> bool:
    """Whether a sentence, as `spoken` returns it, has all words of one of an area's names."""
    return any(share_said(area, words) == 1 for area in areas)


def _without_hinted(chosen: list[int], points: Mapping[int, float], devices: Sequence[Device]) -> list[int]:
    """Without devices that only their domain speaks for, where more speaks for another of the domain."""
    best: dict[str, float] = {}
    for number in chosen:
        domain = devices[number].domain
        best[domain] = max(best.get(domain, 0), points[number])
    return [number for number in chosen if points[number] > 1 or best[devices[number].domain] < 2]


def _points(device: Device, words: Collection[str], hinted: bool) -> float:
    hints = _WORDS.get(device.domain, frozenset())
    name = max(share_said(name, words, hints) for name in device.names)
    area = names_area(device.areas, words)
    return 2 * name + (name == 1) + area + hinted

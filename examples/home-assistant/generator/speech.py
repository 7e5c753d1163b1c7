"""Makes sentences look like those of people and of speech recognition: politeness, typos, numbers as words."""

from __future__ import annotations

import random
import re

from assist.words import NUMBERS

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_BEFORE = ("please ", "hey, ", "ok, ", "can you ", "could you please ", "now ", "um, ", "i'd like you to ", "so ")
_AFTER = (" please", ", thanks", " now", ", will you", " thank you", " for me")
_STARTS_WITH_ORDER = re.compile(
    r"^(?:turn|switch|set|open|close|lock|unlock|start|stop|put|dim|make|add|run|pause|play|send)\b"
)


def say(sentence: str, rng: random.Random) -> str:
    """The sentence as somebody might write it, or as speech recognition might return it."""
    sentence = _polite(sentence, rng)
    style = rng.random()
    if style < 0.45:
        sentence = _heard(sentence, rng)
    elif style < 0.85:
        sentence = sentence[0].upper() + sentence[1:]
        sentence += rng.choice(("", "", ".", "!" if rng.random() < 0.2 else ""))
    if rng.random() < 0.12:
        sentence = _with_typo(sentence, rng)
    return sentence


def in_words(number: int) -> str:
    """A number of at most three digits as it is spoken; larger ones in digits."""
    if number < 20:
        return NUMBERS[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f" {NUMBERS[ones]}" if ones else "")
    return "one hundred" if number == 100 else str(number)


def _polite(sentence: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.12:
        before = rng.choice(_BEFORE)
        wants_order = before.rstrip().endswith(("you", "to", "please")) and before != "please "
        return sentence if wants_order and not _STARTS_WITH_ORDER.match(sentence) else before + sentence
    if draw < 0.22:
        return sentence + rng.choice(_AFTER)
    return sentence


def _heard(sentence: str, rng: random.Random) -> str:
    text = sentence.lower().replace("%", " percent").replace("°", " degrees")
    if rng.random() < 0.8:
        text = re.sub(r"\d+\.5\b", lambda match: f"{in_words(int(match[0][:-2]))} point five", text)
        text = re.sub(r"\b\d+\b", lambda match: in_words(int(match[0])), text)
    text = re.sub(r"[,.!?:]", "", text)
    return text.replace("'s", "s") if rng.random() < 0.2 else text


def _with_typo(sentence: str, rng: random.Random) -> str:
    places = [match.span() for match in re.finditer(r"\b[A-Za-z]{5,}\b", sentence)]
    if not places:
        return sentence
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 1)
    kind = rng.choice(("drop", "swap", "double"))
    if kind == "drop":
        return sentence[:at] + sentence[at + 1 :]
    if kind == "swap":
        return sentence[:at] + sentence[at + 1] + sentence[at] + sentence[at + 2 :]
    return sentence[:at] + sentence[at] + sentence[at:]

"""Tells whether prompts are in English."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENGLISH = frozenset((
    "the", "is", "to", "and", "of", "please", "what", "my", "it", "for", "in", "on", "turn", "set", "how", "can",
    "you", "a", "i", "me", "at", "off", "up", "down", "this", "that", "with", "all", "from", "are", "not",
    "your", "we", "when", "where", "there", "play", "call", "add", "open", "close", "light", "lights", "room",
    "kitchen", "bedroom", "bathroom", "living", "switch", "make", "get", "show", "tell", "give", "put", "start",
    "stop", "next", "song", "music", "minute", "minutes", "hour", "hours", "degrees", "percent", "weather",
    "tomorrow", "today", "tonight", "morning", "evening", "volume", "lower", "higher", "dim", "bright", "temperature",
    "door", "window", "remind", "find", "book", "order", "ten", "twenty", "thirty", "two", "three", "four", "five",
    "six", "seven", "some", "any", "new", "list", "send", "message", "cancel", "do", "does", "did", "have", "has",
    "want", "need", "like", "much", "many", "time", "day", "week", "about",
))  # fmt: skip
_OTHERS = frozenset((
    "der", "das", "und", "ist", "im", "an", "auf", "aus", "bitte", "mit", "den", "dem", "ein", "eine", "einen", "nicht",
    "zu", "für", "mach", "schalte", "stell", "wie", "von", "el", "los", "las", "por", "del", "una", "uno", "con",
    "para", "que", "pon", "enciende", "apaga", "favor", "en", "luz", "le", "les", "des", "du", "et", "dans", "sur",
    "est", "pour", "avec", "une", "mets", "allume", "il", "lo", "gli", "di", "che", "per", "accendi", "spegni", "nella",
    "della", "luce", "het", "een", "van", "de", "zet", "doe", "aan", "uit", "niet", "op", "naar", "voor", "met",
))  # fmt: skip
"""Frequent words of German, Spanish, French, Italian and Dutch."""
_SHARE = 0.2
"""Share of the words that are frequent ones of English, from which on prompts may be."""
_LAST_LATIN = "\u024f"


def is_english(prompts: Sequence[str]) -> bool:
    """Whether the words of all prompts together are rather English than of another language."""
    words = [word.lower() for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt)]
    english, others = (sum(word in frequent for word in words) for frequent in (_ENGLISH, _OTHERS))
    foreign = sum(max(word) > _LAST_LATIN for word in words)
    return english >= _SHARE * len(words) and english > 2 * (others + foreign)

"""Tells whether prompts are in English."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgetune.tasks.data import TaskRow

_ENGLISH = frozenset((
    "the", "is", "to", "and", "of", "please", "what", "my", "it", "for", "in", "on", "turn", "set", "how", "can",
    "you", "off", "up", "down", "this", "that", "with", "all", "from", "are", "not",
    "your", "we", "when", "where", "there", "play", "call", "add", "open", "close", "light", "lights", "room",
    "kitchen", "bedroom", "bathroom", "living", "switch", "make", "get", "show", "tell", "give", "put", "start",
    "stop", "next", "song", "music", "minute", "minutes", "hour", "hours", "degrees", "percent", "weather",
    "tomorrow", "today", "tonight", "morning", "evening", "volume", "lower", "higher", "dim", "bright", "temperature",
    "door", "window", "remind", "find", "book", "order", "ten", "twenty", "thirty", "two", "three", "four", "five",
    "six", "seven", "some", "any", "new", "list", "send", "message", "cancel", "do", "does", "did", "have", "has",
    "want", "need", "like", "much", "many", "time", "day", "week", "about",
    "would", "could", "should", "been", "were", "had", "they", "them", "their", "but", "after", "before", "because",
    "which", "who", "just", "very", "these", "those", "than", "then", "into", "out",
))  # fmt: skip
_OTHERS = frozenset((
    "der", "das", "und", "ist", "im", "an", "auf", "aus", "bitte", "mit", "den", "dem", "ein", "eine", "einen", "nicht",
    "zu", "für", "mach", "schalte", "stell", "wie", "von", "el", "los", "las", "por", "del", "una", "uno", "con",
    "para", "que", "pon", "enciende", "apaga", "favor", "en", "luz", "le", "les", "des", "du", "et", "dans", "sur",
    "est", "pour", "avec", "une", "mets", "allume", "il", "lo", "gli", "di", "che", "per", "accendi", "spegni", "nella",
    "della", "luce", "het", "een", "van", "de", "zet", "doe", "aan", "uit", "niet", "op", "naar", "voor", "met",
    "ki", "ka", "ko", "karo", "kar", "hai", "mein",
))  # fmt: skip
"""Frequent words of German, Spanish, French, Italian and Dutch, and of Hindi where it has English ones among them."""
_SHARE, _LEAST = 0.25, 3
"""Share of the words that are frequent ones of English, and how many different ones, from which on prompts may be."""


def are_english(rows: Iterable[TaskRow]) -> bool:
    """Whether the turns of the user are in English."""
    return is_english([turn["content"] for row in rows for turn in row.turns if turn["role"] == "user"])


def is_english(prompts: Sequence[str]) -> bool:
    """Whether the words of all prompts together are rather English than of another language."""
    words = [word.lower() for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt)]
    english, others = (sum(word in frequent for word in words) for frequent in (_ENGLISH, _OTHERS))
    foreign = sum(not word.isascii() for word in words)
    several = len(_ENGLISH.intersection(words)) >= _LEAST
    return several and english >= _SHARE * len(words) and english > 2 * (others + foreign)

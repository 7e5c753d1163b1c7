"""Text -> hashed words, pairs of words and groups of letters: the features of a router. No tokenizer and no model."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAX_CHARACTERS = 2000
"""Only the beginning and the end of a longer text are read: that is where a task is named."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
"""A word, a Chinese or Japanese character, or another sign."""
_LETTERS = (4, 5, 6)


class Features(NamedTuple):
    """The buckets that occur in a text, and their values, whose squares add up to 1 (0 for an empty text)."""

    buckets: NDArray[np.int32]
    values: NDArray[np.float32]


def count_buckets(text: str, buckets: int) -> Counter[int]:
    """How often the text has parts of each bucket; case makes no difference, nor which digits a number has."""
    return Counter(zlib.crc32(part.encode(errors="replace")) % buckets for part in _parts(text))


def features(counts: Counter[int], rarities: NDArray[np.floating]) -> Features:
    """The features of a text with these counts; those of rare buckets have larger values."""
    buckets = np.fromiter(counts, np.int32, len(counts))
    values = np.sqrt(np.fromiter(counts.values(), np.float32, len(counts))) * rarities[buckets]
    length = max(float(np.linalg.norm(values)), 1e-9)
    return Features(buckets, (values / length).astype(np.float32))


def _parts(text: str) -> list[str]:
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[: _MAX_CHARACTERS // 2]} {text[-_MAX_CHARACTERS // 2 :]}"
    words = _WORD.findall(re.sub(r"\d", "0", unicodedata.normalize("NFKC", text).casefold()))
    spaced = f" {' '.join(words)} "
    # With a line break, which no word has.
    letters = [f"\n{spaced[start : start + n]}" for n in _LETTERS for start in range(len(spaced) - n + 1)]
    return [*words, *map(" ".join, pairwise(words)), *letters]

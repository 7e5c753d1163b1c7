"""Loads the words and sentences, and splits the sentences: some are for validation and test rows only."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
EVERY = 9
"""One template of so many is kept out of training."""


@cache
def words() -> dict[str, Any]:
    """The content of words.yaml."""
    return dict(yaml.safe_load((HERE / "words.yaml").read_text(encoding="utf-8")))


@cache
def sentences() -> dict[str, Any]:
    """The content of sentences.yaml."""
    return dict(yaml.safe_load((HERE / "sentences.yaml").read_text(encoding="utf-8")))


def is_held_out(template: str) -> bool:
    """Whether training never sees this template."""
    return zlib.crc32(template.encode()) % EVERY == 0


def choose(templates: Sequence[str], rng: random.Random, *, training: bool) -> str:
    """One of the templates; in training none that is held out, otherwise one that is in half of the cases."""
    held_out = [template for template in templates if is_held_out(template)]
    in_training = [template for template in templates if template not in held_out]
    if training or not held_out:
        return rng.choice(in_training or templates)
    return rng.choice(held_out if rng.random() < 0.5 or not in_training else in_training)

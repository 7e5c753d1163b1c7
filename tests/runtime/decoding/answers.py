"""Answers by chance under a constraint: tokens drawn from random logits, as by a model that knows nothing."""

from __future__ import annotations

from functools import cache

import numpy as np
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.engines.base import Tokenizer

TEMPERATURE = 1.5
MOST = 2000
CLOSING = 3.0
"""How much likelier tokens are that close something, so that answers are as short as those of a model."""


@cache
def leaning_of(tokenizer: Tokenizer) -> np.ndarray:
    """What is added to each token's logit."""
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    return np.array([CLOSING * sum(map(piece.count, (b'"', b"}", b"]"))) for piece in pieces], np.float32)


@cache
def noise_of(size: int) -> np.ndarray:
    """Gumbel noise at the temperature on normal logits; a place takes a part of it that begins anywhere."""
    random = np.random.default_rng(0)
    return (random.normal(0, 2, 4 * size) + TEMPERATURE * random.gumbel(size=4 * size)).astype(np.float32)


def random_answer(constraint: Constraint, tokenizer: Tokenizer, random: np.random.Generator, *, force: bool) -> bytes:
    """The bytes of one whole answer; with `force`, tokens that must come are taken without a draw."""
    answer: list[int] = []
    leaning, noise = leaning_of(tokenizer), noise_of(tokenizer.vocab_size)
    while not constraint.is_complete and len(answer) < MOST:
        tokens = constraint.forced() if force else []
        if not tokens:
            start = int(random.integers(len(noise) - len(leaning)))
            logits = constraint.mask(leaning + noise[start : start + len(leaning)])
            assert logits is not None
            tokens = [int(logits.argmax())]
            assert tokenizer.is_end(tokens[0]) <= constraint.may_end
        constraint.accept(*tokens)
        answer += tokens
    assert constraint.is_complete
    assert constraint.may_end
    return b"".join(map(tokenizer.piece, answer))

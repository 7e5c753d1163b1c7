"""Judges the answers of rows with a model: how likely they are to it, and what it answers instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from edgetune_runtime.engines.base import Tokenizer

from edgetune.objectives.base import row_length
from edgetune.objectives.example import Example
from edgetune.progress import Step
from edgetune.shipping.verify import LogitsOf, logits_of
from edgetune.tasks.data import TaskRow
from edgetune.training.schedule import passes

from .findings import JudgedRow

_LOGITS_PER_PASS = 2**25
_WRONG = 0.1
"""An answer is called probably wrong if a token of it is so much less likely than another one in its place."""
# The model's own answer may be this much longer than that of the row.
_LENGTH_FACTOR, _EXTRA_TOKENS = 1.5, 16


@dataclass(frozen=True)
class _Likelihood:
    """How likely an answer is: as in `JudgedRow`; `place` is the first token in whose place another one is likelier,
    and `other` the probability of that one, 0 if there is none."""

    likelihood: float
    relative: float
    place: int = 0
    other: float = 0.0


def judge(
    model: torch.nn.Module, tokenizer: Tokenizer, rows: Sequence[TaskRow], examples: Sequence[Example], step: Step
) -> list[JudgedRow]:
    """Judge the answers of the rows with a model that was not trained on them; `examples` are the rows' tokens."""
    logits = logits_of(model)
    found: dict[int, _Likelihood] = {}
    for part in passes(sorted(examples, key=row_length), max(1, _LOGITS_PER_PASS // tokenizer.vocab_size)):
        for example, scores in zip(part, _scores(model, part), strict=True):
            found[id(example)] = _likelihood(scores, example)
            step.update()
    # The threshold of confident learning.
    usual = sum(item.likelihood for item in found.values()) / len(found)
    judged = []
    for row, example in zip(rows, examples, strict=True):
        item, own = found[id(example)], None
        if item.other >= usual and item.relative <= _WRONG:
            answer = _own_answer(logits, example, item.place, tokenizer)
            own = None if answer == row.completion else answer
        judged.append(JudgedRow(row.where, item.likelihood, item.relative, own))
    return judged


def _scores(model: torch.nn.Module, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The log probabilities (nats) of all tokens in the place of each token of the answers, [tokens, vocabulary].

    Tokens see only those before them, so shorter rows are filled up at their ends.
    """
    longest = max(map(row_length, examples))
    tokens = torch.tensor([[*example.tokens, *[0] * (longest - row_length(example))] for example in examples])
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits
        return [
            row[example.prompt_length - 1 : row_length(example) - 1].double().log_softmax(-1)
            for row, example in zip(logits, examples, strict=True)
        ]


def _likelihood(scores: torch.Tensor, example: Example) -> _Likelihood:
    answer = list(example.tokens[example.prompt_length :])
    given, best = scores[range(len(answer)), answer].numpy(), scores.amax(-1).numpy()
    likelihood, relative = float(np.exp(given.min())), float(np.exp((given - best).min()))
    differing = np.flatnonzero(given < best)
    if not len(differing):
        return _Likelihood(likelihood, relative)
    first = int(differing[0])
    return _Likelihood(likelihood, relative, first, float(np.exp(best[first])))


def _own_answer(logits: LogitsOf, example: Example, place: int, tokenizer: Tokenizer) -> str:
    """The model's answer, which is that of the row before `place`.

    The rest of the row's answer is a guess, so that one pass reads many tokens: after one other token, such as a value
    in JSON, it is often right again.
    """
    start = example.prompt_length
    known, guess = list(example.tokens[: start + place]), list(example.tokens[start + place :])
    most = start + int(len(example.tokens[start:]) * _LENGTH_FACTOR) + _EXTRA_TOKENS
    while len(known) < most:
        read = logits([*known, *guess])[len(known) - 1 :].argmax(axis=1).tolist()
        agreed = next((n for n, (own, other) in enumerate(zip(read, guess, strict=False)) if own != other), len(guess))
        ended = next((n for n, token in enumerate(read[: agreed + 1]) if tokenizer.is_end(token)), None)
        known += read[: agreed + 1 if ended is None else ended]
        if ended is not None:
            break
        guess = guess[agreed + 1 :]
    return b"".join(map(tokenizer.piece, known[start:])).decode(errors="replace").strip()

"""Judges the answers of rows with a model: how likely they are to it, and what it answers instead."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from edgetune_runtime.engines.base import Tokenizer

from edgetune.common.progress import Step
from edgetune.objectives.base import row_length
from edgetune.objectives.example import Example
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import most_tokens
from edgetune.training.schedule import passes

from .findings import JudgedRow
from .reading import Reader, RowReader
from .said_values import parts_of_answer, with_unsaid_values

_LOGITS_PER_PASS = 2**25
_WRONG = 0.1
"""An answer is called probably wrong if it is so much less likely than those of most right rows."""
_ENOUGH = 5
"""Rows with a field from which it shows that the model hardly knows it."""
_SMALLEST = 1e-30


@dataclass(frozen=True)
class _Likelihood:
    """How likely an answer is: as in `JudgedRow`; `token` is the first likelier one than the answer's, in `place`."""

    likelihood: float
    relative: float
    place: int = 0
    token: int = 0


def judge(
    reader: Reader,
    tokenizer: Tokenizer,
    rows: Sequence[TaskRow],
    examples: Sequence[Example],
    step: Step,
    *,
    deadline: float = math.inf,
) -> list[JudgedRow]:
    """Judge the last answers of the rows with a model that was not trained on them; `examples` are the rows' tokens.

    At `deadline` (of time.monotonic), the longest rows that are left are not judged, and the model's own answers are
    cut.
    """
    likelihoods: dict[int, _Likelihood] = {}
    most = max(1, _LOGITS_PER_PASS // tokenizer.vocab_size)
    for part in passes(sorted(examples, key=row_length), most):
        if likelihoods and time.monotonic() > deadline:
            break
        for example, logits in zip(part, reader.answer_logits(part), strict=True):
            likelihoods[id(example)] = _likelihood(logits.double().log_softmax(-1), example)
            step.update()
    read = [(row, example) for row, example in zip(rows, examples, strict=True) if id(example) in likelihoods]
    items = [likelihoods[id(example)] for _, example in read]
    relative = with_unsaid_values([row for row, _ in read], [item.relative for item in items])
    limits = _limits([row for row, _ in read], relative)
    judged = []
    for (row, example), item, found, limit in zip(read, items, relative, limits, strict=True):
        own = None
        if found <= limit:
            answer = _own_answer(reader.continued(), example, item, tokenizer, deadline)
            own = None if answer == row.completion else answer
        weight, times = min(1.0, found / limit), 1 / max(item.relative, 1e-9)
        judged.append(JudgedRow(row.where, item.likelihood, found, own, weight, times))
    return judged


def _limits(rows: Sequence[TaskRow], relative: Sequence[float]) -> list[float]:
    """The relative likelihood of each row at and below which its answer is probably wrong.

    It is the `_limit` of all rows. If most rows with a field are below it, the model hardly knows the field, and its
    rows are compared with each other; those of a label too.
    """
    limit, parts = _limit(relative), [parts_of_answer(row) for row in rows]
    by_part: dict[str, list[float]] = {}
    for own, likelihood in zip(parts, relative, strict=True):
        for part in own:
            by_part.setdefault(part, []).append(likelihood)
    hardly_known = {
        part: min(limit, _limit(likelihoods))
        for part, likelihoods in by_part.items()
        if len(likelihoods) >= _ENOUGH and np.median(likelihoods) <= limit
    }
    return [min((hardly_known[part] for part in own & hardly_known.keys()), default=limit) for own in parts]


def _limit(relative: Sequence[float]) -> float:
    """The relative likelihood at and below which an answer is probably wrong.

    It is relative to what a quarter of the right answers are below: as far below the median as the upper quartile is
    above, since wrong answers are among the lowest. So a model that hardly knows the task finds fewer of them.
    """
    median, upper = np.quantile(relative, (0.5, 0.75))
    return max(float(_WRONG * median**2 / max(upper, _SMALLEST)), _SMALLEST)


def _likelihood(scores: torch.Tensor, example: Example) -> _Likelihood:
    """The likelihood of an answer by the log probabilities (nats) in the place of each of its tokens."""
    answer = list(example.tokens[example.prompt_length :])
    answer_scores = scores[range(len(answer)), answer].numpy()
    best, tokens = (part.numpy() for part in scores.max(-1))
    likelihood, relative = float(np.exp(answer_scores.min())), float(np.exp((answer_scores - best).min()))
    differing = np.flatnonzero(answer_scores < best)
    if not len(differing):
        return _Likelihood(likelihood, relative)
    first = int(differing[0])
    return _Likelihood(likelihood, relative, first, int(tokens[first]))


def _own_answer(
    reader: RowReader, example: Example, likelihood: _Likelihood, tokenizer: Tokenizer, deadline: float
) -> str:
    """The model's answer, which is that of the row up to `likelihood.place`.

    The rest of the row's answer is a guess, so that one pass reads many tokens: after one other token, such as a value
    in JSON, it is often right again.
    """
    start, place = example.prompt_length, example.prompt_length + likelihood.place
    tokens, guess = [*example.tokens[:place], likelihood.token], list(example.tokens[place + 1 :])
    most = start + most_tokens(len(example.tokens) - start)
    while not tokenizer.is_end(tokens[-1]) and len(tokens) < most and time.monotonic() <= deadline:
        read = reader.logits([*tokens, *guess], len(tokens) - 1).argmax(-1).tolist()
        misses = (n for n, (token, guessed) in enumerate(zip(read, guess, strict=False)) if token != guessed)
        agreed = next(misses, len(guess))
        new = read[: agreed + 1]
        tokens += new[: next((n for n, token in enumerate(new, 1) if tokenizer.is_end(token)), len(new))]
        guess = guess[agreed + 1 :]
    is_whole = tokenizer.is_end(tokens[-1])
    text = b"".join(map(tokenizer.piece, tokens[start : -1 if is_whole else None])).decode(errors="replace").strip()
    return text if is_whole else f"{text}…"

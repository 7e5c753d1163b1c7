"""Sample the next token from logits, with llama.cpp's filters in llama.cpp's order, in numpy."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import UsageError, VerificationError

REPEAT_WINDOW = 64
"""Number of last tokens that `repeat_penalty` applies to."""
_MAX_STOPS, _LONGEST_STOP = 64, 256
"""Stop texts, which are looked for after each token, and characters of one."""
_MARGIN = 0.01


@dataclass(frozen=True)
class Sampling:
    """How to sample tokens and when to stop. The default is greedy: temperature 0 takes the most likely token.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 turn the filters off. `stop` lists texts that end the answer
    and are not part of it. With `seed` None each answer is different. UsageError lists all invalid values.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _stops(self.stop))
        rules = (
            (_is_number(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0"),
            (_is_integer(self.top_k) and self.top_k >= 0, "top_k", "an integer of at least 0"),
            (_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "a number from 0 to 1"),
            (_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number from 0 to 1"),
            # With much larger or smaller ones, logits in float32 would be infinite.
            (
                _is_number(self.repeat_penalty) and 0.01 <= self.repeat_penalty <= 100,
                "repeat_penalty",
                "a number from 0.01 to 100",
            ),
            (self.seed is None or (_is_integer(self.seed) and self.seed >= 0), "seed", "an integer of at least 0"),
            (
                isinstance(self.stop, tuple)
                and len(self.stop) <= _MAX_STOPS
                and all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in self.stop),
                "stop",
                f"a list of up to {_MAX_STOPS} texts of 1 to {_LONGEST_STOP} characters",
            ),
            (_is_integer(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an integer of at least 1"),
        )
        wrong = [
            f"{name} {reprlib.repr(getattr(self, name))} is not {expected}"
            for is_valid, name, expected in rules
            if not is_valid
        ]
        if wrong:
            raise UsageError(f"sampling: {', '.join(wrong)}", "correct these values")


def sampling_of(sampling: Sampling | None, overrides: Mapping[str, Any]) -> Sampling:
    """The sampling with some fields replaced; UsageError for anything but a `Sampling`."""
    if not isinstance(sampling, Sampling | None):
        raise UsageError(f"sampling is {reprlib.repr(sampling)}", "give a Sampling, or its fields as options")
    return replace(sampling or Sampling(), **overrides)


class Sampler:
    """Samples the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def next(self, logits: NDArray[np.float32], recent: Sequence[int]) -> int:
        """Sample the next token from logits of shape [vocab]; repeat_penalty applies to the `recent` tokens.

        Raises what `likeliest` does.
        """
        sampling = self._sampling
        if sampling.repeat_penalty != 1.0 and recent:
            logits = _penalize(logits, recent[-REPEAT_WINDOW:], sampling.repeat_penalty)
        best = likeliest(logits)
        if sampling.temperature == 0.0:
            return best
        order = self._candidates(logits, best)
        chosen = logits[order].astype(np.float64)
        # Relative to that of the likeliest token.
        weights = np.exp(chosen - chosen[0])
        if sampling.top_p < 1.0:
            total = weights.sum() if sampling.top_k else np.exp(logits - logits[best], dtype=np.float64).sum()
            # Include the token that makes the sum reach top_p.
            kept = int(np.searchsorted(weights.cumsum(), sampling.top_p * total)) + 1
            order, chosen, weights = order[:kept], chosen[:kept], weights[:kept]
        kept = int((weights >= sampling.min_p).sum())
        return int(self._random.choice(order[:kept], p=softmax(chosen[:kept], float(sampling.temperature))))

    def _candidates(self, logits: NDArray[np.float32], best: int) -> NDArray[np.intp]:
        """The tokens that `top_k` leaves, the most likely first, with as few as possible of those below `min_p`."""
        top_k, min_p = self._sampling.top_k, self._sampling.min_p
        if top_k or not min_p:
            return top_tokens(logits, top_k)
        # Sorting a whole vocabulary takes milliseconds. The margin is for the rounding of the logarithm.
        near = np.flatnonzero(logits >= logits[best] + math.log(min_p) - _MARGIN)
        return near[np.argsort(-logits[near], kind="stable")]


def likeliest(logits: NDArray[np.float32]) -> int:
    """The token with the highest of the logits [vocab]; VerificationError if one is not a number, or it is infinite."""
    # NumPy takes a NaN for the highest.
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        message = f"the model computed {logits[token]} in place of a number"
        raise VerificationError(message, "use smaller scales, or check the bundle: edgetune-run check BUNDLE")
    return token


def top_tokens(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Up to `count` token ids (0: all), the most likely first."""
    if not 0 < count < len(logits):
        return np.argsort(-logits, kind="stable")
    top = np.argpartition(-logits, count - 1)[:count]
    return top[np.argsort(-logits[top], kind="stable")]


def _penalize(logits: NDArray[np.float32], recent: Sequence[int], penalty: float) -> NDArray[np.float32]:
    logits = logits.copy()
    seen = np.unique(np.asarray(recent, np.intp))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def softmax(values: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities from logits, or from log-probabilities up to a constant."""
    # The most likely token has weight 1 at every temperature; those of others may be too small for a number.
    with np.errstate(over="ignore"):
        weights = np.exp((values - values.max()) / temperature)
    normalized: NDArray[np.float64] = weights / weights.sum()
    return normalized


def _stops(stop: object) -> object:
    """A tuple of one text or of several; anything else unchanged."""
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, Iterable) else stop


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""The similarity of a prompt to those that an adapter was trained on, by the model's state after it.

A trained adapter moves the prompts of its task to a few places. What is far from all of them is probably none of its
task, however likely one of the labels is (Sun et al. 2022, arXiv 2204.06507), and a label whose training prompts are
not the nearest is probably wrong (Jiang et al. 2018, arXiv 1805.11783). The state of the last layer is computed from
logits, which are linear in it and which all engines have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import parsing_checked, write_checked
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

from .product import product

SIMILARITY_FILE = "similarity.bin"
KIND = "edgetune-similarity"
MAX_PROMPTS = 3000
_MAX_WIDTH = 1 << 14
_TOKENS = 1024
"""How many tokens' logits a state is computed from: more than most bases have values in it."""
_SMALLEST_SPREAD = 0.01
_DISTANCE, _LEAD = 3.0, 1.5
"""Weights of the distance to training prompts and of the lead of those of a label, in log odds per spread. More of the
distance finds more texts out of scope, more of the lead orders right and wrong labels of texts of the task better and
of others worse (measured on CLINC150, BANKING77 and a home assistant)."""
MAX_LEAD = 10.0
"""In spreads; those of BANKING77's 77 labels are below 5. Few labels can be 100 apart, and no distance would count."""

Matrix = npt.NDArray[np.float32]


class Similarities(NamedTuple):
    """The cosine between the state after a prompt and the nearest one of each label, and their spread in training.

    A label that leads by more than `max_lead` spreads counts as one that leads by these.
    """

    nearest: Mapping[str, float]
    spread: float
    max_lead: float = MAX_LEAD

    def scope_log_odds(self, log_odds: float) -> float:
        """How sure it is that the prompt is of the task, in log odds, from those of its likeliest label."""
        return log_odds - _DISTANCE * (1 - max(self.nearest.values())) / self.spread

    def label_log_odds(self, label: str, log_odds: float) -> float:
        """How sure it is that the label is right, in log odds, from the model's own."""
        own = self.nearest.get(label, max(self.nearest.values()))
        other = max((value for name, value in self.nearest.items() if name != label), default=own)
        lead = min((own - other) / self.spread, self.max_lead)
        return log_odds + _LEAD * lead - _DISTANCE * (1 - own) / self.spread


@dataclass(frozen=True)
class TrainingPrompts:
    """The states after training prompts, and the labels of these.

    `basis` [tokens, width] maps the logits of `compared_tokens` to a state; `directions` [prompts, width] are states of
    length 1. `spread` is the standard deviation of the cosines between each of them and the nearest other one.
    `max_lead` is what the adapter's curves of confidence were fitted with (see `Similarities`).
    """

    basis: Matrix
    labels: tuple[str, ...]
    directions: Matrix
    spread: float
    max_lead: float = MAX_LEAD

    @classmethod
    def of(cls, basis: npt.NDArray[np.floating], logits: Iterable[tuple[str, Logits]]) -> TrainingPrompts:
        """From the label of each of the prompts, and the logits after it."""
        states = [(label, _direction(basis, row)) for label, row in logits]
        directions = np.array([state for _, state in states], np.float32)
        cosines = directions @ directions.T
        np.fill_diagonal(cosines, -1.0)
        spread = max(_SMALLEST_SPREAD, float(cosines.max(axis=1).std()))
        return cls(np.asarray(basis, np.float32), tuple(label for label, _ in states), directions, spread)

    def similarities(self, logits: Logits) -> Similarities:
        """How similar a prompt is, from the logits after it.

        VerificationError if they were made for a vocabulary of another size.
        """
        if len(self.basis) != len(compared_tokens(len(logits))):
            message = f"training prompts of {len(self.basis)} tokens are for another vocabulary than {len(logits)}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        cosines = product(self.directions, _direction(self.basis, logits)).tolist()
        # Of the cosines of a label, the last and highest one stays.
        nearest = dict(sorted(zip(self.labels, cosines, strict=True), key=itemgetter(1)))
        return Similarities(nearest, self.spread, self.max_lead)


def compared_tokens(vocabulary: int) -> npt.NDArray[np.int64]:
    """The tokens whose logits are compared."""
    return np.linspace(0, vocabulary - 1, min(_TOKENS, vocabulary)).astype(np.int64)


def _direction(basis: npt.NDArray[np.floating], logits: Logits) -> Matrix:
    state = product(basis.T, logits[compared_tokens(len(logits))].astype(np.float32))
    return np.asarray(state / max(float(np.linalg.norm(state)), 1e-9), np.float32)


def write_prompts(path: Path, prompts: TrainingPrompts) -> None:
    """Write `similarity.bin`; OutOfSpaceError on a full disk."""
    data = b"".join(matrix.astype("<f2").tobytes() for matrix in (prompts.basis, prompts.directions))
    tokens, width = prompts.basis.shape
    numbers = {"spread": prompts.spread, "max_lead": prompts.max_lead}
    about = {"tokens": tokens, "labels": prompts.labels, "width": width, **numbers}
    write_checked(path, KIND, about, memoryview(data))


def read_prompts(path: Path) -> TrainingPrompts:
    """Read the file that `write_prompts` wrote; VerificationError for any other file."""
    max_bytes = 2 * (MAX_PROMPTS + _TOKENS) * _MAX_WIDTH
    with parsing_checked(path, KIND, "a file of training prompts", max_bytes=max_bytes) as stored:
        labels = tuple(map(str, stored.about["labels"]))
        tokens, width = (int(stored.about[name]) for name in ("tokens", "width"))
        if min(tokens, len(labels), width) < 1:
            raise ValueError(f"it has {tokens} tokens, {len(labels)} prompts and {width} values per state")
        spread = float(stored.about["spread"])
        # Files without it are of curves that were fitted without a limit.
        max_lead = float(stored.about.get("max_lead", math.inf))
        values = np.frombuffer(stored.data, "<f2").reshape(tokens + len(labels), width).astype(np.float32)
        if not np.isfinite(values).all() or not _SMALLEST_SPREAD <= spread < math.inf or not max_lead > 0:
            raise ValueError("it has values that are not finite, no spread, or no lead")
        return TrainingPrompts(values[:tokens], labels, values[tokens:], spread, max_lead)

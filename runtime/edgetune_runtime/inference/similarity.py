"""The similarity of a prompt to those that an adapter was trained on, by the model's state after it.

A trained adapter moves the prompts of its task to a few places; what is far from all of them is probably none of its
task, however likely one of the labels is (nearest neighbours: Sun et al. 2022, arXiv 2204.06507). The state of the last
layer is computed from logits, which are linear in it and which all engines have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import parsing_checked, write_checked
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

SIMILARITY_FILE = "similarity.bin"
KIND = "edgetune-similarity"
MAX_PROMPTS = 3000
_MAX_WIDTH = 1 << 14
_TOKENS = 1024
"""How many tokens' logits a state is computed from: more than most bases have values in it."""

Matrix = npt.NDArray[np.float16]


@dataclass(frozen=True)
class TrainingPrompts:
    """The states after training prompts, and the labels of these.

    `basis` [tokens, width] maps the logits of `compared_tokens` to a state; `directions` [prompts, width] are states of
    length 1.
    """

    basis: Matrix
    labels: tuple[str, ...]
    directions: Matrix

    @classmethod
    def of(cls, basis: npt.NDArray[np.floating], logits: Iterable[tuple[str, Logits]]) -> TrainingPrompts:
        """From the label of each of the prompts, and the logits after it."""
        small = basis.astype(np.float16)
        states = [(label, _direction(small, row)) for label, row in logits]
        return cls(small, tuple(label for label, _ in states), np.array([state for _, state in states], np.float16))

    def similarities(self, logits: Logits) -> dict[str, float]:
        """The cosine between the state after a prompt and the nearest one of each label, from the logits after it.

        VerificationError if they were made for a vocabulary of another size.
        """
        if len(self.basis) != len(compared_tokens(len(logits))):
            message = f"training prompts of {len(self.basis)} tokens are for another vocabulary than {len(logits)}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        cosines = (self.directions.astype(np.float32) @ _direction(self.basis, logits)).tolist()
        # Of the cosines of a label, the last and highest one stays.
        return dict(sorted(zip(self.labels, cosines, strict=True), key=itemgetter(1)))


def compared_tokens(vocabulary: int) -> npt.NDArray[np.int64]:
    """The tokens whose logits are compared."""
    return np.linspace(0, vocabulary - 1, min(_TOKENS, vocabulary)).astype(np.int64)


def _direction(basis: Matrix, logits: Logits) -> npt.NDArray[np.float32]:
    state = logits[compared_tokens(len(logits))].astype(np.float32) @ basis.astype(np.float32)
    return np.asarray(state / max(float(np.linalg.norm(state)), 1e-9), np.float32)


def write_prompts(path: Path, prompts: TrainingPrompts) -> None:
    """Write `similarity.bin`; OutOfSpaceError on a full disk."""
    data = b"".join(matrix.astype("<f2").tobytes() for matrix in (prompts.basis, prompts.directions))
    about = {"tokens": len(prompts.basis), "labels": prompts.labels, "width": prompts.basis.shape[1]}
    write_checked(path, KIND, about, memoryview(data))


def read_prompts(path: Path) -> TrainingPrompts:
    """Read the file that `write_prompts` wrote; VerificationError for any other file."""
    max_bytes = 2 * (MAX_PROMPTS + _TOKENS) * _MAX_WIDTH
    with parsing_checked(path, KIND, "a file of training prompts", max_bytes=max_bytes) as stored:
        labels = tuple(map(str, stored.about["labels"]))
        tokens, width = (int(stored.about[name]) for name in ("tokens", "width"))
        if min(tokens, len(labels), width) < 1:
            raise ValueError(f"it has {tokens} tokens, {len(labels)} prompts and {width} values per state")
        values = np.frombuffer(stored.data, "<f2").reshape(tokens + len(labels), width)
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        return TrainingPrompts(values[:tokens], labels, values[tokens:])

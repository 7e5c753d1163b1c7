"""How similar a prompt is to those that an adapter was trained on, by the logits after it.

A trained adapter moves the prompts of its task to a few places; what is far from all of them is probably none of its
task, however likely one of the labels is (nearest neighbours: Sun et al. 2022, arXiv 2204.06507). Logits stand for the
state of the last layer, from which they are linear: both engines have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import read_checked, write_checked
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

SIMILARITY_FILE = "similarity.bin"
KIND = "edgetune-similarity"
MAX_PROMPTS = 1000
_TOKENS = 256
"""How many tokens' logits are compared: more order prompts no better (docs/measurements.md)."""


@dataclass(frozen=True)
class TrainingPrompts:
    """What the adapter's training prompts look like; `directions` float16 [prompts, tokens], each of length 1."""

    directions: npt.NDArray[np.float16]

    @classmethod
    def of(cls, rows: Sequence[Logits]) -> TrainingPrompts:
        """From the logits after each of the prompts."""
        return cls(np.array([_direction(row) for row in rows], np.float16))

    def similarity(self, logits: Logits) -> float:
        """The cosine between a prompt and the most similar one of these, from the logits after it."""
        return float((self.directions.astype(np.float32) @ _direction(logits)).max())


def _direction(logits: Logits) -> npt.NDArray[np.float32]:
    tokens = np.linspace(0, len(logits) - 1, min(_TOKENS, len(logits))).astype(int)
    values = np.asarray(logits[tokens], np.float32)
    length = float(np.linalg.norm(values))
    return values / length if length else values


def write_prompts(path: Path, prompts: TrainingPrompts) -> None:
    """Write `similarity.bin`; OutOfSpaceError on a full disk."""
    data = prompts.directions.astype("<f2").tobytes()
    write_checked(path, KIND, {"prompts": len(prompts.directions)}, memoryview(data))


def read_prompts(path: Path) -> TrainingPrompts:
    """What `write_prompts` wrote; VerificationError for any other file."""
    stored = read_checked(path, KIND, max_bytes=2 * MAX_PROMPTS * _TOKENS)
    try:
        if stored is None:
            raise ValueError("its bytes are not those that were written")
        directions = np.frombuffer(stored.data, "<f2").reshape(int(stored.about["prompts"]), -1)
        if not directions.size or not np.isfinite(directions).all():
            raise ValueError("it has no prompts, or values that are no numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise VerificationError(f"{path} does not have training prompts: {error}", COPY_BUNDLE_AGAIN) from error
    return TrainingPrompts(directions)

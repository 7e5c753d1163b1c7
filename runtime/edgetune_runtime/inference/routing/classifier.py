"""The classifier of a router, logistic regression over hashed parts of a text, and its file in a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.formats.checked_file import parsing_checked, write_checked
from edgetune_runtime.inference.product import product

from .features import count_buckets, features

ROUTER_FILE = "router.bin"
KIND = "edgetune_router"
_MAX_BYTES = 1 << 26
_MAX_BUCKETS = 1 << 20


@dataclass(frozen=True)
class PromptClassifier:
    """For each task the log odds that a prompt is one of the task's rather than of none.

    `weights` has a row per bucket and a column per task, like `biases`. `rarities` has a value per bucket: the inverse
    document frequency.
    """

    rarities: NDArray[np.float16]
    weights: NDArray[np.float16]
    biases: NDArray[np.float32]

    def log_odds(self, text: str) -> NDArray[np.float32]:
        """The log odds of each task."""
        text_features = features(count_buckets(text, len(self.rarities)), self.rarities)
        weights = self.weights[text_features.buckets].astype(np.float32)
        return np.asarray(product(weights.T, text_features.values) + self.biases, np.float32)


def probabilities(log_odds: NDArray[np.floating]) -> NDArray[np.float64]:
    """The probability of each task (last axis); what they lack to 1 is that of none."""
    # Without overflow: relative to the largest, or to none.
    largest = np.maximum(log_odds.max(-1, keepdims=True), 0)
    powers = np.exp(np.asarray(log_odds - largest, np.float64))
    chances: NDArray[np.float64] = powers / (powers.sum(-1, keepdims=True) + np.exp(-largest))
    return chances


def write_classifiers(path: Path, classifiers: Mapping[str, PromptClassifier]) -> None:
    """Write `router.bin` with a classifier per kind of call; OutOfSpaceError on a full disk."""
    about = {
        call: {"buckets": len(classifier.rarities), "biases": classifier.biases.tolist()}
        for call, classifier in classifiers.items()
    }
    parts = (part for classifier in classifiers.values() for part in (classifier.rarities, classifier.weights))
    data = b"".join(part.astype("<f2").tobytes() for part in parts)
    write_checked(path, KIND, about, memoryview(data))


def read_classifiers(path: Path, tasks: Mapping[str, Sequence[str]]) -> dict[str, PromptClassifier]:
    """What `write_classifiers` wrote, for these tasks per kind of call; VerificationError for any other file."""
    with parsing_checked(path, KIND, "a router", max_bytes=_MAX_BYTES) as stored:
        if list(stored.about) != list(tasks):
            raise ValueError(f"it is for the calls {', '.join(stored.about)}")
        classifiers, begin = {}, 0
        for call, names in tasks.items():
            count = int(stored.about[call]["buckets"])
            biases = np.array(stored.about[call]["biases"], np.float32)
            if not 0 < count <= _MAX_BUCKETS or biases.shape != (len(names),):
                raise ValueError(f"it has {count} buckets and {biases.size} biases for {len(names)} tasks")
            end = begin + 2 * count * (1 + len(names))
            values = np.frombuffer(stored.data[begin:end], "<f2")
            if not (np.isfinite(values).all() and np.isfinite(biases).all()):
                raise ValueError("it has values that are not finite")
            rarities, weights = values[:count], values[count:].reshape(count, len(names))
            classifiers[call], begin = PromptClassifier(rarities, weights, biases), end
        if begin != len(stored.data):
            raise ValueError(f"it has {len(stored.data) - begin} bytes too many")
        return classifiers

"""Fits the classifier of a router: multinomial logistic regression with a class for prompts of no task."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from edgetune_runtime.inference.routing.classifier import PromptClassifier
from edgetune_runtime.inference.routing.features import Features, count_buckets, features
from numpy.typing import NDArray

_MAX_BUCKETS, _MAX_WEIGHTS = 1 << 16, 1 << 22
_WEIGHT_DECAY = 1e-5
_MAX_STEPS = 40


def fit(tasks: Sequence[Sequence[str]], none: Sequence[Sequence[str]]) -> PromptClassifier:
    """Learn the prompts of each task, and groups of prompts of none.

    Each task counts as much as any other, and so does each group of `none`.
    """
    groups = [*tasks, *none]
    size = min(_MAX_BUCKETS, 1 << (_MAX_WEIGHTS // len(tasks)).bit_length() - 1)
    counts = [_counts(prompt, size) for group in groups for prompt in group]
    frequencies = np.bincount(np.concatenate([np.fromiter(c, np.int64, len(c)) for c in counts]), minlength=size)
    rarities = (np.log((1 + len(counts)) / (1 + frequencies)) + 1).astype(np.float16)
    classes = [min(number, len(tasks)) for number, group in enumerate(groups) for _ in group]
    shares = [1 / len(group) for group in groups for _ in group]
    weights, biases = _minimized([features(c, rarities) for c in counts], size, classes, shares)
    # Relative to the last class, that of none.
    odds, offsets = weights[:, :-1] - weights[:, -1:], biases[:-1] - biases[-1]
    return PromptClassifier(rarities, odds.astype(np.float16), offsets)


@lru_cache(maxsize=1 << 15)
def _counts(prompt: str, size: int) -> Counter[int]:
    """Each prompt is in several fits."""
    return count_buckets(prompt, size)


def _minimized(
    rows: Sequence[Features], size: int, classes: Sequence[int], shares: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The weights (a column per class) and biases with the smallest cross-entropy and decay, by L-BFGS."""
    prompts, transposed = _matrices(rows, size)
    targets = torch.nn.functional.one_hot(torch.tensor(classes)).float()
    importance = torch.tensor(shares)[:, None] / sum(shares)
    weights = torch.zeros(size, targets.shape[1], requires_grad=True)
    biases = torch.zeros(targets.shape[1], requires_grad=True)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            logits = torch.log_softmax(prompts @ weights + biases, 1)
            slopes = (logits.exp() - targets) * importance
            weights.grad = transposed @ slopes + _WEIGHT_DECAY * weights
            biases.grad = slopes.sum(0)
            return (_WEIGHT_DECAY / 2) * weights.square().sum() - (logits * targets * importance).sum()

    optimizer = torch.optim.LBFGS([weights, biases], max_iter=_MAX_STEPS, history_size=5, line_search_fn="strong_wolfe")
    threads = torch.get_num_threads()
    # Sums then have one order, and the matrices are small.
    torch.set_num_threads(1)
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    return weights.detach().numpy(), biases.detach().numpy()


def _matrices(rows: Sequence[Features], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of prompts as a sparse matrix with a row per prompt, and its transpose."""
    places = np.repeat(np.arange(len(rows)), [len(row.buckets) for row in rows])
    buckets = np.concatenate([row.buckets for row in rows]).astype(np.int64)
    values = np.concatenate([row.values for row in rows])
    order = np.argsort(buckets, kind="stable")
    shape = len(rows), size
    return _sparse(places, buckets, values, shape), _sparse(buckets[order], places[order], values[order], shape[::-1])


def _sparse(
    rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float32], shape: tuple[int, int]
) -> torch.Tensor:
    """A sparse matrix of values whose rows are in ascending order."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    with warnings.catch_warnings():
        # Torch calls this layout, which is the fastest one, a beta version.
        warnings.simplefilter("ignore", UserWarning)
        starts_of, columns_of, values_of = map(torch.from_numpy, (starts, columns, values))
        return torch.sparse_csr_tensor(starts_of, columns_of, values_of, shape, check_invariants=False)

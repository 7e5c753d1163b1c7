"""How well values order two kinds of things."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def auroc(values: Sequence[float], is_positive: Sequence[bool]) -> float | None:
    """The probability that a positive has a higher value than a negative, None if there is only one kind."""
    positives = np.asarray([value for value, positive in zip(values, is_positive, strict=True) if positive])
    negatives = np.asarray([value for value, positive in zip(values, is_positive, strict=True) if not positive])
    if not len(positives) or not len(negatives):
        return None
    above, equal = positives[:, None] > negatives, positives[:, None] == negatives
    return float((above + equal / 2).mean())

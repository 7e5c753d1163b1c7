"""Logits that are equal but for rounding, in place of pytest.approx, which takes seconds for those of a vocabulary."""

from __future__ import annotations

import numpy as np


class Close:
    """Equals arrays and lists of the same shape whose numbers differ by at most `tolerance` from these."""

    # So that numpy leaves the comparison to this class.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: object, tolerance: float) -> None:
        self._expected, self._tolerance = np.asarray(expected, dtype=np.float64), tolerance

    def __eq__(self, found: object) -> bool:
        numbers = np.asarray(found, dtype=np.float64)
        if numbers.shape != self._expected.shape:
            return False
        return np.allclose(numbers, self._expected, rtol=0, atol=self._tolerance, equal_nan=False)

    def __repr__(self) -> str:
        return f"within {self._tolerance} of {self._expected}"

"""Factors dense weight changes into low-rank products with a truncated SVD; the allowed error sets the rank.

Eckart and Young 1936: no product of that rank is closer in the Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .shapes import Delta, Floats, LowRank


def truncated(name: str, method: str, changes: Mapping[str, Callable[[], Floats]], max_error: float) -> LowRank:
    """A low-rank adapter that leaves out at most the share `max_error` (Frobenius norm) of each module's change.

    `changes` computes each module's change of weights [rows, columns]. Modules that did not change are left out.
    """
    modules: dict[str, Delta] = {}
    lost, total = 0.0, 0.0
    for module, compute in changes.items():
        u, values, v = np.linalg.svd(compute(), full_matrices=False)
        energy = np.square(values, dtype=np.float64)
        # The energy lost when the first n values are kept, for n = 0, 1, …
        lost_energy = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        rank = int(np.argmax(lost_energy <= max_error**2 * lost_energy[0]))
        lost, total = lost + lost_energy[rank], total + lost_energy[0]
        if rank:
            root = np.sqrt(values[:rank])
            modules[module] = Delta(
                (root[:, None] * v[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32)
            )
    return LowRank(name, method, modules, error=math.sqrt(lost / total) if total else 0.0)

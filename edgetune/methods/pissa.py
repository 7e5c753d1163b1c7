"""PiSSA: LoRA initialized with the base's largest singular values. Meng et al. 2024, arXiv:2404.02948."""

from __future__ import annotations

from .common.initialized import Initialized


class Pissa(Initialized):
    """LoRA that trains the principal components of the base's weights: use it when plain LoRA learns too slowly."""

    # Fast randomized SVD: the full SVD takes minutes and reaches the same loss (the paper, section 5.4).
    start = "pissa_niter_4"


METHOD = Pissa()

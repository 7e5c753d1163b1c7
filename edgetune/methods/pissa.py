"""PiSSA: LoRA that starts from the base's largest singular values. Meng et al. 2024, arXiv:2404.02948."""

from __future__ import annotations

from .common.initialized import Initialized


class Pissa(Initialized):
    """LoRA that trains the main directions of the base's weights: take it when plain LoRA learns too slowly."""

    # A fast randomized decomposition: the whole one takes minutes and ends at the same loss (the paper, section 5.4).
    start = "pissa_niter_4"


METHOD = Pissa()

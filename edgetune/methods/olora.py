"""OLoRA: LoRA that starts from an orthonormal basis of the base's weights. Büyükakyüz 2024, arXiv:2406.01775."""

from __future__ import annotations

from .common.initialized import Initialized


class OLora(Initialized):
    """LoRA with an orthonormal start: take it as PiSSA, with a cheaper start."""

    start = "olora"


METHOD = OLora()

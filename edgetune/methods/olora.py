"""OLoRA: LoRA initialized with an orthonormal basis of the base's weights. Büyükakyüz 2024, arXiv:2406.01775."""

from __future__ import annotations

from .common.initialized import Initialized


class OLora(Initialized):
    """LoRA with orthonormal initialization: use it like PiSSA; it initializes faster."""

    start = "olora"


METHOD = OLora()

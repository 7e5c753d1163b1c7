"""Adapters in slots of the model: a plain base and LoRA files as one `graniteswitch` model of llama.cpp.

Each token of a batch runs with the factors of its sequence's slot, so sequences with different adapters share a batch.
`compose` makes the model, a `SlotPool` fills its slots, and `states` moves saved states between slots.
"""

from .model import SlotModel, compose
from .pool import SlotPool, SlotUse
from .requirements import obstacle, slot_bytes

__all__ = ["SlotModel", "SlotPool", "SlotUse", "compose", "obstacle", "slot_bytes"]

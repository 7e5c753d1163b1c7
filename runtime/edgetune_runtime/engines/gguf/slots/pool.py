"""The adapters in the slots of a model: filled at first use, kept while a call uses them, the least recently used out.

A sum of adapters, or one with a scale, is a slot of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from edgetune_runtime.engines.base import check_scales
from edgetune_runtime.errors import BusyError, IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .factors import read_factors, side_by_side
from .model import FACTOR_TYPES, Factors, SlotModel

_Set = tuple[tuple[str, float], ...]
"""Adapters with their scales, sorted by name."""


class SlotUse(NamedTuple):
    """A slot and the number of its filling, by which a sequence can see later whether the slot is still its own."""

    slot: int
    filling: int


@dataclass
class _Slot:
    adapters: _Set | None
    use: SlotUse
    users: int = 0


BASE = SlotUse(0, 0)
"""The plain base, which is always there."""


class SlotPool:
    """The slots of a model for adapters of its base, which has the header `base`. Thread-safe.

    Adapters are read when they are first used, while steps with other slots go on.
    """

    def __init__(self, model: SlotModel, base: GgufHeader, dtype: str = "f16") -> None:
        self._model, self._base, self._dtype = model, base, FACTOR_TYPES[dtype]
        self._files: dict[str, Path] = {}
        self._fillings = count(1)
        self._lock = threading.Lock()
        # The least recently used first.
        self._slots = OrderedDict((slot, _Slot(None, SlotUse(slot, 0))) for slot in range(1, model.slots + 1))

    def add(self, name: str, path: Path) -> None:
        """Name an adapter's file, which is checked and read at each filling; does nothing if the name is there."""
        with self._lock:
            self._files.setdefault(name, path)

    def remove(self, name: str) -> None:
        """Forget an adapter; calls that use it go on to their end. NotFoundError if there is none of this name."""
        with self._lock:
            check_scales({name: 1.0}, self._files)
            del self._files[name]
            for slot in list(self._slots.values()):
                if slot.adapters and name in dict(slot.adapters):
                    slot.adapters = None
                    self._slots.move_to_end(slot.use.slot, last=False)

    @contextmanager
    def use(self, adapters: Mapping[str, float]) -> Iterator[SlotUse]:
        """A slot with the sum of these adapters with their scales, which stays so for the time of the block.

        Fills a slot if none has them. BusyError when calls use all slots for others; IncompatibleError when their ranks
        are too high, or they change what slots cannot; VerificationError for a damaged file.
        """
        slot = self._acquired(adapters)
        try:
            yield slot.use if slot else BASE
        finally:
            if slot:
                with self._lock:
                    slot.users -= 1

    def is_current(self, use: SlotUse) -> bool:
        """Whether a slot still has what it had in this use."""
        with self._lock:
            return use == BASE or self._slots[use.slot].use == use

    def _acquired(self, adapters: Mapping[str, float]) -> _Slot | None:
        """The slot for these adapters, with one more user; None for the base."""
        with self._lock:
            check_scales(adapters, self._files)
            wanted = tuple(sorted((name, float(scale)) for name, scale in adapters.items() if scale != 0))
            if not wanted:
                return None
            slot = next((slot for slot in self._slots.values() if slot.adapters == wanted), None)
            slot = slot or self._fill(wanted)
            slot.users += 1
            self._slots.move_to_end(slot.use.slot)
            return slot

    def _fill(self, adapters: _Set) -> _Slot:
        slot = next((slot for slot in self._slots.values() if not slot.users), None)
        if slot is None:
            message = f"running calls use all {self._model.slots} slots for other adapters"
            raise BusyError(message, "wait until one has ended, or open the bundle with more slots")
        factors = self._factors(adapters)
        slot.adapters, slot.use = None, SlotUse(slot.use.slot, next(self._fillings))
        self._model.write(slot.use.slot, factors)
        slot.adapters = adapters
        return slot

    def _factors(self, adapters: _Set) -> Factors:
        """The factors of a sum of adapters, which fit in a slot."""
        factors = side_by_side(
            [read_factors(self._files[name], self._base, name, scale, self._dtype) for name, scale in adapters]
        )
        names = " + ".join(name for name, _ in adapters)
        for weight, (a, _) in factors.items():
            if not self._model.can_change(weight):
                message = f"adapter {names!r} changes {weight!r}, and slots have no place for that"
                raise IncompatibleError(message, "open the bundle without slots")
            if len(a) > self._model.rank:
                message = f"adapter {names!r} has rank {len(a)}, and slots have rank {self._model.rank}"
                raise IncompatibleError(message, f"open the bundle with slots of rank {len(a)}, or without")
        return factors

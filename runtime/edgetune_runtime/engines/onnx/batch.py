"""The sequences of a batch: neighbours in one set of buffers, which share steps whatever their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, cast

from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.errors import UsageError

from .rows import Rows


class RowEngine(Engine, Protocol):
    """An engine whose sequence can be in a row of several."""

    def can_stack(self, adapters: Mapping[str, float]) -> bool:
        """Whether a sequence with these loaded adapters can share steps."""

    def in_row(self, rows: Rows, row: int) -> Self:
        """Another engine, with its sequence in this row."""

    def decode_together(self, steps: Sequence[tuple[Self, int]]) -> list[Logits]:
        """Append a token to each of these sequences, whose rows are in the same buffers; logits after it, [1, vocab].

        An exception leaves all sequences as they were.
        """


class OnnxBatch:
    """The sequences beside the engine `first`, in these rows; see `Batch`."""

    def __init__(self, first: RowEngine, rows: Rows) -> None:
        self._first, self._rows = first, rows

    def can_hold(self, adapters: Mapping[str, float]) -> bool:
        """See `Batch`: prefixes too, but neither scalings nor bottlenecks."""
        return self._first.can_stack(adapters)

    def sequence(self) -> RowEngine:
        """See `Batch`."""
        row = self._rows.take()
        if row is None:
            raise UsageError(f"all {self._rows.count} sequences of the batch are in use", "close one of them first")
        return self._first.in_row(self._rows, row)

    def can_join(self, engine: Engine) -> bool:
        """See `Batch`."""
        return True

    def decode(self, steps: Sequence[tuple[Engine, int]]) -> list[Logits]:
        """See `Batch`; sequences that are not next to each other are decoded in several steps."""
        own = [(cast("RowEngine", engine), token) for engine, token in steps]
        return own[0][0].decode_together(own)

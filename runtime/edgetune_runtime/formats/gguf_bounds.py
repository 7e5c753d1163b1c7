"""Bounds on the hyperparameters in GGUF headers: each holds the values that are `in` it, and its text names them."""

from __future__ import annotations

from dataclasses import dataclass

_Number = int | float
LAYERS = 512


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, of the type of `low`; NaN is not one of them."""

    low: _Number
    high: _Number

    def __contains__(self, value: object) -> bool:
        return type(value) is type(self.low) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'a whole number' if isinstance(self.low, int) else 'a number'} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Array:
    """Arrays of up to LAYERS items, each in `items`; where `number` is given, also a single number in it."""

    items: Between
    number: Between | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, tuple):
            return self.number is not None and value in self.number
        # Converters write flags as bools or as numbers.
        is_flag = self.items.high == 1
        return 0 < len(value) <= LAYERS and all(
            (int(item) if is_flag and type(item) is bool else item) in self.items for item in value
        )

    def __str__(self) -> str:
        return f"{f'{self.number}, or ' if self.number else ''}an array, each item {self.items}"

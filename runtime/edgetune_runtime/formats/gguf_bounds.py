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


class FlagPerLayer:
    """An array with a flag for each layer."""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, tuple) or len(value) > LAYERS:
            return False
        return all(type(item) in (bool, int) and item in (0, 1) for item in value)

    def __str__(self) -> str:
        return "0 or 1 for each layer"


@dataclass(frozen=True)
class Flags:
    """An array with a flag for each layer, or a number."""

    number: Between

    def __contains__(self, value: object) -> bool:
        return value in FlagPerLayer() or value in self.number

    def __str__(self) -> str:
        return f"{self.number}, or {FlagPerLayer()}"


@dataclass(frozen=True)
class HeadsPerLayer:
    """An array with the number of heads of each layer: 0, or `number`, which is the same in all layers."""

    number: Between

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, tuple) or len(value) > LAYERS or not all(type(item) is int for item in value):
            return False
        return len({*value} - {0}) == 1 and max(value) in self.number

    def __str__(self) -> str:
        return f"0 or {self.number} for each layer, the same in all"


@dataclass(frozen=True)
class Widths:
    """A number, or an array of one for each layer."""

    number: Between

    def __contains__(self, value: object) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return 0 < len(values) <= LAYERS and all(item in self.number for item in values)

    def __str__(self) -> str:
        return f"{self.number}, or one of each layer"


@dataclass(frozen=True)
class Sections:
    """An array with the sizes of the four sections of a rotary embedding of positions in space."""

    number: Between

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, tuple) and len(value) == 4 and all(item in self.number for item in value) and any(value)
        )

    def __str__(self) -> str:
        return f"four of {self.number}"

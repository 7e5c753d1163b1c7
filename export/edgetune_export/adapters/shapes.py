"""The four shapes that trained adapters are folded into, whatever the method. Arrays are float32.

Modules and parameters are named as in the base's Hugging Face model, a text-only causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Activation = Literal["relu", "silu", "gelu"]


@dataclass(frozen=True)
class Delta:
    """The change of a linear module: W + b @ a, with a [rank, columns] and b [rows, rank], PEFT's scaling included."""

    a: Floats
    b: Floats

    @property
    def rank(self) -> int:
        """The number of rows of `a`."""
        return int(self.a.shape[0])

    def misfit(self, module: str, rows: int, columns: int) -> str:
        """Why it does not fit a module of the base with these outputs and inputs, or ''."""
        own_rows, own_columns = self.b.shape[0], self.a.shape[1]
        if (own_rows, own_columns) == (rows, columns):
            return ""
        return f"{module} is {own_rows}x{own_columns} in the adapter, {rows}x{columns} in the base"


@dataclass(frozen=True)
class Head:
    """The classification head of an encoder: `weight` [labels, hidden] and `bias` [labels]."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class LowRank:
    """A product B·A added to the weights of each module.

    With `invocation` tokens it acts only from their last occurrence in a sequence on (activated LoRA).
    `error` is the share of the trained change (Frobenius norm) that the product leaves out; 0 if it is exact.
    `head` is the classification head of an encoder, trained with the product.
    """

    shape: ClassVar[str] = "low_rank"
    name: str
    method: str
    modules: Mapping[str, Delta]
    invocation: tuple[int, ...] = ()
    error: float = 0.0
    head: Head | None = None


@dataclass(frozen=True)
class Prefix:
    """Keys and values of `tokens` positions before every sequence, at positions 0, 1, …

    `keys` and `values` are [layers, key/value heads, tokens, head size]; keys are after rotary embedding.
    """

    shape: ClassVar[str] = "prefix"
    name: str
    method: str
    keys: Floats
    values: Floats

    @property
    def tokens(self) -> int:
        """Number of positions of the prefix."""
        return int(self.keys.shape[2])


@dataclass(frozen=True)
class Scaling:
    """A factor for each output of a linear module (after its bias), or for each of its inputs."""

    factors: Floats
    side: Literal["output", "input"]


@dataclass(frozen=True)
class Bottleneck:
    """A small network added to a block: out + up·act(down·x + down_bias) + up_bias.

    `down` is [rank, columns], `up` is [rows, rank]; x is the block's output if `reads` is output (serial), or its input
    (parallel).
    """

    down: Floats
    down_bias: Floats
    up: Floats
    up_bias: Floats
    activation: Activation
    reads: Literal["output", "input"]


@dataclass(frozen=True)
class Tensors:
    """Scalings of linear modules, such as `model.layers.0.mlp.down_proj`, and bottlenecks of blocks, such as
    `model.layers.0.mlp` and `model.layers.0.self_attn`."""

    shape: ClassVar[str] = "tensors"
    name: str
    method: str
    scalings: Mapping[str, Scaling] = field(default_factory=dict)
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """A full model: the base with new values for some parameters, such as `model.layers.0.mlp.up_proj.weight`.

    Each value is computed on demand, so that they need not all be in memory at once. `on_grid`: it was trained through
    the rounding to the base's quantization grid.
    """

    shape: ClassVar[str] = "merged"
    name: str
    method: str
    parameters: Mapping[str, Callable[[], Floats]]
    on_grid: bool = False


Adapter = LowRank | Prefix | Tensors
"""The shapes that are written as a file beside the base."""
Folded = Adapter | Merged

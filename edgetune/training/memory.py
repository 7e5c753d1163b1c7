"""Memory needed for training, predicted from a base's shape or measured, and the forward passes that fit a limit.

A forward pass keeps activations for the backward pass, in proportion to its tokens. With activation checkpointing a
layer keeps only its input and is recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174). Names that end
in `_mb` are in MB = 10^6 bytes, other sizes in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgetune_export.backends.format import IMPORTS_MB
from edgetune_runtime.errors import UsageError

from edgetune.methods import Method, MethodOptions, TrainedModules
from edgetune.objectives.base import LOGITS_PER_CHUNK

if TYPE_CHECKING:
    from .checkpointing import LayerCost


MOST_TOKENS = 4096
"""Larger forward passes are no faster."""
FREE_SHARE = 0.9
"""Share of the free memory that training may use."""
# A chunk's logits, their float32 copy, the log-probabilities and the gradient.
_COPIES_OF_LOGITS = 4
# Numbers in a saved training state per trained parameter: its value, its best value, and AdamW's two moments.
_SAVED_NUMBERS = 4
_FLOAT_BYTES = 4
# Per weight that is packed in int8, once for the forward and once for the backward pass, in addition to float32.
_PACKED_BYTES = 2
# Memory that a layer's backward pass needs at once, as a share of what its forward pass kept.
_BACKWARD = 1.0
# Fragmentation as a share of the activations: small while the allocator returns freed blocks to the system, which is
# slower, and large while it keeps them.
_LOST = 0.05
_LOST_KEEPING = 0.45
_MB = 1e6


@dataclass(frozen=True)
class PassCost:
    """Bytes that a forward pass keeps: `per_token` in all `layers` together, `constant` for any number of tokens.

    `input_per_token` is the size of one layer's input, `loss` the temporary memory of the loss, and `lost` the share
    lost to fragmentation. `before` is the number of tokens that the method puts before the rows of a pass, which are in
    no count of tokens here.
    """

    layers: int
    per_token: float
    input_per_token: float
    constant: float
    loss: float
    lost: float = _LOST
    before: int = 0

    def pass_mb(self, tokens: int, checkpointed: int = 0) -> float:
        """Peak memory of a pass, forward and backward, with that many layers checkpointed."""
        return (self.constant + self.loss + (self.before + tokens) * self._per_token(checkpointed)) / _MB

    def tokens(self, room_mb: float, checkpointed: int = 0) -> int:
        """Tokens of the longest pass that fits in `room_mb`."""
        left = room_mb * _MB - self.constant - self.loss
        return max(0, int(left / self._per_token(checkpointed)) - self.before)

    def validation_tokens(self, room_mb: float) -> int:
        """Tokens of the longest pass without gradients that fits in `room_mb`."""
        left = room_mb * _MB - self.constant - self.loss
        return max(0, int(left / (self.per_token / self.layers * (1 + self.lost))) - self.before)

    def _per_token(self, checkpointed: int) -> float:
        layer = self.per_token / self.layers
        kept = self.per_token - checkpointed * max(0.0, layer - self.input_per_token)
        return (kept + layer * _BACKWARD) * (1 + self.lost)

    @property
    def most_checkpointed(self) -> int:
        """All layers except the last, which would be recomputed immediately."""
        return self.layers - 1


@dataclass(frozen=True)
class PassPlan:
    """Sizes of forward passes: at most `tokens` tokens in training and `validation_tokens` in validation.

    The first `checkpointed` of the `layers` use activation checkpointing; `mb` is the peak memory of a pass.
    `keeps_freed` means that the process may keep freed memory, which is faster.
    """

    tokens: int = MOST_TOKENS
    validation_tokens: int = MOST_TOKENS
    checkpointed: int = 0
    layers: int = 0
    mb: float = 0.0
    keeps_freed: bool = True

    def __str__(self) -> str:
        passes = f"forward passes of at most {self.tokens:,} tokens"
        if not self.checkpointed:
            return passes
        return f"{passes}, activation checkpointing in {self.checkpointed} of {self.layers} layers"


@dataclass(frozen=True)
class TrainingNeed:
    """Peak memory of a training process: `min_mb` with the smallest passes, `max_mb` without a memory limit."""

    min_mb: float
    max_mb: float


def training_need(
    method: Method[Any],
    options: MethodOptions,
    trained: TrainedModules,
    *,
    longest_row: int,
    batch_tokens: int,
    precision: str,
    process_mb: float = IMPORTS_MB,
    on_grid: bool = False,
) -> TrainingNeed:
    """Predict the memory for training `method` on the base of these modules, for a longest row of `longest_row` tokens
    and steps of `batch_tokens`; `precision` is `bf16`, `fp32` or `int8`. `process_mb`: what the process takes of the
    device's memory before; nothing of a GPU's. `on_grid`: with `rounded_layers`. Loading the base may temporarily need
    more."""
    cost, shape = predicted(method, options, trained, precision), trained.base
    parameters = method.trained_parameters(trained, options)
    added = _FLOAT_BYTES * parameters if method.adds_parameters else 0
    packed = _PACKED_BYTES * shape.linear_weights if precision == "int8" else 0
    rounded = 2 * _FLOAT_BYTES * sum(module.rows * module.columns for module in trained.modules) if on_grid else 0
    weights = shape.loaded_parameters * _width(method, precision) + packed + rounded
    fixed = process_mb + (weights + added) / _MB + state_mb(parameters)
    least = cost.pass_mb(longest_row, cost.most_checkpointed)
    whole = max(longest_row, min(batch_tokens, MOST_TOKENS))
    return TrainingNeed(fixed + least, fixed + replace(cost, lost=_LOST_KEEPING).pass_mb(whole))


def predicted(method: Method[Any], options: MethodOptions, trained: TrainedModules, precision: str) -> PassCost:
    """Predict what a pass of the method keeps: the inputs of a layer's norms, attention and activation function, and
    those of the modules whose weights are trained."""
    shape, width = trained.base, _width(method, precision)
    attention, gated = 2 * shape.queries + 2 * shape.keys, 3 * shape.intermediate
    # Modules of one product have the same inputs.
    inputs = sum({module.product: module.columns for module in trained.modules}.values())
    ranks = len(trained.modules) * int(getattr(options, "r", 0))
    # In float32, and with a second input if the weight is trained. Fused norms of bf16 bases keep half of it, but short
    # rows keep attention weights there, which are not counted: together within a fifth of what was measured.
    norms = 4 * shape.norms * (1 if method.adds_parameters else 2)
    layers = method.trained_layers(shape, options)
    per_token = layers * (width * (attention + gated) + norms) + width * (inputs + ranks)
    loss, before = loss_bytes(shape.vocabulary), method.prefix_tokens(options)
    return PassCost(layers, per_token, width * shape.hidden, 0.0, loss, before=before)


def loss_bytes(vocabulary: int) -> float:
    """Temporary memory of the loss: one chunk of logits."""
    return 4 * _COPIES_OF_LOGITS * max(LOGITS_PER_CHUNK, vocabulary)


def plan_passes(
    cost: PassCost,
    *,
    longest_row: int,
    batch_size: int,
    used_mb: float,
    limit_mb: float | None,
    room_mb: float,
    name: str,
) -> PassPlan:
    """Plan the largest passes that fit in `room_mb` of free memory and `limit_mb` for the whole process.

    `used_mb` is what the process already uses. As few layers are checkpointed as the longest row needs. Raises
    UsageError if the longest row alone does not fit in `limit_mb`. If memory is short without a limit, the smallest
    passes are planned, because the system may still free memory.
    """
    room = room_mb if limit_mb is None else min(room_mb, limit_mb - used_mb)
    for_validation = min(MOST_TOKENS, cost.validation_tokens(room))
    whole = max(longest_row, min(MOST_TOKENS, batch_size * longest_row))
    keeping = replace(cost, lost=_LOST_KEEPING)
    if keeping.pass_mb(whole) <= room:
        return PassPlan(MOST_TOKENS, for_validation, 0, cost.layers, keeping.pass_mb(whole))
    for checkpointed in range(cost.layers):
        if cost.pass_mb(longest_row, checkpointed) <= room:
            tokens = min(MOST_TOKENS, cost.tokens(room, checkpointed))
            most = cost.pass_mb(max(tokens, longest_row), checkpointed)
            return PassPlan(tokens, for_validation, checkpointed, cost.layers, most, keeps_freed=False)
    least = cost.pass_mb(longest_row, cost.most_checkpointed)
    if limit_mb is not None and used_mb + least > limit_mb:
        needed = math.ceil(used_mb + least)
        message = f"training.memory_mb is {limit_mb:,.0f}, but training {name} needs at least {needed:,}"
        remedy = f"set it to {needed} or more, or shorten the rows: the longest has {longest_row} tokens"
        raise UsageError(message, remedy)
    return PassPlan(longest_row, longest_row, cost.most_checkpointed, cost.layers, least, keeps_freed=False)


def measured(small: tuple[int, LayerCost], large: tuple[int, LayerCost], *, layers: int, vocabulary: int) -> PassCost:
    """What a pass keeps, from the tokens and one layer's cost of a small and a large pass."""
    (few, cost_of_few), (many, cost_of_many) = small, large
    # Two rows of similar length cannot separate the constant part from the part per token.
    apart = many >= 2 * few
    slope = (cost_of_many.kept - cost_of_few.kept) / (many - few) if apart else cost_of_many.kept / many
    constant = max(0.0, cost_of_many.kept - slope * many)
    return PassCost(layers, layers * slope, cost_of_many.input / many, layers * constant, loss_bytes(vocabulary))


def state_mb(parameters: int) -> float:
    """Memory for training that many parameters, besides their values: gradients, and what a saved state contains, which
    for the values is a copy while they are saved."""
    return (1 + _SAVED_NUMBERS) * _FLOAT_BYTES * parameters / _MB


def saved_states_mb(parameters: int) -> float:
    """Disk space of the saved training states: the old one stays until the new one is whole."""
    return 2 * _SAVED_NUMBERS * _FLOAT_BYTES * parameters / _MB


def _width(method: Method[Any], precision: str) -> int:
    """Bytes per weight of the base and per activation."""
    return 2 if precision == "bf16" and not method.trains_base else 4

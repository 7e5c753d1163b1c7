"""Packs examples into one sequence without padding, with attention that keeps the rows apart.

The rows of a step are concatenated into one sequence, so that no matrix product is spent on padding. The common prefix
of all rows (chat header, system prompt) is computed once and attended to by every row, which does not change any row's
result. Only attention and convolutions run per row, padded to the longest; rows of similar length keep this padding
small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, wraps
from itertools import takewhile
from typing import Any, Self

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from edgetune.objectives.example import Example

_ATTENTION = "edgetune_packed"
MOST_KEYS = 128
"""Up to this many keys, attention in bfloat16 on the CPU is computed as matrix products: the gradient of torch's kernel
takes 2 to 3 times as long. The products keep a weight for each head, query and key."""


@dataclass(frozen=True)
class Group:
    """Rows whose attention is computed in one call: indices into the packed sequence, padded to the longest row.

    `queries` [rows, q] and `keys` [rows, k] are packed indices; `mask` [rows, 1, q, k] is True where a query sees a
    key; `distance` [rows, q, k] is the query's position minus the key's.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    distance: torch.Tensor
    _biases: dict[tuple[torch.dtype, int | None], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device) -> Group:
        """Copy to `device`."""
        return Group(*(getattr(self, f.name).to(device) for f in fields(self) if f.init))

    def bias(self, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Bias on the attention scores [1, 1, q, k]: 0, or -inf where the mask or the sliding window hides a key.

        All layers share it; otherwise each would keep a copy for the backward pass.
        """
        if (dtype, window) not in self._biases:
            # The mask is the same for all rows.
            seen = self.mask[:1]
            if window is not None:
                seen = seen & (self.distance[:1] < window).unsqueeze(1)
            self._biases[dtype, window] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return self._biases[dtype, window]


@dataclass(frozen=True)
class PackedRows:
    """One forward pass: `tokens` and `positions` [1, n]; for each learned token, the index of the token before it
    (`predictors`), the token itself (`targets`), and the weight of its row (`weights`).

    `place` [n] maps packed tokens to their rows in the concatenated outputs of the groups.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    place: torch.Tensor
    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved, groups=tuple(group.to(device) for group in self.groups))

    def after_cache(self, length: int) -> PackedRows:
        """The same rows after a KV cache of `length` positions, whose keys come first and are seen by all rows."""
        return replace(self, positions=self.positions + length, groups=tuple(_after(g, length, 0) for g in self.groups))

    def after_tokens(self, length: int) -> PackedRows:
        """The same rows after `length` tokens that are prepended to `tokens` and seen by all rows.

        `positions`, `place` and `groups` include the new tokens; `tokens` and `predictors` do not.
        """
        before = torch.arange(length, device=self.positions.device)
        first = _group([range(length)], range(0)).to(before.device)
        return replace(
            self,
            positions=torch.cat([before[None], self.positions + length], 1),
            place=torch.cat([before, self.place + length]),
            groups=(first, *(_after(group, length, length) for group in self.groups)),
        )


def pack(examples: Sequence[Example], shared: int | None = None) -> PackedRows:
    """Pack the examples into one sequence that starts with their common prefix once, or only `shared` tokens of it."""
    shared = shared_length(examples) if shared is None else shared
    tokens = list(examples[0].tokens[:shared])
    positions = list(range(shared))
    own: list[range] = []
    predictors: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example in examples:
        start = len(tokens)
        own.append(range(start, start + len(example.tokens) - shared))
        tokens += example.tokens[shared:]
        positions += range(shared, len(example.tokens))
        where = [*range(shared), *own[-1]]
        learned = [i for i in range(1, len(example.tokens)) if example.learned[i]]
        predictors += [where[i - 1] for i in learned]
        targets += [example.tokens[i] for i in learned]
        weights += [example.weight] * len(learned)
    groups = [_group([range(shared)], range(0))] if shared else []
    groups.append(_group(own, range(shared)))
    return PackedRows(
        torch.tensor([tokens]),
        torch.tensor([positions]),
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(weights),
        _place(groups, own, shared),
        tuple(groups),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    packed: PackedRows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention on a packed sequence, with the signature of an attention function in transformers.

    `query` is [1, heads, n, dim], `key` and `value` are [1, kv_heads, n, dim], after those of a cache if there is one;
    returns [1, n, heads, dim].
    """
    heads, key_heads, dim = query.shape[1], key.shape[1], key.shape[3]
    # Repeated heads would be kept for the backward pass, but torch's fast kernels on GPUs do not support grouped heads.
    grouped = query.device.type == "cpu"
    repeats = 1 if grouped else heads // key_heads
    outputs = []
    for group in packed.groups:
        rows = len(group.queries)
        q = _gathered(query, group.queries).view(rows, -1, heads, dim).transpose(1, 2)
        k, v = (_gathered(states, group.keys).view(rows, -1, key_heads, dim) for states in (key, value))
        k, v = (states.transpose(1, 2).repeat_interleave(repeats, 1) for states in (k, v))
        bias = group.bias(query.dtype, sliding_window)
        if grouped and query.dtype == torch.bfloat16 and k.shape[2] <= MOST_KEYS and not dropout:
            out = _Products.apply(q, k, v, bias, scaling or dim**-0.5)  # type: ignore[no-untyped-call]
        else:
            out = scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * dim))
    return torch.cat(outputs).index_select(0, packed.place).view(1, -1, heads, dim), None


class _Products(torch.autograd.Function):
    """Grouped-query attention of queries [rows, heads, q, dim] to keys and values [rows, kv_heads, k, dim].

    Scores and softmax are in float32: those of some bases are so large that bfloat16 makes the weights wrong. The
    gradients are those of FlashAttention (Dao et al. 2022, arXiv:2205.14135), without its blocks.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes arguments by position
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows, heads, width, dim = query.shape
        # The heads that have a key head in common, one after the other.
        query = query.reshape(rows, key.shape[1], -1, dim)
        with torch.autocast("cpu", enabled=False):
            scores = (query.float() * scaling) @ key.float().mT
        scores.view(rows, key.shape[1], -1, width, key.shape[2]).add_(bias)
        weights = scores.softmax(-1).to(value.dtype)
        out = weights @ value
        ctx.save_for_backward(query, key, value, weights, out)
        ctx.scaling = scaling
        return out.view(rows, heads, width, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - as above
        query, key, value, weights, out = ctx.saved_tensors
        to_out = grad.reshape(out.shape)
        along = torch.linalg.vecdot(to_out.float(), out.float()).unsqueeze(-1)
        to_scores = ((to_out @ value.mT) - along).mul_(weights).mul_(ctx.scaling).to(weights.dtype)
        return (to_scores @ key).view(grad.shape), to_scores.mT @ query, weights.mT @ to_out, None, None


def _gathered(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select states [1, heads, n, dim] of packed tokens as [tokens, heads * dim].

    Uses `index_select` on whole rows: the gradient of plain indexing takes three times as long.
    """
    return states[0].transpose(0, 1).flatten(1).index_select(0, indices.flatten())


AttentionInterface.register(_ATTENTION, packed_attention)


def on_packed_rows(convolution: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A causal convolution of inputs [1, channels, n] that also takes packed rows; without, nothing changes."""

    @wraps(convolution)
    def convolve(
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        packed: PackedRows | None = None,
        **options: object,
    ) -> torch.Tensor:
        if packed is None:
            return convolution(inputs, weight, bias, **options)
        outputs = []
        for group in packed.groups:
            rows, width = group.queries.shape
            # Of the shared tokens only those that the kernel reaches.
            read = group.keys[:, -(width + weight.shape[-1] - 1) :]
            of_rows = inputs[0].index_select(1, read.flatten()).view(-1, rows, read.shape[1]).transpose(0, 1)
            outputs.append(convolution(of_rows, weight, bias, **options)[:, :, -width:].transpose(0, 1).flatten(1))
        return torch.cat(outputs, 1).index_select(1, packed.place)[None]

    return convolve


def after_prefix(rule: Callable[..., tuple[torch.Tensor, Any]]) -> Callable[..., tuple[torch.Tensor, Any]]:
    """A delta rule on tensors [1, n, …] that also takes packed rows, each after the state of the shared tokens."""

    @wraps(rule)
    def compute(
        *states: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, packed: PackedRows | None = None, **options: object
    ) -> tuple[torch.Tensor, Any]:
        if packed is None:
            return rule(*states, g=g, beta=beta, **options)
        outputs, state = [], None
        for group in packed.groups:
            rows = len(group.queries)
            *read, decay, gain = (
                part[0].index_select(0, group.queries.flatten()).view(rows, -1, *part.shape[2:])
                for part in (*states, g, beta)
            )
            initial = {"initial_state": None if state is None else state.expand(rows, -1, -1, -1)}
            out, state = rule(*read, g=decay, beta=gain, **{**options, **initial, "output_final_state": True})
            outputs.append(out.flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed.place)[None], None

    return compute


_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "causal_conv1d_fn": on_packed_rows,
    "torch_chunk_gated_delta_rule": after_prefix,
}


def take_packed_rows(model: PreTrainedModel) -> None:
    """Make `model` attend within packed rows, and its convolutions and delta rules take them too."""
    model.set_attn_implementation(_ATTENTION)
    _wrap_functions(type(model).__module__)


@cache
def _wrap_functions(module: str) -> None:
    # transformers has no registry of these functions, but passes the options of a forward pass on to them too.
    for name, wrapper in _WRAPPERS.items():
        if hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, wrapper(getattr(sys.modules[module], name)))


def shared_length(examples: Sequence[Example]) -> int:
    """Length of the common prefix of all rows, leaving each row at least one token; 0 for a single row."""
    if len(examples) < 2:
        return 0
    columns = zip(*(example.tokens for example in examples), strict=False)
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return min(alike, min(len(example.tokens) for example in examples) - 1)


def _group(rows: Sequence[range], before: range) -> Group:
    """A group of rows of packed indices, each of which sees all of `before` and itself causally."""
    longest = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor([row.start for row in rows])
    step = torch.arange(longest)
    queries = starts[:, None] + torch.minimum(step, lengths[:, None] - 1)
    keys = torch.cat([torch.tensor(before, dtype=torch.long).expand(len(rows), -1), queries], 1)
    distance = (step[:, None] + len(before)) - torch.arange(len(before) + longest)
    # Padded queries still see keys: a row of the mask without any would give NaN.
    mask = (distance >= 0).expand(len(rows), 1, -1, -1)
    return Group(queries, keys, mask, distance.expand(len(rows), -1, -1))


def _after(group: Group, length: int, tokens: int) -> Group:
    """The group after `length` keys that all its queries see; `tokens` is how many of them are packed tokens, all or
    none."""
    rows, width = group.queries.shape
    before = torch.arange(length, device=group.keys.device)
    # A group's first key is at position 0, so its distance is the query's position.
    distance = group.distance[:, :, :1] + length - before
    return Group(
        group.queries + tokens,
        torch.cat([before.expand(rows, -1), group.keys + length], 1),
        torch.cat([group.mask.new_ones(rows, 1, width, length), group.mask], 3),
        torch.cat([distance, group.distance], 2),
    )


def _place(groups: Sequence[Group], own: Sequence[range], shared: int) -> torch.Tensor:
    width = groups[-1].queries.shape[1]
    places = [torch.arange(shared)]
    places += [shared + row * width + torch.arange(len(indices)) for row, indices in enumerate(own)]
    return torch.cat(places)

"""Compares the exported model in an engine with the trained model: KL divergence and agreement on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from .adapters.shapes import Floats


class Rows(Protocol):
    """Logits of a row of tokens, float32 [tokens, vocabulary]: an array, or an object that computes parts on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and vocabulary."""

    def __getitem__(self, part: slice, /) -> Floats:
        """The logits after these tokens."""


TrainedLogits = Callable[[list[int]], Rows]
"""Maps token ids to the trained model's logits after each."""


class Decoder(Protocol):
    """The part of `Engine` that a comparison needs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's own tokenizer."""

    def truncate(self, keep: int) -> int:
        """Drop the tokens from position `keep` on."""

    def decode(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; logits after the last, shape [vocab]."""

    def decode_all(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; logits after each, shape [tokens, vocab]."""


TOLERANCE_KL = {kind.name: kind.kl for kind in TENSOR_TYPES.values() if kind.kl is not None}
"""Largest accepted mean KL of an adapter by the main type of its base."""
TOLERANCE_KL_FILE = {**TOLERANCE_KL, "q8_0": 1e-3}
"""The same by the types in the adapter's file; the largest applies. Only its change of the base is rounded."""
TOLERANCE_KL_MERGED = {kind.name: kind.merged_kl for kind in TENSOR_TYPES.values() if kind.merged_kl is not None}
"""Largest accepted mean KL of merged models by main type; their adapted weights are requantized to the base's types."""

EXACT = 1e-5
"""A low-rank adapter counts as exact if it leaves out less than this share of the trained change."""
TOLERANCE_KL_TRUNCATED = 0.5
"""Largest accepted mean KL of a change that was truncated to a low rank; the recipe limits the truncation itself."""

MOST_LOST = 0.5
"""Largest accepted KL of a merged model from the trained model, as a share of the plain base's."""

# Positions in double precision at a time: a vocabulary of 262k needs 2 MB per position.
_POSITIONS = 16


@dataclass(frozen=True)
class Parity:
    """How far an exported adapter is from the trained one.

    `kl` is the mean KL divergence of the exported from the trained next-token distribution, in nats per token; `top1`
    the share of positions with the same top token; `greedy` the number of leading tokens on which greedy answers agree,
    the minimum over the prompts, None without prompts; `rows` and `tokens` are the numbers of rows and tokens compared.
    """

    kl: float
    top1: float
    greedy: int | None
    rows: int
    tokens: int

    def figures(self) -> dict[str, float]:
        """What was compared, for the manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(
    trained: TrainedLogits,
    engine: Decoder,
    rows: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] = (),
    max_tokens: int = 16,
) -> Parity:
    """Compare logits on the token `rows` and greedy answers to the token `prompts`.

    `starts` are the positions of the rows from which on logits count, by default 1. Those after the first token of a
    row count only if it is the only one: nothing is answered there, and many models have far larger activations at that
    position than at others (arXiv 2402.17762), which an engine that rounds activations to 8 bits computes coarsely:
    Qwen2.5-1.5B in q4_k_m is 4 nats off there. The engine uses its active adapters; its sequence is dropped. Raises
    VerificationError if the vocabularies differ and UsageError if there are no tokens to compare.
    """
    nats, same, count = 0.0, 0, 0
    for row, start_of_row in zip(rows, starts or [1] * len(rows), strict=True):
        tokens = list(row)
        if not tokens:
            continue
        engine.truncate(0)
        exported, expected = engine.decode_all(tokens), trained(tokens)
        _require_same_shape(expected, exported)
        first = min(start_of_row, len(tokens) - 1)
        for start in range(first, len(tokens), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            expected_part, exported_part = expected[part], exported[part]
            nats += float(divergence(expected_part, exported_part).sum())
            same += int((expected_part.argmax(-1) == exported_part.argmax(-1)).sum())
        count += len(tokens) - first
    if count == 0:
        raise UsageError("there are no tokens to compare the exported adapter on", "add validation rows")
    greedy = greedy_agreement(trained, engine, prompts, max_tokens) if prompts else None
    return Parity(nats / count, same / count, greedy, len(rows), count)


def greedy_agreement(trained: TrainedLogits, engine: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Number of leading tokens on which greedy answers of both agree, the minimum over the prompts.

    An answer that agrees to its end counts as `max_tokens`. The trained model runs once per prompt, on the engine's
    tokens: up to the first difference it would have generated the same.
    """
    return min(_agreement(trained, engine, list(prompt), max_tokens) for prompt in prompts)


def check(
    parity: Parity,
    name: str | None,
    weight_type: str,
    *,
    types: Iterable[str] = (),
    merged: bool = False,
    error: float = 0.0,
    requantized_kl: Mapping[str, float] | None = None,
) -> None:
    """VerificationError unless the adapter `name`, or the plain base for None, is within the tolerance of its base.

    `weight_type` is what `Backend.weight_type` returns, and `requantized_kl` the format's tolerances for types of its
    own; `types` are those in the adapter's file. The loosest tolerance applies to types that were not measured. `error`
    is the share of the trained change that a truncated adapter leaves out; it gets a tolerance of at least
    TOLERANCE_KL_TRUNCATED.
    """
    table = TOLERANCE_KL_MERGED if merged else TOLERANCE_KL
    loosest = max(table.values())
    requantized_kl = requantized_kl or {}
    limit = {**table, **requantized_kl}.get(weight_type, loosest)
    if error > EXACT:
        limit = max(limit, TOLERANCE_KL_TRUNCATED)
    if not merged:
        limit = max([limit, *(TOLERANCE_KL_FILE.get(name, loosest) for name in types)])
    subject = "the plain base" if name is None else f"adapter {name!r}"
    if not math.isfinite(parity.kl):
        message = (
            f"{subject} has logits that are NaN or infinite, in the trained model or the exported one: "
            f"mean KL {parity.kl} on {parity.tokens} tokens"
        )
        raise VerificationError(message, "look for weights that are NaN, infinite or beyond the range of f16")
    if parity.kl > limit:
        message = (
            f"{subject} does not match the trained model: mean KL {parity.kl:.2g} on {parity.tokens} tokens, "
            f"expected at most {limit:.2g} on a {weight_type} base ({parity.top1:.0%} of top tokens agree)"
        )
        coarse = merged or weight_type in requantized_kl
        remedy = "use a base quantization with more bits" if coarse else "report this as a bug, with the recipe"
        raise VerificationError(message, remedy)


def check_kept(merged: Parity, plain: Parity, name: str, weight_type: str, noise: float) -> None:
    """VerificationError if the merged model of the adapter `name` lost more than half of its training to rounding.

    `merged` and `plain` compare the merged model and the plain base with the trained model, on the same tokens. An
    adapter that is at most `noise`, in nats per token, from the plain base is not judged.
    """
    # In this form NaN fails too.
    if plain.kl > noise and not merged.kl <= MOST_LOST * plain.kl:
        message = (
            f"adapter {name!r} loses most of its training in a merged model in {weight_type}: its mean KL from the "
            f"trained model is {merged.kl:.2g} on {merged.tokens} tokens, that of the plain base {plain.kl:.2g}"
        )
        raise VerificationError(message, "leave out merged_quantization, or set it to q8_0")


def _agreement(trained: TrainedLogits, engine: Decoder, prompt: list[int], max_tokens: int) -> int:
    engine.truncate(0)
    chosen: list[int] = []
    logits = engine.decode(prompt)
    while len(chosen) < max_tokens:
        chosen.append(int(logits.argmax()))
        if engine.tokenizer.is_end(chosen[-1]):
            break
        logits = engine.decode(chosen[-1:])
    expected = trained([*prompt, *chosen[:-1]])[len(prompt) - 1 :].argmax(-1)
    different = np.flatnonzero(expected != np.array(chosen))
    return int(different[0]) if different.size else max_tokens


def _require_same_shape(expected: Rows, exported: Floats) -> None:
    if expected.shape != exported.shape:
        message = f"the trained model's logits have shape {expected.shape}, the exported model's {exported.shape}"
        raise VerificationError(message, "train on the weights of the exported base")


def divergence(expected: Floats, exported: Floats) -> npt.NDArray[np.float64]:
    """KL divergence (nats) of each row of `exported` logits from the same row of `expected`."""
    p, q = _log_softmax(expected), _log_softmax(exported)
    return np.asarray((np.exp(p) * (p - q)).sum(-1), np.float64)


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float64)

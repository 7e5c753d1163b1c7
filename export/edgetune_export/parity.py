"""Trained model and engine in, Parity out: how far what was exported is from what was trained, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError, VerificationError

from .adapters.shapes import Floats


class Rows(Protocol):
    """Logits of a row of tokens, float32 [tokens, vocabulary]: an array, or what computes a part when it is asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and vocabulary."""

    def __getitem__(self, part: slice, /) -> Floats:
        """The logits after these tokens."""


TrainedLogits = Callable[[list[int]], Rows]
"""Token ids to the trained model's logits after each."""


class Decoder(Protocol):
    """What is compared of an engine; see `Engine`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's own tokenizer."""

    def truncate(self, keep: int) -> int:
        """Drop the tokens from position `keep` on."""

    def decode(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; logits after the last, shape [vocab]."""

    def decode_all(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; logits after each, shape [tokens, vocab]."""


TOLERANCE_KL = {
    "f32": 1e-4,
    "f16": 1e-4,
    "bf16": 1e-3,
    **dict.fromkeys(("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs"), 0.03),
}
"""Mean KL that an adapter may be off, by the coarsest tensor type in play.

Three times what was measured or more: engines round activations to 8 bits before a product with quantized weights, and
llama.cpp to the weights' own type before one with f16 or bf16.
"""
TOLERANCE_KL_MERGED = {
    "f32": 1e-4,
    "f16": 1e-4,
    "bf16": 2e-3,
    "q8_0": 0.05,
    "q6_k": 0.1,
    **dict.fromkeys(("q5_k", "q5_1", "q5_0"), 0.3),
    **dict.fromkeys(("q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs"), 0.5),
}
"""The same for merged models, whose adapted weights are rounded once more to the base's type."""

INT4 = "int4"
TOLERANCE_KL_INT4 = 0.5
"""Of a base that was trained on and then rounded once more to 4 bits: that changes it by as much as a weak adapter."""

EXACT = 1e-5
"""A share left out below which an adapter of low rank counts as exact."""
TOLERANCE_KL_TRUNCATED = 0.5
"""Of a change that is cut to a low rank: how much that may be is the recipe's business."""

# At most this many positions are held in double precision at once: a vocabulary of 262k takes 2 MB a position.
_POSITIONS = 16


@dataclass(frozen=True)
class Parity:
    """How far an exported adapter is from the trained one.

    `kl` is the mean KL divergence of the exported from the trained next-token distribution, in nats a token; `top1` the
    share of positions where both rank the same token first; `greedy` the tokens that greedy answers agree up to, the
    least over the prompts; `rows` and `tokens` count what was compared.
    """

    kl: float
    top1: float
    greedy: int
    rows: int
    tokens: int


def compare(
    trained: TrainedLogits,
    engine: Decoder,
    rows: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] = (),
    max_tokens: int = 16,
) -> Parity:
    """Run the token `rows` through both, and greedy answers to the token `prompts` (`greedy` is 0 when there are none).

    The engine runs with the adapters that are active in it; its sequence is dropped. Raises VerificationError when the
    two have different vocabularies and UsageError when there is nothing to compare.
    """
    nats, same, count = 0.0, 0, 0
    for row in rows:
        tokens = list(row)
        if not tokens:
            continue
        engine.truncate(0)
        exported, expected = engine.decode_all(tokens), trained(tokens)
        _require_same_shape(expected, exported)
        for start in range(0, len(tokens), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            mine, its = expected[part], exported[part]
            nats += float(divergence(mine, its).sum())
            same += int((mine.argmax(-1) == its.argmax(-1)).sum())
        count += len(tokens)
    if count == 0:
        raise UsageError("no tokens to compare the exported adapter on", "give it validation rows")
    greedy = greedy_agreement(trained, engine, prompts, max_tokens) if prompts else 0
    return Parity(nats / count, same / count, greedy, len(rows), count)


def greedy_agreement(trained: TrainedLogits, engine: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Tokens that both generate alike when each takes its likeliest token, the least over the prompts.

    An answer that agrees to its end counts as `max_tokens`. The trained model runs once a prompt: as long as it would
    have chosen the engine's token itself, it would have seen the same tokens.
    """
    return min(_agreement(trained, engine, list(prompt), max_tokens) for prompt in prompts)


def check(
    parity: Parity, name: str, quantization: str, *, dtype: str = "f16", merged: bool = False, error: float = 0.0
) -> None:
    """VerificationError unless the adapter `name` is within the tolerance of its base.

    `quantization` is the base's (see `describe_quantization`), `dtype` that of the adapter's file. A type that was not
    measured is held to the loosest tolerance, and so is an adapter that leaves out the share `error` of what was
    trained.
    """
    table = TOLERANCE_KL_MERGED if merged else TOLERANCE_KL
    loosest = max(table.values())
    limit = TOLERANCE_KL_INT4 if quantization == INT4 else table.get(quantization, loosest)
    if error > EXACT:
        limit = max(limit, TOLERANCE_KL_TRUNCATED)
    if not merged:
        limit = max(limit, table.get(dtype, loosest))
    # Written so that NaN fails too.
    if not parity.kl <= limit:
        message = (
            f"adapter {name!r} is not what was trained: mean KL {parity.kl:.2g} on {parity.tokens} tokens, "
            f"at most {limit:.2g} is expected on a {quantization} base ({parity.top1:.0%} of top tokens agree)"
        )
        remedy = "quantize the base less" if merged or quantization == INT4 else "report this as a bug, with the recipe"
        raise VerificationError(message, remedy)


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
        message = f"the trained model gives logits {expected.shape}, the exported one {exported.shape}"
        raise VerificationError(message, "train on the weights of the exported base")


def divergence(expected: Floats, exported: Floats) -> npt.NDArray[np.float64]:
    """KL divergence (nats) of each row of `exported` logits from that of `expected`."""
    p, q = _log_softmax(expected), _log_softmax(exported)
    return np.asarray((np.exp(p) * (p - q)).sum(-1), np.float64)


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float64)

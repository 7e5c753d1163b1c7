"""Distillation of a document into a cartridge: the loss between a teacher that sees the document and the student.

The teacher is the base with the document in its context, the student the base with the cartridge (Cartridges, Eyuboglu
et al. 2025, arXiv:2506.06266). The loss is the KL divergence of their predictions on the learned tokens of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from edgetune.objectives.chunks import summed_loss
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import PackedObjective, packed_logits
from edgetune.objectives.packing import PackedRows, pack

from .prompt_model import States, after_states, states_in

# The teacher's top tokens are kept, and the total probability of the others: full distributions need too much memory.
_TOP = 256
# Of a token in int32, and of a log-probability in float32.
_NUMBER_BYTES = 4
# Tokens of a document that are read in one pass.
_CHUNK = 256


@dataclass(frozen=True)
class Lesson:
    """The teacher's predictions for a row's learned tokens: its top `tokens` [learned, top], and the log-probabilities
    of each and of all others together [learned, top + 1]."""

    tokens: torch.Tensor
    log_probabilities: torch.Tensor


@dataclass(frozen=True)
class Distilled:
    """Rows for one forward pass."""

    packed: PackedRows
    rows: tuple[Example, ...]

    @property
    def targets(self) -> torch.Tensor:
        """The learned tokens."""
        return self.packed.targets

    def to(self, device: torch.device) -> Distilled:
        """The same on `device`."""
        return replace(self, packed=self.packed.to(device))


class Distill(PackedObjective):
    """Learn to predict as the base does with the tokens `document` before each row; the end of the document is cut if
    it does not fit in the context. The teacher runs once per row."""

    def __init__(self, document: Sequence[int]) -> None:
        self.document = tuple(document)
        self._states: States | None = None
        self._lessons: dict[Example, Lesson] = {}

    def prepare(self, base: Any) -> None:  # noqa: ANN401 - transformers' model
        """The base takes packed rows, and has read as much of the document as fits in its context."""
        super().prepare(base)
        self._states = _read(base, self.document[: base.config.max_position_embeddings - 1])

    def kept_bytes(self, rows: Iterable[Example]) -> int:
        """The teacher's predictions: see `Lesson`."""
        return (_TOP + _TOP + 1) * _NUMBER_BYTES * sum(map(self.learned, {*rows}))

    def batch(self, rows: Sequence[Example]) -> Distilled:
        """The rows packed one after another."""
        return Distilled(pack(rows), tuple(rows))

    def loss(
        self,
        forward: Callable[..., Any],
        model: Any,  # noqa: ANN401 - as the method attached it
        batch: Distilled,
    ) -> torch.Tensor:
        """Sum of the KL divergences from the teacher, over its top tokens and all others together."""
        lessons = [self._lesson(model.peft.get_base_model(), row) for row in batch.rows]
        device = batch.targets.device
        tokens = torch.cat([lesson.tokens for lesson in lessons]).to(device)
        teacher = torch.cat([lesson.log_probabilities for lesson in lessons]).to(device)

        def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            expected = teacher[rows]
            divergence = expected.exp() * (expected - _log_probabilities(logits, tokens[rows]))
            return (divergence.sum(-1) * batch.packed.weights[rows]).sum()

        return summed_loss(partial(packed_logits, forward, batch.packed), model, loss_of)

    def _lesson(self, base: Any, row: Example) -> Lesson:  # noqa: ANN401 - as above
        if row not in self._lessons:
            is_training = base.training
            # Layers in training mode may compute in int8.
            base.eval()
            try:
                self._lessons[row] = self._taught(base, row)
            finally:
                base.train(is_training)
        return self._lessons[row]

    @torch.no_grad()
    def _taught(self, base: Any, row: Example) -> Lesson:  # noqa: ANN401 - as above
        assert self._states is not None
        room = base.config.max_position_embeddings - len(row.tokens)
        keys, values = (state[:, :, :room] for state in self._states)
        logits = packed_logits(
            lambda **inputs: after_states(base, (keys, values), **inputs), pack([row]).to(base.device)
        ).float()
        tokens = logits.topk(min(_TOP, logits.shape[1] - 1)).indices
        return Lesson(tokens.int().cpu(), _log_probabilities(logits, tokens).cpu())


@torch.no_grad()
def _read(base: Any, document: Sequence[int]) -> States:  # noqa: ANN401 - as above
    """The base's keys and values of the document, read in chunks: the memory for attention to all of it at once grows
    with the square of its length."""
    cache = DynamicCache()
    for start in range(0, len(document), _CHUNK):
        part = tuple(document[start : start + _CHUNK])
        packed = pack([Example(part, (False,) * len(part), len(part))]).to(base.device).after_cache(start)
        inputs = {"input_ids": packed.tokens, "position_ids": packed.positions, "packed": packed}
        base(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
    return states_in(cache)


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens and of all others together [rows, tokens + 1], from logits [rows, vocabulary]."""
    others = logits.scatter(1, tokens.long(), float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, tokens.long()), others], 1) - logits.logsumexp(1, keepdim=True)

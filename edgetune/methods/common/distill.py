"""Distillation of a document into a cartridge: the loss between a teacher that sees the document and the student.

The teacher is the base with the document in its context, the student the base with the cartridge (Cartridges, Eyuboglu
et al. 2025, arXiv:2506.06266). The loss is the KL divergence of their predictions on the learned tokens of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from edgetune.objectives.chunks import summed_loss
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import PackedObjective, packed_logits
from edgetune.objectives.packing import PackedRows, pack

from .prompt_model import States, after_states, states_of

# The teacher's top tokens are kept, and the total probability of the others: full distributions need too much memory.
_TOP = 256


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

    @torch.no_grad()
    def _lesson(self, base: Any, row: Example) -> Lesson:  # noqa: ANN401 - transformers' model
        if row not in self._lessons:
            most = base.config.max_position_embeddings
            if self._states is None:
                self._states = _read(base, self.document[: most - 1])
            keys, values = (state[:, :, : most - len(row.tokens)] for state in self._states)
            logits = packed_logits(
                lambda **inputs: after_states(base, (keys, values), **inputs), pack([row]).to(base.device)
            ).float()
            tokens = logits.topk(min(_TOP, logits.shape[1] - 1)).indices
            self._lessons[row] = Lesson(tokens.int().cpu(), _log_probabilities(logits, tokens).cpu())
        return self._lessons[row]


def _read(base: Any, document: Sequence[int]) -> States:  # noqa: ANN401 - as above
    """The base's keys and values of the document."""
    packed = pack([Example(tuple(document), (False,) * len(document), len(document))]).to(base.device)
    return states_of(base, input_ids=packed.tokens, position_ids=packed.positions, packed=packed)


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens and of all others together [rows, tokens + 1], from logits [rows, vocabulary]."""
    others = logits.scatter(1, tokens.long(), float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, tokens.long()), others], 1) - logits.logsumexp(1, keepdim=True)

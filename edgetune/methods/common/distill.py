"""A document and rows in, the loss of a model that is to answer as if it had read the document out.

The base with the document in its context is the teacher, the base behind a cartridge the student (Cartridges, Eyuboglu
et al. 2025, arXiv:2506.06266): on the learned tokens of the rows, the loss is the divergence of their predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgetune.objectives.chunks import summed_loss
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import packed_logits
from edgetune.objectives.packing import ATTENTION, PackedRows, pack

from .prompt_model import States, behind_states, states_of

# The teacher's likeliest tokens are kept, and how likely all others are together: whole distributions fill the memory.
_TOP = 256


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a row's learned tokens: its likeliest `tokens` [learned, top], and the log-probabilities
    of each and of all others together `[learned, top + 1]`."""

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


class Distill:
    """Predict as the base does with `document`, in tokens, before each row; what does not fit in its context is left
    out at the end. The teacher reads each row once."""

    attention: str | None = ATTENTION

    def __init__(self, document: Sequence[int]) -> None:
        self.document = tuple(document)
        self._states: States | None = None
        self._lessons: dict[Example, Lesson] = {}

    def extend(self, model: Any) -> None:  # noqa: ANN401 - as the method attached it
        """Nothing is trained besides the method's weights."""

    def learned(self, row: Example) -> int:
        """The learned tokens."""
        return sum(row.learned)

    def batch(self, rows: Sequence[Example]) -> Distilled:
        """The rows behind one another."""
        return Distilled(pack(rows), tuple(rows))

    def loss(self, forward: Callable[..., Any], model: Any, batch: Distilled) -> torch.Tensor:  # noqa: ANN401 - as above
        """Kullback-Leibler divergence from the teacher, summed, over its likeliest tokens and all others together."""
        lessons = [self._lesson(model.peft.get_base_model(), row) for row in batch.rows]
        device = batch.targets.device
        tokens = torch.cat([lesson.tokens for lesson in lessons]).to(device)
        teacher = torch.cat([lesson.log_probabilities for lesson in lessons]).to(device)

        def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            said = teacher[rows]
            return (said.exp() * (said - _log_probabilities(logits, tokens[rows]))).sum()

        return summed_loss(partial(packed_logits, forward, batch.packed), model, loss_of)

    def save(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - as above
        """There is nothing else to write."""

    @torch.no_grad()
    def _lesson(self, base: Any, row: Example) -> Lesson:  # noqa: ANN401 - transformers' model
        if row not in self._lessons:
            most = base.config.max_position_embeddings
            if self._states is None:
                self._states = _read(base, self.document[: most - 1])
            keys, values = (state[:, :, : most - len(row.tokens)] for state in self._states)
            logits = packed_logits(
                lambda **inputs: behind_states(base, (keys, values), **inputs), pack([row]).to(base.device)
            ).float()
            tokens = logits.topk(min(_TOP, logits.shape[1] - 1)).indices
            self._lessons[row] = Lesson(tokens.int().cpu(), _log_probabilities(logits, tokens).cpu())
        return self._lessons[row]


def _read(base: Any, document: Sequence[int]) -> States:  # noqa: ANN401 - as above
    """The base's states of the document."""
    packed = pack([Example(tuple(document), (False,) * len(document), len(document))]).to(base.device)
    return states_of(base, input_ids=packed.tokens, position_ids=packed.positions, packed=packed)


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each of the tokens, and of all others together, [rows, tokens + 1] of logits [rows, vocabulary]."""
    others = logits.scatter(1, tokens.long(), float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, tokens.long()), others], 1) - logits.logsumexp(1, keepdim=True)

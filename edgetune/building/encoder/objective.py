"""The objective of text classification: an encoder and a head learn the label of each row.

The head is a linear layer on the mean of the last layer's vectors, as sentence encoders such as all-MiniLM are trained
for. It is `classifier` of the PEFT model, and is saved beside the adapter as head.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from edgetune_export.pooling import mean_pooled
from edgetune_runtime.engines.onnx.encoder import HEAD_BIAS, HEAD_WEIGHT, EncoderTokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from edgetune.tasks.data import TaskRow, labelled_text
from edgetune.tasks.tokenization import fitting

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class Labelled:
    """The tokens of a row and the number of its label; its loss is multiplied by `weight`."""

    tokens: tuple[int, ...]
    label: int
    weight: float = 1.0


@dataclass(frozen=True)
class Padded:
    """Padded rows: `tokens` and `mask` int64 [rows, longest], `targets` int64 [rows], the numbers of the labels,
    and `weights` [rows]."""

    tokens: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> Padded:
        """The same on `device`."""
        return Padded(*(part.to(device) for part in (self.tokens, self.mask, self.targets, self.weights)))


def tokenize_labelled(
    rows: Sequence[TaskRow], tokenizer: EncoderTokenizer, labels: Sequence[str], max_tokens: int
) -> tuple[list[Labelled], tuple[str, ...]]:
    """Tokenize the rows that fit in `max_tokens`, in order; also returns where the longer ones are, never truncated.

    Raises UsageError for rows other than text and label, and if no row fits.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    examples = (
        Labelled(tuple(tokenizer.tokenize(labelled_text(row))), numbers[row.completion or ""], row.weight)
        for row in rows
    )
    return fitting(rows, examples, max_tokens)


class Classify:
    """Trains a head of `labels` outputs on `hidden_size` inputs, together with the weights of the method.

    It starts from the head in the folder `start`, which must be one for the same labels; None: a new one.
    """

    unit = "row"

    def __init__(self, hidden_size: int, labels: int, start: Path | None = None) -> None:
        self._hidden_size, self._labels, self._start = hidden_size, labels, start

    def prepare(self, _base: PreTrainedModel) -> None:
        """Nothing: an encoder takes padded rows as it is."""

    def extend(self, model: PeftModel) -> None:
        """Add the head in float32 to the model."""
        new = torch.nn.Linear(self._hidden_size, self._labels)
        model.classifier = new if self._start is None else load_head(self._start)

    def learned(self, _row: Labelled) -> int:
        """One prediction per row."""
        return 1

    def kept_bytes(self, rows: Iterable[Labelled]) -> int:
        """Nothing is kept."""
        return 0

    def shared(self, rows: Sequence[Labelled]) -> int:
        """None: the tokens of an encoder see those after them."""
        return 0

    def batch(self, rows: Sequence[Labelled]) -> Padded:
        """The rows padded to the longest; the mask hides the padding, so its token does not matter."""
        longest = max(len(row.tokens) for row in rows)
        tokens = [[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows]
        mask = [[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in rows]
        labels, weights = [row.label for row in rows], [row.weight for row in rows]
        return Padded(torch.tensor(tokens), torch.tensor(mask), torch.tensor(labels), torch.tensor(weights))

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: Padded) -> torch.Tensor:
        """The summed cross entropy of the labels."""
        logits = logits_of(forward, model.classifier, batch.tokens, batch.mask)
        return (cross_entropy(logits.float(), batch.targets, reduction="none") * batch.weights).sum()

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the head: weight [labels, hidden] and bias [labels]."""
        head = {HEAD_WEIGHT: model.classifier.weight, HEAD_BIAS: model.classifier.bias}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}, folder / HEAD_FILE)


def logits_of(
    forward: Callable[..., Any], head: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Logits [rows, labels] of padded tokens: the head on the pooled last layer."""
    last = forward(input_ids=tokens, attention_mask=mask).last_hidden_state
    logits: torch.Tensor = head(mean_pooled(last, mask))
    return logits


def load_head(folder: Path) -> torch.nn.Linear:
    """The head that `Classify.save` wrote into `folder`."""
    tensors = load_file(folder / HEAD_FILE)
    labels, hidden = tensors[HEAD_WEIGHT].shape
    head = torch.nn.Linear(hidden, labels)
    head.load_state_dict({"weight": tensors[HEAD_WEIGHT], "bias": tensors[HEAD_BIAS]})
    return head

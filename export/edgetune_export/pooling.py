"""Mean pooling: one vector per text from the vectors of an encoder's last layer, in training and in its graph."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class Pooled(torch.nn.Module):
    """An encoder with mean pooling of its last layer."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The pooled vectors [rows, hidden] of tokens and their mask [rows, tokens]."""
        last = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return mean_pooled(last, attention_mask)


def mean_pooled(last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [rows, hidden] of the vectors [rows, tokens, hidden] where the mask [rows, tokens] is 1."""
    weights = mask.unsqueeze(-1).to(last.dtype)
    return (last * weights).sum(1) / weights.sum(1)

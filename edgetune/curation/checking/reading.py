"""Computes a model's logits for rows with a common beginning, whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from transformers import DynamicCache

from edgetune.objectives.base import row_length
from edgetune.objectives.example import Example
from edgetune.objectives.packing import shared_length


class Reader:
    """A model that reads rows after their common beginning; without `takes_cache`, it reads each from its start."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[Example], *, takes_cache: bool) -> None:
        self.model, self.takes_cache = model, takes_cache
        first_answer = min(example.prompt_length for example in examples)
        # The last token of a prompt predicts the first one of the answer, so each row reads it itself.
        self.shared = min(shared_length(examples), first_answer - 1) if takes_cache else 0
        self._cache = DynamicCache()
        if self.shared:
            self.read([examples[0].tokens[: self.shared]], self._cache, 1)

    def answer_logits(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The logits in the place of each token of the answers, [tokens, vocabulary]."""
        longest = max(map(row_length, examples))
        # Tokens see only those before them, so shorter rows are filled up at their ends.
        tokens = [[*example.tokens[self.shared :], *[0] * (longest - row_length(example))] for example in examples]
        first = min(example.prompt_length for example in examples) - 1
        cache = deepcopy(self._cache)
        cache.batch_repeat_interleave(len(examples))
        logits = self.read(tokens, cache, longest - first)
        return [
            row[example.prompt_length - 1 - first : row_length(example) - 1 - first]
            for row, example in zip(logits, examples, strict=True)
        ]

    def continued(self) -> RowReader:
        """A reader of one row, which reads no token twice while its beginning stays."""
        return RowReader(self, deepcopy(self._cache))

    @torch.inference_mode()
    def read(self, tokens: Sequence[Sequence[int]], cache: DynamicCache, last: int) -> torch.Tensor:
        """The logits after the `last` tokens of each row, [rows, last, vocabulary]; they are added to `cache`."""
        options = {"cache": cache, "use_cache": True, "logits_to_keep": last} if self.takes_cache else {}
        logits: torch.Tensor = self.model(input_ids=torch.tensor(tokens), **options).logits
        return logits[:, -last:]


class RowReader:
    """Reads versions of one row: the keys and values of what did not change are kept."""

    def __init__(self, reader: Reader, cache: DynamicCache) -> None:
        self._reader, self._cache = reader, cache

    def logits(self, tokens: Sequence[int], first: int) -> torch.Tensor:
        """The logits after `tokens[first:]`, [tokens, vocabulary]; the tokens before are those of the last call."""
        cached = min(first, self._cache.get_seq_length())
        self._cache.crop(cached - self._cache.get_seq_length())
        return self._reader.read([tokens[cached:]], self._cache, len(tokens) - first)[0]

"""Tries out whether a step of several sequences gives each the bits of a step of its own, on this processor."""

from __future__ import annotations

from contextlib import ExitStack, closing
from itertools import cycle, islice

import numpy as np

from .base import Batch

_TEXT = "turn on the light in the hall"


def is_exact(batch: Batch, sequences: int) -> bool:
    """Whether it did, for every number of up to so many sequences; the batch must have no others.

    It depends on the library's code for the processor, so it is tried out, which takes a few steps.
    """
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(batch.sequence())) for _ in range(sequences)]
        # Those of a text: others may be none that a sequence can have.
        tokens = list(islice(cycle(engines[0].tokenizer.tokenize(_TEXT)), sequences))
        for engine, token in zip(engines, tokens, strict=True):
            engine.decode([token])
        alone = [engine.decode_all([token]) for engine, token in zip(engines, tokens, strict=True)]
        for count in range(2, sequences + 1):
            for engine in engines:
                engine.truncate(1)
            together = batch.decode(list(zip(engines[:count], tokens, strict=False)))
            if not all(map(np.array_equal, alone, together)):
                return False
    return True

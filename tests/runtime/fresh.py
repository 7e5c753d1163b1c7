"""Greedy answers of a runtime that has answered nothing before, and where rounding may change them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_runtime import Runtime
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.inference.call import Call
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.text.chat import Message

STEPS = 4
TIE = 0.05
"""A lead in logits below which rounding may choose another token (see CLOSE in the engine's tests)."""


def greedy(call: Call) -> list[Logits]:
    """The logits that a call's greedy answer is chosen from, those after the whole answer included."""
    with call.lease() as context:
        rows = [context.run(call.job).logits]
        while len(rows) < STEPS and not context.engine.tokenizer.is_end(token := int(rows[-1].argmax())):
            rows.append(context.extend([token])[0].copy())
    return rows


class Fresh:
    """What a runtime that knows nothing answers."""

    def __init__(self, bundle: Path, engine: str, choices: Sequence[Any]) -> None:
        self._choices = choices
        self._runtime = Runtime.open(bundle, engine=engine, cache_mb=0, disk_mb=0, contexts=1)
        self._greedy = cache(self._greedy_of)

    def greedy(self, messages: Sequence[Message], choice: int) -> list[Logits]:
        """The logits that its answer is chosen from."""
        return self._greedy(tuple((m["role"], m["content"]) for m in messages), choice)

    def agrees(self, text: str, messages: Sequence[Message], choice: int) -> bool:
        """Whether a text is this runtime's answer, up to where that met a tie."""
        tokenizer, pieces, is_whole = loaded_bundle(self._runtime).context()[0].engine.tokenizer, b"", True
        for logits in self.greedy(messages, choice):
            second, first = np.partition(logits, -2)[-2:]
            token = int(logits.argmax())
            is_whole = is_whole and first - second >= TIE
            if not is_whole or tokenizer.is_end(token):
                break
            pieces += tokenizer.piece(token)
        expected = pieces.decode("utf-8", "replace")
        return text == expected if is_whole else text.startswith(expected.rstrip("\N{REPLACEMENT CHARACTER}"))

    def constrained(self, messages: Sequence[Message], choice: int, texts: Sequence[str]) -> str:
        """Its answer, which is one of these texts."""
        self._runtime.clear_cache()
        return self._runtime.generate(messages, adapter=self._choices[choice], choices=texts).text

    def close(self) -> None:
        self._runtime.close()

    def _greedy_of(self, messages: tuple[tuple[str, str], ...], choice: int) -> list[Logits]:
        self._runtime.clear_cache()
        return greedy(
            loaded_bundle(self._runtime).call(
                [{"role": role, "content": text} for role, text in messages], self._choices[choice]
            )
        )

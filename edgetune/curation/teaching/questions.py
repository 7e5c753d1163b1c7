"""Writes the requests to a teacher: to word new prompts of a task, and to answer them like its rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from edgetune.recipe.parts import AdapterSpec
from edgetune.tasks.augmentation.answers import prompt_of
from edgetune.tasks.augmentation.values import SlottedRow, Values
from edgetune.tasks.data import TaskRow

_SHOWN_PROMPTS, _SHOWN_ANSWERS = 4, 8
"""Rows that the teacher sees when it words a prompt, and when it answers one."""

Messages = list[dict[str, str]]


class Questions:
    """The questions about a task whose `rows` have one turn; the same `number` gives the same ones.

    `schema` is that of the output. UsageError for `augment.values` that do not fit.
    """

    def __init__(self, rows: Sequence[TaskRow], spec: AdapterSpec, schema: dict[str, Any] | None, seed: int) -> None:
        self._rows, self._system, self._seed = rows, spec.system, seed
        parsed = [item for row in rows if (item := SlottedRow.of(row)) is not None]
        self._slotted = [item for item in parsed if item.slots]
        listed = {} if spec.data.augment is None else spec.data.augment.values
        self._values = Values(parsed, listed, schema)

    def for_prompt(self, number: int) -> Messages:
        """Asks for a new prompt: in turns for an answer with other values, in other words, and about something else."""
        rng = random.Random(f"{self._seed}/{number}")
        shown = rng.sample(self._rows, min(_SHOWN_PROMPTS, len(self._rows)))
        about = f"The task: {self._system}\n" if self._system else ""
        examples = "\n".join(f"- {prompt_of(row)}" for row in shown)
        exchanged = self._values.exchanged(rng.choice(self._slotted), rng) if self._slotted and number % 2 else None
        if exchanged is not None:
            wish = f"Write one more request, in other words, whose right answer is: {exchanged[0].completion}"
        elif number % 4:
            wish = f"Write this request in other words that mean the same: {prompt_of(shown[0])}"
        else:
            wish = "Write one more request, about something else that the task can do."
        content = f"{about}Requests that people made:\n{examples}\n\n{wish} Answer with the request alone."
        return [{"role": "user", "content": content}]

    def for_answer(self, prompt: str, number: int) -> Messages:
        """Asks for the answer to a prompt, after some rows."""
        rng = random.Random(f"{self._seed}/{number}/answer")
        shown = rng.sample(self._rows, min(_SHOWN_ANSWERS, len(self._rows)))
        turns = [
            {"role": role, "content": content}
            for row in shown
            for role, content in (("user", prompt_of(row)), ("assistant", row.completion or ""))
        ]
        content = f"{self._system or ''}\nAnswer in the form of the examples, with nothing else.".strip()
        return [{"role": "system", "content": content}, *turns, {"role": "user", "content": prompt}]

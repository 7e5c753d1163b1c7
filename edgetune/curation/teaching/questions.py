"""Writes the requests to a teacher: to word new prompts of a task, and to answer them like its rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from edgetune.recipe.parts import AdapterSpec
from edgetune.tasks.augmentation.answers import prompt_of
from edgetune.tasks.augmentation.english import are_english
from edgetune.tasks.augmentation.slots import SlottedRow
from edgetune.tasks.augmentation.values import Values
from edgetune.tasks.data import TaskRow

_SHOWN_PROMPTS, _SHOWN_ANSWERS = 4, 8
"""Rows that the teacher sees when it words a prompt, and when it answers one."""
_MOST_LISTED = 4000
"""Characters of the labels or choices that the teacher is told."""

Messages = list[dict[str, str]]


class Questions:
    """The questions about a task whose `rows` have one turn; the same `number` gives the same ones.

    `schema` is that of the output, `answers` are the labels or choices if the task has any. UsageError for
    `augment.values` that do not fit.
    """

    def __init__(
        self,
        rows: Sequence[TaskRow],
        spec: AdapterSpec,
        schema: dict[str, Any] | None,
        answers: Sequence[str],
        seed: int,
    ) -> None:
        self._rows, self._system, self._seed = rows, spec.system, seed
        counts = Counter(row.completion for row in rows)
        beside = None if spec.out_of_scope is None else spec.out_of_scope.label
        self._weights = {answer: 1 / (1 + counts[answer]) for answer in answers if answer != beside}
        self._listed = _listed(answers)
        english = are_english(rows)
        parsed = [item for row in rows if (item := SlottedRow.of(row, english=english)) is not None]
        self._slotted = [item for item in parsed if item.slots]
        listed = {} if spec.data.augment is None else spec.data.augment.values
        self._values = Values(parsed, listed, schema)

    def for_prompt(self, number: int) -> Messages:
        """Asks for a new prompt: in turns for another answer, in other words, and about something else.

        Other answers are rows with other values, or labels and choices: the fewer rows one has, the more often.
        """
        row, wish = self._wish(number)
        others = [other for other in self._shown(row, f"{number}/prompt", _SHOWN_PROMPTS) if other is not row]
        examples = "\n".join(f"- {prompt_of(shown)}" for shown in [row, *others][:_SHOWN_PROMPTS])
        system = row.system or self._system
        about = f"The task: {system}\n" if system else ""
        about += f"Its answers: {self._listed}\n" if self._listed else ""
        content = f"{about}Requests that people made:\n{examples}\n\n{wish}\nAnswer with the request alone."
        return [{"role": "user", "content": content}]

    def for_answer(self, prompt: str, number: int) -> Messages:
        """Asks for the answer to a prompt, after some rows."""
        row = self.row_of(number)
        turns = [
            {"role": role, "content": content}
            for shown in self._shown(row, f"{number}/answer", _SHOWN_ANSWERS)
            for role, content in (("user", prompt_of(shown)), ("assistant", shown.completion or ""))
        ]
        system = row.system or self._system or ""
        one_of = f"\nThe answer is one of {self._listed}" if self._listed else ""
        content = f"{system}{one_of}\nAnswer in the form of the examples, with nothing else.".strip()
        return [{"role": "system", "content": content}, *turns, {"role": "user", "content": prompt}]

    def row_of(self, number: int) -> TaskRow:
        """The row that the prompt of this number is made from."""
        return self._wish(number)[0]

    def _wish(self, number: int) -> tuple[TaskRow, str]:
        """The row that a prompt is made from, and what is asked for."""
        rng = random.Random(f"{self._seed}/{number}")
        row, answer = rng.choice(self._rows), None
        if number % 2 and self._weights:
            answer = rng.choices(list(self._weights), list(self._weights.values()))[0]
            row = rng.choice([row for row in self._rows if row.completion == answer] or self._rows)
        elif number % 2 and self._slotted:
            item = rng.choice(self._slotted)
            if (exchanged := self._values.exchanged(item, rng)) is not None:
                row, answer = item.row, exchanged[0].row.completion
        if answer is not None:
            return row, f"Write one more request, in other words, whose right answer is: {answer}"
        if number % 4:
            return row, f"Write this request in other words that mean the same: {prompt_of(row)}"
        return row, "Write one more request, about something else that the task can do."

    def _shown(self, row: TaskRow, purpose: str, most: int) -> list[TaskRow]:
        """Some rows, first those with the system prompt of `row`."""
        shuffled = random.Random(f"{self._seed}/{purpose}").sample(self._rows, len(self._rows))
        return sorted(shuffled, key=lambda other: other.system != row.system)[:most]


def _listed(answers: Sequence[str]) -> str:
    """The answers as a list in JSON, as many as fit; "" for none."""
    texts = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    ends = accumulate(len(text) + len(", ") for text in texts)
    listed = [text for text, end in zip(texts, ends, strict=True) if end <= _MOST_LISTED]
    more = f" and {len(texts) - len(listed)} more" if len(listed) < len(texts) else ""
    return f"[{', '.join(listed)}]{more}" if listed else ""

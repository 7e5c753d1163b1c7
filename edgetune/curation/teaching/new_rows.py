"""Makes new rows with a teacher, and keeps those whose answers fit the task and agree with each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError

from edgetune.building.outputs.infer import infer
from edgetune.common.progress import Progress
from edgetune.curation.checking.duplicates import answer_key, prompt_key
from edgetune.curation.checking.findings import TRAIN, SplitRow
from edgetune.tasks.augmentation.answers import Answer, prompt_of
from edgetune.tasks.data import TaskRow, read_rows
from edgetune.tasks.task import Task

from .questions import Questions
from .teacher import Teacher

_WORDING, _ANSWERS = 1.0, (0.0, 0.7)
"""Temperatures of a new prompt, and of the two answers to it."""
_MOST_CHARACTERS = 2000
"""Length of a prompt; a longer text is no request."""


@dataclass(frozen=True)
class Lesson:
    """A task that a teacher makes rows of. UsageError for rows with tools or of several turns, which it cannot make."""

    task: Task
    teacher: Teacher

    def __post_init__(self) -> None:
        for row in self.task.train:
            if not prompt_of(row) or len([turn for turn in row.messages or () if turn["role"] != "system"]) > 1:
                raise UsageError(
                    f"{row.where}: has several turns or no prompt", "use rows of one prompt and its answer"
                )
            if row.tools is not None:
                raise UsageError(f"{row.where}: has tools, whose calls a teacher is not asked for", "use other rows")

    @cached_property
    def output(self) -> OutputSpec | None:
        """The output constraint: the recipe's, or one inferred from the rows; None for labels and free text."""
        option = self.task.spec.output
        if option is not None and option.spec is not None:
            return option.spec
        return None if self.task.labels else infer([row.completion or "" for row in self.task.train])

    @cached_property
    def _questions(self) -> Questions:
        return Questions(self.task.train, self.task.spec.system, self.task.training.seed)

    def first_request(self) -> dict[str, Any]:
        """The request that is sent first; later ones have other rows of the task."""
        return self.teacher.request(self._questions.for_prompt(0), temperature=_WORDING, seed=0)

    def learn(self, out: Path, rows: int, progress: Progress) -> Counter[str]:
        """Write `rows` new rows to `out`, one at a time; those that are there already count. Returns what was left out.

        Ends earlier when all requests are sent. Raises TeacherError, with all rows kept, if the teacher fails.
        """
        has_rows = out.is_file() and out.stat().st_size > 0
        existing = [*self.task.train, *self.task.validation, *(read_rows(str(out)) if has_rows else [])]
        prompts = {prompt_key(SplitRow(TRAIN, row)) for row in existing}
        written = len(existing) - len(self.task.train) - len(self.task.validation)
        left_out: Counter[str] = Counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file, progress.step("asking the teacher", rows) as step:
            step.update(done=written)
            # Behind the questions of earlier runs, as no row takes so few bytes.
            new_rows = self._new_rows(prompts, left_out, first=file.tell())
            while written < rows and (new_row := next(new_rows, None)) is not None:
                file.write(json.dumps(new_row, ensure_ascii=False) + "\n")
                file.flush()
                written += 1
                step.update()
        if written < rows:
            progress.say(
                f"{written} of {rows} rows are made with {self.teacher.sent} requests; allow more with --requests"
            )
        return left_out

    def _new_rows(self, prompts: set[str], left_out: Counter[str], first: int) -> Iterator[dict[str, str]]:
        """New rows, until too few requests for another one are left."""
        number = first
        while self.teacher.sent + 1 + len(_ANSWERS) <= self.teacher.most_requests:
            number += 1
            prompt = _request_of(self._answer(self._questions.for_prompt(number), _WORDING, number))
            key = prompt_key(SplitRow(TRAIN, TaskRow("", ({"role": "user", "content": prompt},))))
            if not 0 < len(prompt) <= _MOST_CHARACTERS or key in prompts:
                left_out["prompts that are there already, or are none"] += 1
                continue
            prompts.add(key)
            schema = json.loads(self.output.text) if self.output is not None and self.output.kind == "schema" else None
            question = self._questions.for_answer(prompt, number)
            answers = [self._written(self._answer(question, temperature, number, schema)) for temperature in _ANSWERS]
            if not all(map(self._fits, answers)):
                left_out["answers that do not fit the task"] += 1
            elif len({answer_key(SplitRow(TRAIN, TaskRow("", completion=answer))) for answer in answers}) > 1:
                left_out["answers that disagree"] += 1
            else:
                yield {"prompt": prompt, "completion": answers[0]}

    def _answer(self, messages: list[dict[str, str]], temperature: float, seed: int, schema: object = None) -> str:
        body = self.teacher.request(messages, temperature=temperature, seed=seed, schema=schema)
        return self.teacher.ask(body).strip()

    def _written(self, answer: str) -> str:
        """An answer in JSON as the rows write it; others as they are."""
        style = next((parsed.style for row in self.task.train if (parsed := Answer.of(row)) is not None), None)
        try:
            return answer if style is None else json.dumps(json.loads(answer), **style)
        except (ValueError, RecursionError):
            return answer

    def _fits(self, answer: str) -> bool:
        if self.task.labels:
            return answer in self.task.labels
        return bool(answer) and (self.output is None or self.output.accepts(answer))


def _request_of(text: str) -> str:
    """The first line of an answer, without the dash or the quotation marks around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("- ").strip('"“”').strip() if lines else ""

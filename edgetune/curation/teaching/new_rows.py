"""Makes new rows with a teacher, and keeps those whose answers fit the task and agree with each other."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.chat_client import unfenced, without_thought
from edgetune_runtime.text.json_text import json_or_none
from edgetune_runtime.wording import shortened

from edgetune.building.outputs.infer import infer
from edgetune.building.outputs.resolve import output_of_task
from edgetune.common.progress import Progress
from edgetune.curation.checking.check import test_rows_beside
from edgetune.curation.checking.duplicates import answer_key, prompt_key
from edgetune.curation.checking.findings import TRAIN, SplitRow
from edgetune.tasks.augmentation.answers import Answer, prompt_of
from edgetune.tasks.data import TaskRow, read_rows
from edgetune.tasks.plain_prompts import without_system
from edgetune.tasks.task import Task

from .questions import Questions
from .row_file import adding_to
from .row_form import RowForm
from .teacher import RefusedRequestError, Reply, RequestsSentError, Teacher, TeacherError

_WORDING, _ANSWERS = 1.0, (0.0, 0.7)
"""Temperatures of a new prompt, and of the two answers to it."""
_TIMES_AS_LONG, _MORE_CHARACTERS = 3, 200
"""How much longer than the longest prompt of the rows a new one may be; a longer text is not a request."""
_MOST_IN_VAIN = 20
"""Prompts in a row without a row that is kept, after which asking more is a waste."""
_INTRODUCED = re.compile(r"[^\n]*[:\uff1a]\s*\n(.*)", re.DOTALL)
_FIRST_ITEM = re.compile(r"^(?:[-*•]|1[.)])\s+")
_MARKED = re.compile('[*"“”„«»「]+([^*"“”„«»「」]*)[*"“”«»」]+')
_CUT_OFF = "answers that are cut off (--max-tokens allows more)"


class _LeftOut(NamedTuple):
    """Why a prompt does not become a row, and what the teacher said last."""

    reason: str
    texts: Sequence[str]


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
        if not self._rows:
            raise UsageError(f"all rows of {self.task.name} are out of scope", "add rows with its other labels")

    @cached_property
    def output(self) -> OutputSpec | None:
        """The output constraint: the recipe's, or one inferred from the rows; None for labels and free text."""
        if self.task.spec.output is not None:
            return output_of_task(self.task)
        return None if self.task.labels else infer([row.completion or "" for row in self.task.train])

    @property
    def _schema(self) -> dict[str, Any] | None:
        return None if self.output is None else self.output.schema

    @cached_property
    def _rows(self) -> list[TaskRow]:
        """The training rows that people wrote for the task: the build makes others that are out of its scope."""
        return self.task.in_scope(self.task.train)

    @cached_property
    def _form(self) -> RowForm:
        return RowForm.of(self.task.spec.data, self._rows)

    @cached_property
    def _questions(self) -> Questions:
        option = self.task.spec.output
        given = None if option is None or option.spec is None else option.spec.schema
        return Questions(self._rows, self.task.spec, given, self._answers, self.task.training.seed)

    @property
    def _answers(self) -> Sequence[str]:
        """The labels or choices; none if an answer can be something else."""
        if self.task.labels or self.output is None or self.output.kind != "choices":
            return self.task.labels
        return list(json.loads(self.output.text))

    @cached_property
    def _most_characters(self) -> int:
        return _TIMES_AS_LONG * max(len(prompt_of(row)) for row in self._rows) + _MORE_CHARACTERS

    @cached_property
    def _long_prompts(self) -> Sequence[str]:
        """The prompts of several lines."""
        prompts = [prompt_of(row).strip() for row in self._rows]
        return [prompt for prompt in prompts if len(prompt.splitlines()) > 1]

    def first_requests(self, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The request for a new prompt that is sent first, and the one for an answer to it; later ones have other rows.

        `out` is the file for the new rows.
        """
        number = _first_number(out)
        wording = self.teacher.request(self._questions.for_prompt(number), temperature=_WORDING, seed=number)
        question = self._questions.for_answer("(the new prompt)", number)
        return wording, self.teacher.request(question, temperature=_ANSWERS[0], seed=number, schema=self._schema)

    def learn(self, out: Path, rows: int, progress: Progress) -> Counter[str]:
        """Write `rows` new rows to `out`, one at a time; those that are there already count. Returns what was left out.

        Ends earlier when all requests are sent. Raises TeacherError, with all rows kept, if the teacher fails, or if
        nothing that it says is of use, and UsageError if `out` has other lines than rows, or another process uses it.
        """
        # Those that `edgetune data check` compares with the training rows.
        tests = test_rows_beside(self.task.spec.data, self.task.labels)
        with adding_to(out) as add:
            first = _first_number(out)
            made = self._made_before(out) if first > 1 else []
            existing = [*self.task.train, *self.task.validation, *self.task.confidence_rows, *tests, *made]
            prompts = {prompt_key(SplitRow(TRAIN, without_system(row))) for row in existing}
            written = len(made)
            left_out: Counter[str] = Counter()
            if made and not out.read_bytes().endswith(b"\n"):
                add("\n")
            new_rows = self._new_rows(prompts, left_out, first)
            with progress.step("asking the teacher", rows) as step:
                step.update(done=written)
                while written < rows and (new_row := next(new_rows, None)) is not None:
                    add(json.dumps(new_row, ensure_ascii=False) + "\n")
                    written += 1
                    step.update()
        if written < rows:
            progress.say(
                f"{written} of {rows} rows are made with {self.teacher.sent} requests; allow more with --requests"
            )
        return left_out

    def _made_before(self, out: Path) -> list[TaskRow]:
        """The rows of earlier runs."""
        try:
            return read_rows(str(out), self.task.spec.data.columns)
        except UsageError as error:
            remedy = error.remedy or "complete or delete that line, or give another --out"
            raise UsageError(error.message, remedy) from error

    def _new_rows(self, prompts: set[str], left_out: Counter[str], first: int) -> Iterator[dict[str, Any]]:
        """New rows, until too few requests for another one are left.

        TeacherError after many prompts without a row, or if none became one.
        """
        numbers, in_vain, is_of_use = count(first), Counter[str](), False
        last: Sequence[str] = ()
        while in_vain.total() < _MOST_IN_VAIN and self._can_ask:
            try:
                made = self._made(next(numbers), prompts)
            except RefusedRequestError as error:
                made = _LeftOut("requests that the teacher refuses", [error.message])
            except RequestsSentError:
                # Tries after failures leave fewer requests for the row than it needs.
                if not is_of_use:
                    raise
                return
            if not isinstance(made, _LeftOut):
                in_vain.clear()
                is_of_use = True
                yield made
                continue
            left_out[made.reason] += 1
            in_vain[made.reason] += 1
            last = made.texts
        is_enough = in_vain.total() == _MOST_IN_VAIN
        if is_enough or not is_of_use:
            reasons = ", ".join(f"{number} {reason}" for reason, number in in_vain.most_common())
            said = " and ".join(repr(shortened(text, 200)) for text in last)
            message = f"none of the last {in_vain.total()} prompts became a row: {reasons}; the last: {said}"
            remedy = "try another --model" if is_enough else "try another --model, or allow more with --requests"
            raise TeacherError(message, f"{remedy}; the rows before are kept")

    @property
    def _can_ask(self) -> bool:
        """Whether enough requests are left for another row."""
        return self.teacher.sent + 1 + len(_ANSWERS) <= self.teacher.most_requests

    def _made(self, number: int, prompts: set[str]) -> dict[str, Any] | _LeftOut:
        """The row that a question leads to, or why it is left out; adds its prompt to `prompts`."""
        wording = self._answer(self._questions.for_prompt(number), _WORDING, number)
        prompt = _request_of(wording.text, self._long_prompts)
        if wording.is_cut_off and (self._long_prompts or not prompt):
            return _LeftOut(_CUT_OFF, [prompt])
        system = self._questions.row_of(number).system
        key = prompt_key(SplitRow(TRAIN, TaskRow("", ({"role": "user", "content": prompt},))))
        if not 0 < len(prompt) <= self._most_characters or key in prompts or not _is_text(prompt):
            return _LeftOut("prompts that are there already, or cannot be used", [prompt])
        prompts.add(key)
        question = self._questions.for_answer(prompt, number)
        replies = [self._answer(question, temperature, number, self._schema) for temperature in _ANSWERS]
        answers = [self._written(reply.text.strip()) for reply in replies]
        if any(reply.is_cut_off for reply in replies):
            return _LeftOut(_CUT_OFF, answers)
        row = self._form.row(system, prompt, answers[0])
        if row is None or not all(self._fits(answer, prompt) for answer in answers):
            return _LeftOut("answers that do not fit the task", answers)
        if len({*map(answer_key, answers)}) > 1:
            return _LeftOut("answers that disagree", answers)
        return row

    def _answer(self, messages: list[dict[str, str]], temperature: float, seed: int, schema: object = None) -> Reply:
        body = self.teacher.request(messages, temperature=temperature, seed=seed, schema=schema)
        reply = self.teacher.ask(body)
        return reply._replace(text=without_thought(reply.text))

    def _written(self, answer: str) -> str:
        """An answer in JSON as the rows write it; others as they are."""
        style = next((style for row in self.task.train if (parsed := Answer.of(row)) for style in parsed.styles), None)
        value = json_or_none(unfenced(answer))
        return answer if style is None or value is None else json.dumps(value, **style)

    def _fits(self, answer: str, prompt: str) -> bool:
        if self.task.labels:
            return answer in self.task.labels
        if not answer or not _is_text(answer):
            return False
        return self.output is None or self.output.for_prompt([prompt]).accepts(answer)


def _first_number(out: Path) -> int:
    """The number of the first question: behind those of earlier runs, as no row takes so few bytes."""
    return 1 + (out.stat().st_size if out.is_file() else 0)


def _is_text(text: str) -> bool:
    """Whether a text has no half of a pair of surrogates, which JSON can have and no file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _request_of(text: str, long_prompts: Sequence[str]) -> str:
    """The request in an answer, without the line that introduces it, the mark of a list and those around it.

    It has several lines only if the task has such prompts, `long_prompts`, whose own first lines may introduce others.
    """
    text = text.strip()
    introduced = _INTRODUCED.match(text)
    if introduced and not any(map(_INTRODUCED.match, long_prompts)):
        text = introduced[1].strip()
    if not long_prompts:
        text = _FIRST_ITEM.sub("", next(iter(text.splitlines()), "").strip())
    marked = _MARKED.fullmatch(text.strip())
    return (marked[1] if marked else text).strip()

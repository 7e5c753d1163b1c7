"""Checks the rows of a recipe's tasks: reads them with their faults, and collects what the checks find."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import EdgetuneError, UsageError

from edgetune import bases
from edgetune.common.progress import Progress
from edgetune.proposal.columns import ADD_HEADER, seems_a_row
from edgetune.proposal.files import test_file_of
from edgetune.recipe.data import Columns, DataSpec
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.recipe.rows import Rows
from edgetune.tasks.data import TaskRow, rows_of, with_weight
from edgetune.tasks.estimate import estimated_tokens
from edgetune.tasks.metrics import EITHER_RIGHT_OR_WRONG, without_json
from edgetune.tasks.row_files import DELIMITERS, entries
from edgetune.tasks.task import Task, read_task, with_scope
from edgetune.tasks.tokenization import tokenize_rows

from . import answers
from .duplicates import conflicts_in_conversations, duplicates
from .findings import (
    CONFIDENCE,
    SPLITS,
    TEST,
    TOO_LONG,
    TRAIN,
    UNUSABLE,
    VALIDATION,
    WRONG,
    Finding,
    SplitRow,
    TaskCheck,
)


def check(
    recipe: Recipe,
    *,
    adapter: str | None = None,
    tests: Mapping[str, str] | None = None,
    minutes: float | None = None,
    progress: Progress,
) -> list[TaskCheck]:
    """Check the rows of the recipe's tasks, or only those of `adapter`.

    `tests` are files of test rows by adapter; without one, NAME-test beside the training file is checked too. With
    `minutes`, adapters are trained for about this long on each task to find wrong answers (default: `check_minutes` of
    its data).

    Raises UsageError for an unknown adapter, for tests of one that is not checked, and if a file cannot be read or has
    no row that can be used.
    """
    tests = tests or {}
    for name in [*tests, *([] if adapter is None else [adapter])]:
        recipe.check_adapter(name)
        if adapter not in (None, name):
            raise UsageError(f"there are test rows of {name!r}, but only {adapter!r} is checked", "leave one out")
    names = list(recipe.adapters) if adapter is None else [adapter]
    return [_checked(name, recipe, tests.get(name), minutes, progress) for name in names]


def files_read(recipe: Recipe, tests: Mapping[str, str]) -> list[str]:
    """The files and hub ids that a check reads, or a build of the recipe."""
    found = [test for spec in recipe.adapters.values() if (test := test_beside(spec.data)) is not None]
    return [*recipe.files(), *tests.values(), *found]


def _checked(name: str, recipe: Recipe, test: str | None, minutes: float | None, progress: Progress) -> TaskCheck:
    spec = recipe.adapters[name]
    data, reader = spec.data, _LenientReader(spec)
    with reader.naming_problems():
        task = read_task(name, _with_given_rows(name, recipe), reader)
    task = replace(task, labels=with_scope(spec, task.labels))
    sources: dict[str, str | Rows] = {TRAIN: data.train}
    rows = [SplitRow(TRAIN, row) for row in task.train] + [SplitRow(VALIDATION, row) for row in task.validation]
    beside = None if test else test_beside(data)
    test = test or beside
    for split, source in ((VALIDATION, data.validation), (CONFIDENCE, data.confidence), (TEST, test)):
        if source is not None:
            sources[split] = source
            if split != VALIDATION:
                # Nobody asked for the test file beside the training rows, which often has no answers.
                read = reader.usable if split == TEST and beside is not None else reader
                with reader.naming_problems():
                    rows += [SplitRow(split, row) for row in read(source, data.columns, labels=task.labels or None)]
    base, context_length = None, recipe.context_length
    with suppress(EdgetuneError):  # a base that is missing or does not fit is a problem of the build
        base = bases.find(recipe)
    if base is not None and "context_length" not in recipe.model_fields_set:
        context_length = min(context_length, base.trained_context_length)
    tokens, refused, is_estimated = _lengths(task, base, rows)
    answered = [SplitRow(item.split, answer) for item in rows for answer in item.row.answers]
    kinds = answers.balance(answered, task.metric)
    has_one_answer = task.metric in EITHER_RIGHT_OR_WRONG or (
        task.spec.metric == "auto" and bool(without_json([item.row for item in rows]))
    )
    findings = [
        *(Finding(UNUSABLE, (where,), note=reason) for where, reason in reader.problems),
        *refused,
        *_rows_as_headers(data, task.train),
        *answers.misfits(task, answered),
        *_too_long(rows, tokens, context_length),
        *duplicates(rows, task.metric, has_one_answer=has_one_answer),
        *(conflicts_in_conversations(rows, answered) if has_one_answer else ()),
        *answers.rare(kinds, made=None if spec.out_of_scope is None else spec.out_of_scope.label),
    ]
    check = TaskCheck(
        name,
        task.metric,
        context_length,
        {split: str(source) for split, source in sources.items()},
        {split: sum(item.split == split for item in rows) for split in SPLITS},
        findings,
        tokens,
        is_estimated,
        kinds,
    )
    minutes = data.check_minutes if minutes is None else minutes
    if minutes is None:
        return check
    named = {where for finding in refused for where in finding.where}
    train, validation = ([row for row in part if row.where not in named] for part in (task.train, task.validation))
    return _with_estimate(check, replace(task, train=train, validation=validation), recipe, minutes, progress)


def _with_estimate(check: TaskCheck, task: Task, recipe: Recipe, minutes: float, progress: Progress) -> TaskCheck:
    from .folds import estimate  # noqa: PLC0415 - torch

    judged = estimate(task, recipe, minutes, progress)
    split_rows = [(split, row) for split in (TRAIN, VALIDATION) for row in getattr(task, split)]
    rows = {answer.where: SplitRow(split, answer) for split, row in split_rows for answer in row.answers}
    wrong = [
        Finding.of(WRONG, [rows[row.where]], f"another answer is {row.times:,.0f} times as likely", row.own)
        for row in judged.rows
        if row.own is not None
    ]
    return replace(check, findings=[*wrong, *check.findings], estimate=judged)


def _rows_as_headers(data: DataSpec, rows: Sequence[TaskRow]) -> Iterator[Finding]:
    """The first line of a training table if it is a row, whose cells the recipe names as columns."""
    prompt, answer = (None, None) if data.columns is None else (data.columns.prompt, data.columns.completion)
    if Path(str(data.train)).suffix.lower() not in DELIMITERS or prompt is None or not isinstance(answer, str):
        return
    if seems_a_row(prompt, answer, {row.completion or "" for row in rows}):
        note = f"looks like a row, because {answer!r} is also an answer in other rows; {ADD_HEADER}"
        yield Finding(UNUSABLE, (f"{data.train}:1",), (TRAIN,), (prompt,), (answer,), note)


class _LenientReader:
    """Reads rows as `read_rows` does, but collects the `problems` of bad ones: where, and the reason.

    Labels are also that of texts out of the scope of `spec`, as in a build.
    """

    def __init__(self, spec: AdapterSpec | None = None) -> None:
        self._spec = spec
        self.problems: list[tuple[str, str]] = []

    def __call__(
        self, source: str | Rows, columns: Columns | None = None, *, labels: Sequence[str] | None = None
    ) -> list[TaskRow]:
        """The rows that can be used; UsageError if there are none."""
        rows = self._read(source, columns, labels)
        if not rows:
            raise UsageError(f"{source} has no rows that can be used", "correct them, or set data.columns")
        return with_weight(rows)

    def usable(
        self, source: str | Rows, columns: Columns | None = None, *, labels: Sequence[str] | None = None
    ) -> list[TaskRow]:
        """The rows that can be used, if there are any, without those of weight 0."""
        return [row for row in self._read(source, columns, labels) if row.weight]

    def _read(self, source: str | Rows, columns: Columns | None, labels: Sequence[str] | None) -> list[TaskRow]:
        if self._spec is not None:
            labels = with_scope(self._spec, tuple(labels or ())) or None
        rows: list[TaskRow] = []
        for where, values in entries(source):
            try:
                rows += rows_of(source, [(where, values)], columns, labels=labels)
            except UsageError as error:
                self.problems.append((where, error.message.removeprefix(f"{where}: ")))
        return rows

    @contextmanager
    def naming_problems(self) -> Iterator[None]:
        """An error also names the first row read here that cannot be used."""
        before = len(self.problems)
        try:
            yield
        except UsageError as error:
            problems = self.problems[before:]
            if not problems:
                raise
            where, reason = problems[0]
            message = f"{error.message}; {len(problems)} cannot be used, as {where}: {reason}"
            raise UsageError(message, error.remedy) from error


def _with_given_rows(name: str, recipe: Recipe) -> Recipe:
    """The recipe without what a build makes of the rows: copies would give away answers, and texts out of scope are not
    rows of the user. Nor are rows needed for a confidence. All rows of the files are read."""
    spec = recipe.adapters[name]
    data = spec.data.model_copy(update={"augment": None, "confidence": None, "rows": None})
    changes = {"data": data, "out_of_scope": None, "min_confidence": None}
    return recipe.model_copy(update={"adapters": {**recipe.adapters, name: spec.model_copy(update=changes)}})


def test_beside(data: DataSpec) -> str | None:
    """The file with test rows beside that with the training rows; None if there is none."""
    path = Path(str(data.train))
    test_file = test_file_of(path) if isinstance(data.train, str) and path.is_file() else None
    return None if test_file is None or str(test_file) == str(data.validation) else str(test_file)


def test_rows_beside(data: DataSpec, labels: Sequence[str]) -> list[TaskRow]:
    """The rows in that file which can be used; `labels` are those of the task."""
    file = test_beside(data)
    return [] if file is None else _LenientReader().usable(file, data.columns, labels=labels or None)


def _lengths(
    task: Task, base: bases.BaseSource | None, rows: Sequence[SplitRow]
) -> tuple[list[int], list[Finding], bool]:
    """The tokens of each row, those that the base's chat template rejects, and whether all tokens are estimated.

    They are if the base's file is not at hand. Of rows that are rejected they always are.
    """
    system = task.spec.system
    if base is None or base.is_folder:
        return [estimated_tokens(item.row, system) for item in rows], [], True
    tokens, refused = list[int](), list[Finding]()
    with closing(GgufTokenizer(base.path)) as tokenizer:
        for item in rows:
            try:
                (example,), _ = tokenize_rows(
                    [item.row], tokenizer, system=system, loss_on="all", max_tokens=sys.maxsize
                )
                tokens.append(len(example.tokens))
            except UsageError as error:
                tokens.append(estimated_tokens(item.row, system))
                refused.append(Finding.of(UNUSABLE, [item], error.message.removeprefix(f"{item.row.where}: ")))
    return tokens, refused, False


def _too_long(rows: Sequence[SplitRow], tokens: Sequence[int], context_length: int) -> Iterator[Finding]:
    for item, count in zip(rows, tokens, strict=True):
        if count > context_length:
            yield Finding.of(TOO_LONG, [item], f"{count} tokens, and the context has {context_length}")

"""Makes the changed copies of a task's training rows, the same ones for a seed."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message

from edgetune.common.choices import is_complete
from edgetune.recipe.data import AugmentSpec, NegativesSpec
from edgetune.tasks.data import COPY, TaskRow
from edgetune.tasks.plain_prompts import answered_prompts, plain, shared_prompt

from .answers import Answer, prompt_of
from .clauses import first_words, reordered
from .english import are_english
from .noise import noisy
from .numbers import NUMBERS, YEAR, has_result, has_same_order
from .slots import Mention, SlottedRow, mentions_of, parts_of
from .values import Values

_TRIES = 3
"""Attempts at a copy whose prompt no other row has."""
_BEYOND_FLAGS = 2
"""The least number that is no flag."""
_DRAWS = 8
"""Attempts at other numbers in the same order."""
_SPEAKERS = ("user", "assistant")
_MACHINE_TEXT = re.compile(r"[{}\[\]<>=|\\]")
"""Characters that nobody says or types in haste."""
_WORD = re.compile(r"\w+(?:[.:,]\d+)*")
_DIGITS = r"\d+(?:[.:,]\d+)*"
_NUMBER = re.compile(rf"(?<!\w)(?<!\d[.:,]){_DIGITS}(?!\w)")
_ANY_NUMBER = re.compile(_DIGITS)
"""Numbers, also without spaces around them, as in Chinese."""
_SENTENCE_END = re.compile(r"(?<=[.!?\u061f\u06d4\u0964])\s+|(?<=[\u3002\uff01\uff1f])|\n")
_STATEMENT = re.compile(r"(?s).*[.!\u06d4\u0964\u3002\uff01]\W*$")
_EVIDENCE = 3
"""Prompts that differ only in numbers, which show that answers repeat any number."""
_STRUCTURED = re.compile(r"[{\[]\s*[\"'{\[\]}]")
"""In an answer with JSON or the like, also in a fence or between marks, whose fields may depend on each other."""
_QUESTION = re.compile(
    r"(?is)\W*(?!(?:please )?(?:can|could|would|will) you\b)"
    r"(?:(?:what|who|when|where|why|which|how|is|are|was|were|do|does|did|can|should)\b|.*[?;\u037e\u061f\uff1f]\W*$)"
)
"""Questions, which may be about the numbers in them, unless they ask to do something."""


@dataclass(frozen=True)
class ChangedRow:
    """A row that was made of another one, `source`, and what was changed; a negative is its own source."""

    row: TaskRow
    source: TaskRow
    changes: tuple[str, ...]

    @property
    def is_negative(self) -> bool:
        """Whether it is not a copy, but a prompt of another task."""
        return self.source is self.row

    def to_json(self) -> dict[str, Any]:
        """Where the source is, its prompt and answer, those of the row, and the changes, as JSON values.

        Conversations have the user's turns and the answers, each on lines of their own.
        """
        source, row = self.source.answers, self.row.answers
        return {
            "source": self.source.where,
            "prompt": ["\n".join(map(prompt_of, answers)) for answers in (source, row)],
            "completion": ["\n".join(each.completion or "" for each in answers) for answers in (source, row)],
            "changes": list(self.changes),
        }


def copies_of(
    rows: Sequence[TaskRow],
    spec: AugmentSpec,
    *,
    schema: dict[str, Any] | None,
    labels: Sequence[str],
    validation: Sequence[TaskRow],
    foreign: Sequence[str],
    seed: int,
) -> list[ChangedRow]:
    """Changed copies of training rows, and rows with the prompts `foreign`; no prompt is that of another row, and none,
    also of an earlier turn, is one for `validation` but for case, punctuation and the system prompt.

    `schema` is that of the recipe's output, and `labels` are those of the task. Raises UsageError for values of fields
    that no answer has.
    """
    maker = _Maker(rows, spec, schema, labels, validation)
    copies = [
        changed
        for place, row in enumerate(rows)
        for number in range(1, spec.copies + 1)
        if (changed := maker.copy(row, number, f"{seed}/{place}/{number}"))
    ]
    if spec.negatives is None:
        return copies
    return copies + maker.negatives(spec.negatives, foreign, random.Random(f"{seed}/negatives"))


class _Maker:
    """Makes copies of rows; remembers their prompts."""

    def __init__(
        self,
        rows: Sequence[TaskRow],
        spec: AugmentSpec,
        schema: dict[str, Any] | None,
        labels: Sequence[str],
        validation: Sequence[TaskRow],
    ) -> None:
        self._rows, self._spec, self._labels = rows, spec, frozenset(labels)
        self._english = english = are_english(rows)
        self._slotted = {id(row): item for row in rows if (item := SlottedRow.of(row, english=english)) is not None}
        # Where few rows have the places of later words, 0 and 1 are no and yes.
        placed = [item.answer.has_offsets(prompt_of(item.row), _BEYOND_FLAGS) for item in self._slotted.values()]
        self._least_word = 0 if 2 * sum(placed) >= len(placed) else _BEYOND_FLAGS
        self._values = Values(list(self._slotted.values()), spec.values, schema)
        self._openers = first_words(self._slotted.values())
        self._numbers: dict[str, list[str]] = {}
        self._answers: dict[str, set[str]] = {}
        for answer in (answer for row in rows for answer in row.answers):
            texts = self._answers.setdefault(_without_numbers(prompt_of(answer)), set())
            texts.add(_without_numbers(answer.completion or ""))
        prompts = {prompt_of(answer) for row in rows for answer in row.answers}
        self._alike = Counter(map(_without_numbers, prompts))
        self._is_rated = is_complete(Counter(answer.completion or "" for row in rows for answer in row.answers))
        for row in rows:
            for number in self._shared_numbers(row):
                self._numbers.setdefault(_kind(number, prompt_of(row)), []).append(number)
        self._seen = {row.prompt_key for row in rows}
        # What the rows have is learned anyway, such as a greeting.
        self._prompt_of = shared_prompt(validation, rows)
        self._judged = answered_prompts(validation, self._prompt_of) - answered_prompts(rows, self._prompt_of)

    def copy(self, row: TaskRow, number: int, seed: str) -> ChangedRow | None:
        """A copy of the row; None if nothing can be changed, or every try gives a prompt that another row has."""
        prompt, item = prompt_of(row), self._slotted.get(id(row))
        if not prompt if item is None else item.answer.has_offsets(prompt, self._least_word):
            return None
        for attempt in range(_TRIES):
            changed, changes = self._changed(row, random.Random(f"{seed}/{attempt}"))
            if not changes:
                return None
            if self._is_new(changed):
                return ChangedRow(replace(changed, where=f"{row.where}{COPY}{number}"), row, tuple(changes))
        return None

    def negatives(self, spec: NegativesSpec, foreign: Sequence[str], rng: random.Random) -> list[ChangedRow]:
        """Rows of the task with prompts of other tasks, none of which this one has but for case and punctuation.

        UsageError if this one has all of them.
        """
        completion = spec.completion
        answer = completion if isinstance(completion, str) else json.dumps(completion, ensure_ascii=False)
        own = {plain(prompt_of(answer)) for row in self._rows for answer in row.answers}
        others = [*filter(None, foreign)]
        prompts = [*rng.sample(spec.prompts, len(spec.prompts)), *rng.sample(others, len(others))]
        if all(plain(prompt) in own for prompt in prompts):
            message = "each prompt of data.augment.negatives is one of the task's own rows"
            raise UsageError(message, "give prompts that are not for this task as data.augment.negatives.prompts")
        negatives: list[ChangedRow] = []
        for prompt in prompts:
            source = rng.choice(self._rows)
            if len(negatives) >= spec.share * len(self._rows):
                break
            if not source.messages or plain(prompt) in own:
                continue
            before = [turn for turn in source.messages[:1] if turn["role"] == "system"]
            messages = (*before, {"role": "user", "content": prompt})
            where = f"negative {len(negatives) + 1}"
            row = replace(source, where=where, messages=messages, completion=answer, turn=None, weight=1.0)
            if self._is_new(row):
                negatives.append(ChangedRow(row, row, ("negative",)))
        return negatives

    def _changed(self, row: TaskRow, rng: random.Random) -> tuple[TaskRow, list[str]]:
        changes: list[str] = []
        item = self._slotted.get(id(row))
        if item is None:
            row, changes = self._with_numbers(row, rng)
        elif exchanged := self._values.exchanged(item, rng):
            item, changes = exchanged
            row = item.row
        # The words that refer to another clause are English.
        if item is not None and self._english and rng.random() < 0.5:
            mixed = reordered(item, rng, self._openers)
            if mixed is not None:
                row, changes = mixed, [*changes, "order of clauses"]
        row, kinds = self._with_noise(row, None if item is None else item.answer, rng)
        return row, [*changes, *kinds]

    def _with_noise(self, row: TaskRow, answer: Answer | None, rng: random.Random) -> tuple[TaskRow, list[str]]:
        """The row with noise in some of the user's turns, and its kinds; `answer` has the values that stay."""
        if not self._spec.noise:
            return row, []
        turns, kinds = list(row.turns), []
        for place, turn in enumerate(turns):
            text = turn["content"]
            if turn["role"] != "user" or rng.random() >= self._spec.noise or _MACHINE_TEXT.search(text):
                continue
            changed, kind = noisy(text, _kept(text, turns, answer), rng, english=self._english)
            if changed not in ("", text):
                turns[place] = {**turn, "content": changed}
                kinds.append(kind)
        return (row.with_turns(turns) if kinds else row), kinds

    def _with_numbers(self, row: TaskRow, rng: random.Random) -> tuple[TaskRow, list[str]]:
        """The row with other numbers, of the same form, in the turns of the user and the answers in plain text.

        They keep their order among all that the user told: an answer may be the lowest of several.
        """
        prompt, shared, told = prompt_of(row), self._shared_numbers(row), _told(row)
        for _ in range(_DRAWS):
            drawn = {number: rng.choice(self._numbers[_kind(number, prompt)]) for number in shared}
            others = {number: other for number, other in drawn.items() if number != other}
            if others and has_same_order(told, _with_others(told, others)):
                turns = [
                    {**turn, "content": _with_others(turn["content"], others)} if turn["role"] in _SPEAKERS else turn
                    for turn in row.turns
                ]
                return row.with_turns(turns), [f"{number} → {other}" for number, other in others.items()]
        return row, []

    def _shared_numbers(self, row: TaskRow) -> list[str]:
        """The numbers such as 10:00 that the prompt and an answer in plain text have, if all answers only repeat some.

        Labels repeat none, and neither do answers that are one of few numbers, such as ratings.
        """
        answer = row.completion or ""
        if row.is_labelled or answer in self._labels or id(row) in self._slotted:
            return []
        if self._is_rated and _NUMBER.fullmatch(answer):
            return []
        if any(turn["role"] == "assistant" and _STRUCTURED.search(turn["content"]) for turn in row.turns):
            return []
        if not all(map(self._only_repeats, row.answers)):
            return []
        said = "\n".join(str(turn["content"]) for turn in row.turns if turn["role"] in _SPEAKERS)
        in_words = Counter(_ANY_NUMBER.findall(said)) - Counter(_NUMBER.findall(said))
        repeated = set(_NUMBER.findall(answer)) - in_words.keys()
        return [number for number in _NUMBER.findall(prompt_of(row)) if number in repeated]

    def _only_repeats(self, row: TaskRow) -> bool:
        """Whether the user told all numbers of an answer, instead of asking what is so of them, and none is a year or
        computed of two others.

        They also decide the answer if the same prompt with other numbers has another one.
        """
        form = _without_numbers(prompt_of(row))
        # The words that begin a question are known of English alone.
        is_clear = self._english or self._alike[form] >= _EVIDENCE
        parts = [part for part in _SENTENCE_END.split(_told(row)) if is_clear or _STATEMENT.match(part)]
        told = "\n".join(part for part in parts if not _QUESTION.match(part))
        answer, words = row.completion or "", set(told.lower().split())
        numbers = set(_ANY_NUMBER.findall(answer))
        return (
            len(self._answers.get(form, ())) <= 1
            and numbers <= set(_ANY_NUMBER.findall(told))
            and not any(map(YEAR.fullmatch, numbers))
            and not has_result(answer)
            and all(word in words for word in re.findall(r"\w+", answer.lower()) if word in NUMBERS)
        )

    def _is_new(self, row: TaskRow) -> bool:
        """Whether no other row has its prompt, and none for validation nearly one of its prompts; remembers it."""
        key = row.prompt_key
        if key in self._seen or not self._judged.isdisjoint(answered_prompts([row], self._prompt_of)):
            return False
        self._seen.add(key)
        return True


def _told(row: TaskRow) -> str:
    """What the user says before the answer."""
    return "\n".join(str(turn["content"]) for turn in row.messages or () if turn["role"] == "user")


def _with_others(text: str, others: Mapping[str, str]) -> str:
    return _NUMBER.sub(lambda match: others.get(match[0], match[0]), text)


def _without_numbers(text: str) -> str:
    return _NUMBER.sub("0", text)


def _kind(number: str, prompt: str) -> str:
    """The form of a number with the word after it in the prompt, or else the one before: `99 degrees`."""
    before, _, after = prompt.partition(number)
    words = re.match(r"\s*([^\W\d]+|[%°])", after) or re.search(r"([^\W\d]+)\W*$", before)
    return re.sub(r"\d", "9", number) + (f" {words[1].lower()}" if words else "")


def _kept(text: str, turns: Sequence[Message], answer: Answer | None) -> list[Mention]:
    """What noise must not change in a text, since answers have it too."""
    values = [] if answer is None else [value for _, value in answer.scalars() if isinstance(value, str)]
    texts = range(len(turns)) if answer is None else answer.texts(turns)
    answers = [turns[place]["content"] for place in texts if turns[place]["role"] == "assistant"]
    repeated = {word for answer in answers for word in _WORD.findall(answer)}
    return [
        *(mention for value in values for mention in (*mentions_of(text, value), *parts_of(text, value))),
        *(Mention(m.start(), m.end()) for m in _WORD.finditer(text) if m[0] in repeated),
    ]

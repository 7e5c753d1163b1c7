"""Turns entries of row files into the checked rows of a task."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from edgetune_runtime.decoding.prompt_texts import texts_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message, messages_for, text_of
from edgetune_runtime.tools.calls import answer_text
from edgetune_runtime.tools.definitions import ToolSet, check_schemas, tool_set
from edgetune_runtime.wording import nearest, shortened, suggestion

from edgetune.recipe.data import Columns
from edgetune.recipe.rows import Rows

from .row_files import BadRowError, entries, json_values

MAX_ERRORS = 20
WEIGHT = "weight"
"""The column of a row's weight, and the key of an assistant's message: one with weight 0 is not learned."""
EARLIER_ANSWER, COPY = ", message ", ", copy "
"""Where an earlier answer of a conversation is, or a changed copy: this and a number follow where the row is."""
_MORE_KEYS = {"assistant": ("tool_calls", WEIGHT), "tool": ("tool_call_id", "name")}
LABEL = "label"
"""The column whose values are labels; elsewhere a few short answers may be texts to write."""
_STANDARD = (
    (("messages",), Columns(messages="messages")),
    (("prompt", "completion"), Columns(prompt="prompt", completion="completion")),
    ((LABEL,), Columns(prompt="text", completion=LABEL)),
    (("text",), Columns(text="text")),
)
FORMS = "messages, prompt and completion, text and label, or text"


@dataclass(frozen=True)
class TaskRow:
    """One row of a task.

    A prompt row has `messages`, without the assistant's last turn, and the text of that turn as `completion`; a text
    row has only `text`. `where` is the row's source, such as `file.jsonl:12`.

    `is_labelled`: the completion is what the row calls its label.

    `tools` are those of the prompt. If the last turn calls some, it is `turn`, and `completion` is its `answer_text`,
    since how it is written depends on the base's chat template.

    `weight`, from 0 to 1, multiplies its loss in training.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    completion: str | None = None
    text: str | None = None
    tools: ToolSet | None = None
    turn: Message | None = None
    is_labelled: bool = False
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """Its last turn before the answer, or its text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text or ""

    @property
    def said(self) -> list[str]:
        """What a constraint takes the texts of the prompt from, as the runtime does."""
        return texts_of(self.messages or ())

    @property
    def system(self) -> str | None:
        """The system prompt that the row has itself."""
        first = self.messages[0] if self.messages else None
        return str(first["content"]) if first is not None and first["role"] == "system" else None

    @property
    def prompt_key(self) -> str:
        """What rows with exactly the same prompt, but for the ids of calls, have in common."""
        tools = None if self.tools is None else self.tools.text
        return json.dumps([self.text, self.compared_turns, tools], sort_keys=True)

    @property
    def compared_turns(self) -> list[tuple[str, str, list[Any]]]:
        """The role, the content and the calls of each message; of a result, the number of its call."""
        numbers: dict[object, int] = {}
        turns = []
        for turn in self.messages or ():
            calls = turn.get("tool_calls", ())
            numbers |= {call.get("id"): number for number, call in enumerate(calls, len(numbers))}
            result = [numbers.get(turn.get("tool_call_id"))] if turn["role"] == "tool" else []
            turns.append((turn["role"], turn["content"], [*(call["function"] for call in calls), *result]))
        return turns

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages and the answer as a message; none of a row of text."""
        if self.messages is None:
            return ()
        return (*self.messages, self.turn or {"role": "assistant", "content": self.completion})

    def with_turns(self, turns: Sequence[Message]) -> TaskRow:
        """The row with other messages, of which the last is the answer."""
        *messages, last = turns
        turn = last if "tool_calls" in last else None
        return replace(self, messages=tuple(messages), completion=text_of_turn(last), turn=turn)

    @property
    def beginnings(self) -> list[TaskRow]:
        """The row, after a row for each earlier turn of the assistant with the messages before it."""
        return [self._until(place) for place in self._answer_places] or [self]

    @property
    def answers(self) -> list[TaskRow]:
        """The beginnings whose answers are learned."""
        return [self._until(place) for place in self._answer_places if is_learned(self.turns[place])] or [self]

    @property
    def _answer_places(self) -> list[int]:
        return [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def _until(self, place: int) -> TaskRow:
        """The row up to a turn of the assistant."""
        if place == len(self.turns) - 1:
            return self
        return replace(self.with_turns(self.turns[: place + 1]), where=f"{self.where}{EARLIER_ANSWER}{place + 1}")


def place_of_row(where: str) -> str:
    """Where the row is of which an answer is at `where`."""
    return re.sub(rf"{EARLIER_ANSWER}[0-9]+$", "", where)


def read_rows(
    source: str | Rows, columns: Columns | None = None, *, labels: Sequence[str] | None = None
) -> list[TaskRow]:
    """Read rows from memory, a JSONL, CSV or TSV file, or a hub id; each row's form is detected from its keys.

    Rows of weight 0 are left out. Raises NotFoundError if there is no such file or data set, UsageError if it is empty,
    of an unknown type, has bad rows, or only those of weight 0. The error lists up to 20 bad rows with their line and
    reason.
    """
    return with_weight(rows_of(source, entries(source), columns, labels=labels))


def with_weight(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows of a weight above 0; UsageError if there are only others."""
    kept = [row for row in rows if row.weight]
    if rows and not kept:
        message = f"all {len(rows)} rows, such as {rows[0].where}, have weight 0, so nothing is learned or measured"
        raise UsageError(message, "give some of them a weight above 0")
    return kept


def rows_of(
    source: str | Rows,
    entries: Iterable[tuple[str, Any]],
    columns: Columns | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> list[TaskRow]:
    """The rows of these entries of `source`; raises what `read_rows` does for bad rows and for none."""
    rows, problems = [], []
    for where, values in entries:
        try:
            if isinstance(values, BadRowError):
                raise values
            rows.append(_row(where, values, columns, labels))
        except BadRowError as reason:
            problems.append(f"{where}: {reason}")
    if problems:
        more = len(problems) - MAX_ERRORS
        shown = problems[:MAX_ERRORS] + ([f"{source}: and {more} more bad rows"] if more > 0 else [])
        raise UsageError("\n".join(shown))
    if not rows:
        raise UsageError(f"{source} has no rows", "add at least two rows")
    return rows


def is_learned(turn: Message) -> bool:
    """Whether a turn of the assistant is trained on."""
    return turn.get(WEIGHT) != 0


def text_of_turn(turn: Message) -> str:
    """The content of a message and its calls."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())]
    return answer_text(turn["content"], calls)


def standard_columns(names: Collection[str]) -> Columns | None:
    """The columns of rows with these keys, where a recipe names none; None if they have no form."""
    return next((columns for keys, columns in _STANDARD if any(key in names for key in keys)), None)


def labelled_text(row: TaskRow) -> str:
    """The row's text; UsageError if it has no label or is a conversation."""
    if row.messages is None:
        raise UsageError(f"{row.where}: has no label", "use rows of text and label")
    try:
        return text_of(row.messages)
    except UsageError as error:
        raise UsageError(f"{row.where}: {error.message}", "use rows of text and label") from error


def _row(where: str, values: object, columns: Columns | None, labels: Sequence[str] | None) -> TaskRow:
    if not isinstance(values, dict):
        raise BadRowError(f"is {kind_of(values)}, not an object; write one object per line")
    columns = columns or standard_columns(values)
    if columns is None:
        keys = ", ".join(map(str, values)) or "none"
        raise BadRowError(f"has none of {FORMS}; its keys are {keys}; set `columns` to the keys to use")
    row, value = _mapped_row(where, values, columns), values.get(columns.weight)
    if value not in (None, ""):
        row = replace(row, weight=_weight(value, columns.weight))
    # One of weight 0 is left out, whatever its label.
    return _with_label(row, labels) if labels is not None and row.weight else row


def _mapped_row(where: str, values: Mapping[str, Any], columns: Columns) -> TaskRow:
    """The row in these columns."""
    if columns.text is not None:
        _check_keys(values, [columns.text])
        return TaskRow(where, text=_text(values[columns.text], columns.text))
    if columns.messages is not None:
        _check_keys(values, [columns.messages])
        return _conversation(where, values[columns.messages], values.get(columns.tools))
    assert columns.prompt is not None
    assert columns.completion is not None
    return _prompt_row(where, values, columns.prompt, columns.completion)


def _prompt_row(where: str, values: Mapping[str, Any], prompt: str, completion: str | Sequence[str]) -> TaskRow:
    _check_keys(values, [prompt, *([completion] if isinstance(completion, str) else completion)])
    message = {"role": "user", "content": _text(values[prompt], prompt)}
    answer = values[completion] if isinstance(completion, str) else {name: values[name] for name in completion}
    text = _answer(answer, completion if isinstance(completion, str) else "completion")
    is_labelled = completion == LABEL
    return TaskRow(where, (message,), text.strip() if is_labelled else text, is_labelled=is_labelled)


def _check_keys(values: Mapping[str, Any], needed: Sequence[str]) -> None:
    for name in needed:
        if name not in values:
            near = nearest(name, map(str, values))
            hint = f"there is {near!r}" if near else f"its keys are {', '.join(map(str, values))}"
            raise BadRowError(f"has no {name!r}; {hint}")


def _conversation(where: str, messages: object, tools: Any) -> TaskRow:  # noqa: ANN401 - it is checked here
    if isinstance(messages, str):
        # As cells of tables have them.
        try:
            messages = json_values(messages)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"messages is text that is not JSON: {error}") from error
    if not isinstance(messages, list):
        raise BadRowError(f"messages is {kind_of(messages)}, not a list of messages")
    if not messages:
        raise BadRowError("messages is empty; give at least one message")
    for number, message in enumerate(messages, 1):
        _check_message(number, message)
    try:
        # Columns of data sets have a null where a message lacks a key.
        stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
        turns = messages_for(stated, None)
        # A cell of a table without tools is blank.
        offered = tool_set((json_values(tools) if tools.strip() else None) if isinstance(tools, str) else tools)
        if offered is not None:
            check_schemas(offered)
    except UsageError as error:
        raise BadRowError(error.message) from error
    except ValueError as error:
        raise BadRowError(f"tools is not JSON: {error}") from error
    _check_order(turns)
    functions = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
    _check_calls([function["name"] for function in functions], offered)
    ordered = {tool.name: tool.ordered for tool in offered.tools} if offered is not None else {}
    for function in functions:
        # As a model that is held to the schema has to write them.
        function["arguments"] = ordered[function["name"]](function["arguments"])
    return TaskRow(where, tools=offered).with_turns(turns)


def _check_order(turns: Sequence[Message]) -> None:
    first = 1 if turns[0]["role"] == "system" else 0
    expected = ["user"]
    for number, turn in enumerate(turns[first:], first + 1):
        role = turn["role"]
        if role not in expected:
            raise BadRowError(f"message {number} has role {role}, expected {' or '.join(expected)}")
        # Where an app says nothing of its calls' results, rows have none, or no assistant's turn after them.
        if role == "assistant":
            expected = ["user", "tool"] if "tool_calls" in turn else ["user"]
        else:
            expected = ["assistant", "tool", "user"] if role == "tool" else ["assistant"]
    if turns[-1]["role"] != "assistant":
        raise BadRowError(f"the last message has role {turns[-1]['role']}, expected assistant")
    if not is_learned(turns[-1]):
        raise BadRowError("the last message has weight 0, so that no answer is learned to what is before it; remove it")


def _check_calls(names: Sequence[str], tools: ToolSet | None) -> None:
    if names and tools is None:
        raise BadRowError(f"calls {names[0]!r}, but has no tools; add the key tools")
    tool_names = [tool.name for tool in tools.tools] if tools is not None else []
    for name in names:
        if name not in tool_names:
            raise BadRowError(f"calls {name!r}, which is not one of its tools; {suggestion(name, tool_names)}")


def _check_message(number: int, message: object) -> None:
    if not isinstance(message, dict):
        raise BadRowError(f"message {number} is {kind_of(message)}, not an object with role and content")
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise BadRowError(f"message {number} has role {role!r}; use system, user, assistant or tool")
    keys = ("role", "content", *_MORE_KEYS.get(role, ()))
    extra = [key for key, value in message.items() if key not in keys and value is not None]
    if extra:
        raise BadRowError(f"message {number} has {extra[0]!r}, which is not supported; use only {', '.join(keys)}")
    if message.get(WEIGHT) not in (None, 0, 1):
        raise BadRowError(f"message {number} has weight {message[WEIGHT]!r}; give 0 or 1")
    # Functions may return nothing.
    if not message.get("tool_calls") and (role != "tool" or message.get("content") != ""):
        _text(message.get("content"), f"the content of message {number}")


def _weight(value: object, name: str) -> float:
    """A number, in a table as text."""
    with suppress(ValueError):
        if isinstance(value, int | float | str) and not isinstance(value, bool) and 0 <= float(value) <= 1:
            return float(value)
    raise BadRowError(f"{name} is {shortened(repr(value), 40)}; give a number from 0 to 1, or rename the column")


def _answer(value: object, name: str) -> str:
    """A completion as text: strings unchanged, all other values as JSON."""
    plain = isinstance(value, str) or value is None
    return _text(value if plain else json.dumps(value, ensure_ascii=False), name)


def _text(value: object, name: str) -> str:
    if value is None:
        raise BadRowError(f"{name} is missing or null")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {kind_of(value)}, not text")
    if not value.strip():
        raise BadRowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{name} has an unpaired surrogate, which is not valid Unicode") from error
    return value


def _with_label(row: TaskRow, labels: Sequence[str]) -> TaskRow:
    """The row with its label, without the white space around it."""
    if row.completion is None:
        raise BadRowError("is plain text, but the adapter has labels; add a label to the row")
    label = row.completion if row.completion in labels else row.completion.strip()
    if label not in labels:
        near = difflib.get_close_matches(label, labels, n=1, cutoff=0.0)
        raise BadRowError(f"{label!r} is not one of the labels; did you mean {near[0]!r}?")
    return replace(row, completion=label)


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")

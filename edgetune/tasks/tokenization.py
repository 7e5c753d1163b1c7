"""Tokenizes a task's rows for training.

Uses the runtime's tokenizer and chat template, so training and device see the same tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeVar

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message, messages_for
from edgetune_runtime.tools.definitions import ToolSet
from edgetune_runtime.tools.prompts import prompt_tokens, support_of, turn_text

from edgetune.objectives.base import TrainingRow, row_length
from edgetune.objectives.example import Example

from .data import TaskRow, is_learned
from .estimate import estimated_tokens

E = TypeVar("E", bound=TrainingRow)

_LONGEST_ROWS = 100
"""Of the rows, so many that seem the longest are tokenized."""


def tokenize_rows(
    rows: Sequence[TaskRow],
    tokenizer: Tokenizer,
    *,
    system: str | None,
    loss_on: Literal["completion", "all"],
    max_tokens: int,
) -> tuple[list[Example], tuple[str, ...]]:
    """Tokenize the rows that fit in `max_tokens`, in order; also returns where the longer ones are, never truncated.

    Prompts are rendered and tokenized exactly as in the runtime, followed by the completion and the end-of-turn token.
    Raises UsageError if no row fits, or the chat template rejects a row.
    """
    return fitting(rows, (_example(row, tokenizer, system, loss_on) for row in rows), max_tokens)


def longest_tokens(rows: Sequence[TaskRow], system: str | None, file: Path | None, added_tokens: int) -> int:
    """The tokens of the longest row: counted with the base's GGUF file, if there is one, otherwise estimated.

    The estimate is a high one; `added_tokens` are those besides a row's texts (see `TaskType`).
    """
    if file is None:
        return max(estimated_tokens(row, system) for row in rows) + added_tokens
    some = sorted(rows, key=lambda row: estimated_tokens(row, system), reverse=True)[:_LONGEST_ROWS]
    with closing(GgufTokenizer(file)) as tokenizer:
        examples, _ = tokenize_rows(some, tokenizer, system=system, loss_on="all", max_tokens=sys.maxsize)
    return max(map(row_length, examples))


def fitting(rows: Sequence[TaskRow], examples: Iterable[E], max_tokens: int) -> tuple[list[E], tuple[str, ...]]:
    """The examples of the rows that fit in `max_tokens`, and where the other rows are; UsageError if none fits."""
    pairs = list(zip(rows, examples, strict=True))
    kept = [example for _, example in pairs if row_length(example) <= max_tokens]
    if pairs and not kept:
        shortest = min(row_length(example) for _, example in pairs)
        message = f"all {len(pairs)} rows are longer than {max_tokens} tokens; the shortest has {shortest}"
        raise UsageError(message, "raise context_length or shorten the rows")
    return kept, tuple(row.where for row, example in pairs if row_length(example) > max_tokens)


def _example(row: TaskRow, tokenizer: Tokenizer, system: str | None, loss_on: str) -> Example:
    if row.messages is None:
        tokens = [*tokenizer.tokenize(row.text or ""), tokenizer.end_token]
        return Example(tuple(tokens), (False, *[True] * (len(tokens) - 1)), 1, row.weight)
    try:
        messages = messages_for(row.messages, system)
        prompt = prompt_tokens(tokenizer, messages, row.tools)
        target = _target_tokens(_written(row.turn, tokenizer) if row.turn else row.completion or "", tokenizer)
        learned = [False] + [loss_on == "all"] * (len(prompt) - 1) + [True] * len(target)
        for turn, place in _earlier_turns(messages, prompt, tokenizer, row.tools):
            learned[place] = [is_learned(turn)] * (place.stop - place.start)
    except UsageError as error:
        raise UsageError(f"{row.where}: {error.message}", error.remedy) from error
    return Example((*prompt, *target), tuple(learned), len(prompt), row.weight)


def _earlier_turns(
    messages: list[Message], prompt: list[int], tokenizer: Tokenizer, tools: ToolSet | None
) -> Iterator[tuple[Message, slice]]:
    """The assistant's earlier turns, and the places of their tokens in `prompt`.

    Left out are turns before which the tokens are not those that the device would see when it answers, and those that
    the template renders differently later, such as without their reasoning.
    """
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_tokens(tokenizer, messages[:index], tools)
        target = _target_tokens(_written(message, tokenizer), tokenizer)
        # Where results follow a call, there may be no end of the turn.
        for end in (len(before) + len(target), len(before) + len(target) - 1):
            if prompt[:end] == [*before, *target][:end]:
                yield message, slice(len(before), end)
                break


def _written(turn: Message, tokenizer: Tokenizer) -> str:
    """The text of an assistant's turn, its calls as the base's chat template writes them."""
    content: str = turn["content"]
    if "tool_calls" not in turn:
        return content
    form, calls = support_of(tokenizer).format, turn["tool_calls"]
    if form.between is None and len(calls) > 1:
        message = f"{len(calls)} calls in one message, and the base's chat template has one call at most"
        raise UsageError(message, "write a message per call, or use another base")
    # Without a marker, a call is read at the beginning of an answer alone, as such templates write it.
    return turn_text(content if form.marker else "", calls, form)


def _target_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an answer to its end, which some formats of calls have themselves."""
    tokens = list(tokenizer.tokenize(text, continues=True))
    return tokens if tokens and tokenizer.is_end(tokens[-1]) else [*tokens, tokenizer.end_token]

"""Prepares what a call needs before its first token: the prompt's tokens, its fixed part, the answer's constraint."""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from edgetune_runtime.decoding.child_compiler import TOO_EXPENSIVE
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.decoding.single_flight import SingleFlightCache
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.states.cache import common_prefix
from edgetune_runtime.text.chat import Message, Prompt, messages_for
from edgetune_runtime.tools.calls import CallReader
from edgetune_runtime.tools.definitions import ToolSet, check_schemas
from edgetune_runtime.tools.grammar import control_tokens, grammar_of, written_form
from edgetune_runtime.tools.prompts import prompt_tokens, support_of, tokens_within

from .options import AnswerForm

_PROBES = ("A", "7", "\n", "é", "(")
"""Messages without a common prefix: the common prefix of their prompts is the fixed part."""
_MAX_FIXED = 1024
"""Fixed parts that are remembered; apps may give other tools with each call."""

Check = Callable[[], None]
"""Ends the work by raising; called before each part of it."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """The tokens of a prompt, how many of them are its fixed part, and whether that part may not come again."""

    tokens: list[int]
    fixed: int = 0
    comes_with_call: bool = False


class FixedParts:
    """The first tokens that all prompts with one system prompt and tools have in common. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[bytes, array[int]] = {}

    def tokenized(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        form: AnswerForm,
        *,
        own_system: str | None,
        is_carried: bool,
        max_tokens: int,
        check: Check,
    ) -> TokenizedPrompt:
        """The prompt of messages made by `messages_for`, for an adapter with this system prompt.

        PromptTooLongError for more than `max_tokens`.
        """
        tokens = chat_tokens(tokenizer, messages, form, check, max_tokens)
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        # Other adapters computed the beginning of a session that was carried over.
        is_shared = not is_carried or system == own_system
        fixed = self._count(tokenizer, system, form, tokens=tokens, check=check) if is_shared else 0
        comes_with_call = system != own_system or form.tools is not None or form.think is not None
        return TokenizedPrompt(tokens, fixed, comes_with_call)

    def _count(
        self,
        tokenizer: Tokenizer,
        system: str | None,
        form: AnswerForm,
        *,
        tokens: Sequence[int],
        check: Check,
    ) -> int:
        """How many of the tokens of a prompt are fixed."""
        # A client may send prompts of any length, so only their digests are remembered. Templates may print the date.
        texts = [system, None if form.tools is None else form.tools.text, form.think, date.today().isoformat()]
        key = hashlib.sha256(json.dumps(texts).encode()).digest()
        fixed = self._tokens.get(key)
        if fixed is None:
            one, *others = (chat_tokens(tokenizer, messages_for(probe, system), form, check) for probe in _PROBES)
            fixed = array("i", one[: min(common_prefix(one, other) for other in others)])
            with self._lock:
                while len(self._tokens) >= _MAX_FIXED:
                    del self._tokens[next(iter(self._tokens))]
                self._tokens[key] = fixed
        return len(fixed) if len(fixed) < len(tokens) and array("i", tokens[: len(fixed)]) == fixed else 0


class Constraints:
    """Constraints on the vocabulary of one base, which the first of them reads. Thread-safe."""

    def __init__(self) -> None:
        self._grammars: SingleFlightCache[Grammars] = SingleFlightCache(1)

    def of(
        self,
        tokenizer: Tokenizer,
        output: OutputSpec | None,
        tools: ToolSet | None,
        texts: Sequence[str],
        check: Check,
    ) -> tuple[CallReader | None, Constraint | None]:
        """The call parser and the output constraint of an answer to these texts; None for what a call does not need."""
        output = None if output is None else output.for_prompt(texts)
        if tools is not None:
            reader, spec = _calls(tokenizer, tools, output)
        elif output is not None:
            reader, spec = None, output
        else:
            return None, None
        grammars = self._grammars.get("", lambda: Grammars(tokenizer))
        try:
            return reader, grammars.constraint(spec, check)
        except UsageError as error:
            if tools is None:
                raise
            if TOO_EXPENSIVE not in error.message:
                # That names the tool.
                check_schemas(tools)
            reason = error.message.rpartition(" cannot be used: ")[2]
            raise UsageError(f"the parameters of the tools cannot be used: {reason}", error.remedy) from error


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], form: AnswerForm, check: Check, max_tokens: int | None = None
) -> list[int]:
    """The tokens of messages made by `messages_for`. PromptTooLongError for more than `max_tokens`."""
    return _not_empty(
        prompt_tokens(tokenizer, messages, form.tools, think=form.think, max_tokens=max_tokens, check=check)
    )


def raw_tokens(tokenizer: Tokenizer, prompt: Prompt, form: AnswerForm, max_tokens: int) -> list[int]:
    """The tokens of a text that is not rendered. PromptTooLongError for more than `max_tokens`."""
    if not isinstance(prompt, str) or form.tools is not None:
        refused = "messages" if form.tools is None else "tools"
        raise UsageError(f"a raw prompt has no {refused}", "give a text, without tools, or leave raw out")
    return _not_empty(tokens_within(tokenizer, prompt, max_tokens))


def _not_empty(tokens: list[int]) -> list[int]:
    if not tokens:
        raise UsageError("the prompt has 0 tokens", "give a text that is not empty")
    return tokens


def _calls(tokenizer: Tokenizer, tools: ToolSet, output: OutputSpec | None) -> tuple[CallReader | None, OutputSpec]:
    """The call parser and the output constraint."""
    template = support_of(tokenizer).format
    controls = control_tokens(template, tokenizer)
    form = written_form(template, controls, tokenizer)
    marks = {token: name.encode() for name, token in controls.items()}
    names = None if output is None else frozenset(tool.name for tool in tools.offered)
    is_one_token = bool(form.marker) and len(tokenizer.tokenize(form.marker, continues=True)) == 1
    reader = None if tools.choice == "none" else CallReader(form, marks, names, is_one_token)
    return reader, grammar_of(tools, form, controls, output)

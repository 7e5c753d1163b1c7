"""Render a prompt with tools and calls, also with chat templates that do not know them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import PromptTooLongError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.text.chat import Message, render

from .definitions import ToolSet
from .formats import CallFormat, TemplateTools, template_tools

_BLOCK = """# Tools

You may call these functions:
<tools>
{definitions}
</tools>

To call one, answer with its name and its arguments as JSON:
{example}"""
_USUAL_CHARACTERS = 16
"""Length of a token; the longest token of the vocabulary is looked up only for texts that need it."""
_EXAMPLE = {"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}, "id": "000000000"}


def support_of(tokenizer: Tokenizer) -> TemplateTools:
    """What the base's chat template does with tools, and the format of its calls."""
    return template_tools(tokenizer.chat_template, tokenizer.bos, tokenizer.eos)


def prompt_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: ToolSet | None = None,
    *,
    think: bool | None = None,
    max_tokens: int | None = None,
    check: Callable[[], None] = no_limits,
) -> list[int]:
    """The tokens of a prompt of messages made by `messages_for`, up to where the answer begins.

    What the template does not render is put into the messages' texts: the tools into the system prompt, calls into the
    assistant's answers, and results into messages of the user. The names of control tokens in messages and tools are
    only text, so that nobody can write the beginning of a turn into one. `check` and the errors are those of `render`,
    and with `max_tokens` of `tokens_within` too.
    """
    text = prompt_text(tokenizer, messages, tools, think=think, check=check)
    return tokenizer.tokenize(text) if max_tokens is None else tokens_within(tokenizer, text, max_tokens)


def tokens_within(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """The tokens of a text; PromptTooLongError for more than `max_tokens`. A text that is too long is not tokenized."""
    min_tokens = len(text) // tokenizer.longest if len(text) > max_tokens * _USUAL_CHARACTERS else 0
    if len(text) > max_tokens:
        min_tokens = max(min_tokens, tokenizer.controls.count(text))
    tokens = [] if min_tokens > max_tokens else tokenizer.tokenize(text)
    count = max(min_tokens, len(tokens))
    if count > max_tokens:
        least = "" if tokens else "at least "
        message = f"the prompt has {least}{count} tokens, the context allows 1 to {max_tokens}"
        raise PromptTooLongError(message, "change the prompt, or open the bundle with a larger context_length")
    return tokens


def prompt_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: ToolSet | None,
    *,
    think: bool | None = None,
    check: Callable[[], None] = no_limits,
) -> str:
    """The text that `prompt_tokens` tokenizes, with the marks of `ControlTokens`."""
    definitions = None if tools is None else tools.definitions
    messages, definitions = tokenizer.controls.as_text((messages, definitions))
    if definitions is not None or any("tool_calls" in message or message["role"] == "tool" for message in messages):
        support = support_of(tokenizer)
        messages = _written(messages, definitions, support)
        definitions = definitions if support.renders_tools else None
    template, bos, eos = tokenizer.chat_template, tokenizer.bos, tokenizer.eos
    return render(
        template,
        messages,
        add_generation_prompt=True,
        bos=bos,
        eos=eos,
        tools=definitions,
        think=think,
        check=check,
    )


def turn_text(content: str, calls: Sequence[Mapping[str, Any]], form: CallFormat) -> str:
    """The text of an assistant's turn: its content, then its `tool_calls` in a format."""
    written = form.write([{**call["function"], "id": call["id"]} for call in calls])
    return f"{content}\n{written}" if content else written


def _written(
    messages: Sequence[Message], definitions: Sequence[Mapping[str, Any]] | None, support: TemplateTools
) -> list[Message]:
    """The messages with what the template does not render as text."""
    result = list(messages)
    if not support.renders_calls:
        result = [_without_calls(message, support.format) for message in result]
    if not support.renders_results:
        result = _without_results(result)
    if definitions is not None and not support.renders_tools:
        texts = [json.dumps(definition, ensure_ascii=False) for definition in definitions]
        block = _BLOCK.format(definitions="\n".join(texts), example=support.format.write([_EXAMPLE]))
        first = result[0]
        if first["role"] == "system":
            result[0] = {**first, "content": f"{first['content']}\n\n{block}"}
        else:
            result.insert(0, {"role": "system", "content": block})
    return result


def _without_calls(message: Message, form: CallFormat) -> Message:
    if "tool_calls" not in message:
        return message
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**plain, "content": turn_text(message["content"], message["tool_calls"], form)}


def _without_results(messages: Sequence[Message]) -> list[Message]:
    """Results as messages of the user, one with what follows them of the user, as users and assistants alternate."""
    result: list[Message] = []
    for message in messages:
        turn, follows = message, bool(result) and result[-1].get("name") == _RESULTS["name"]
        if turn["role"] == "tool":
            turn = {**_RESULTS, "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        if follows and turn["role"] == "user":
            turn = {**turn, "content": f"{result.pop()['content']}\n{turn['content']}"}
        result.append(turn)
    return result


_RESULTS: Message = {"role": "user", "name": "tool"}

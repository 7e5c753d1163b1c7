"""Render chat messages with the model's chat template, as transformers does, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from edgetune_runtime.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def messages_for(prompt: Prompt, system: str | None) -> list[Message]:
    """The messages to render: a text becomes a user message; `system` is added unless the first message is one.

    UsageError when there are no messages, or when one has no role or no content.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise UsageError("the list of messages is empty", "give at least one message")
    for number, message in enumerate(messages, 1):
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise UsageError(f"message {number} is {message!r}", 'give {"role": TEXT, "content": TEXT}')
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def text_of(prompt: Prompt) -> str:
    """The one text of a prompt; UsageError for a conversation, which an encoder does not read."""
    messages = messages_for(prompt, None)
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UsageError(f"an encoder reads one text, not messages of: {', '.join(roles)}", "give the text alone")
    return messages[0]["content"]


def render(
    template: str | None, messages: Sequence[Message], *, add_generation_prompt: bool, bos: str = "", eos: str = ""
) -> str:
    """Render the prompt; without a template, join the contents with newlines.

    UsageError when the template refuses the messages, IncompatibleError when the template is invalid.
    """
    if template is None:
        return "\n".join(message["content"] for message in messages)
    compiled = _compile(template)
    from jinja2 import TemplateError  # noqa: PLC0415 - a third of the start-up time; needed only with a template

    try:
        return compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
        )
    except (TemplateError, TypeError, ValueError) as error:
        message = f"the chat template of the base refused the messages: {error}"
        raise UsageError(message, "change their roles or order") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    try:
        import jinja2.ext  # noqa: PLC0415 - see render
        from jinja2.nodes import Node  # noqa: PLC0415
        from jinja2.parser import Parser  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError as error:
        message = "chat templates need jinja2, which is not installed"
        raise IncompatibleError(message, "run: pip install jinja2") from error

    class Generation(jinja2.ext.Extension):
        # The tag marks the assistant's text for training tools; rendering outputs its body.
        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        message = f"the chat template of the base is invalid: {error}"
        raise IncompatibleError(message, "use a base with a valid chat template") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's built-in filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""The options of `generate`, `stream` and `send`, and what constrains the answer among them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.decoding.output import KINDS, OutputSpec, spec_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.limits import CallLimits
from edgetune_runtime.text.sampling import Sampling
from edgetune_runtime.tools.definitions import Tools, ToolSet, tool_set
from edgetune_runtime.wording import suggestion

from .confidence import Curves


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling`, set for one answer."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    max_tokens: int


class AnswerOptions(SamplingOptions, total=False):
    """Options of one answer.

    `sampling` says how tokens are chosen; other options, such as `temperature=0.7`, change single fields of it. After
    `deadline_s` seconds, which include waiting for other calls, or once `cancel` is set, the answer ends with the text
    so far.

    At most one of `schema` (a JSON Schema as mapping or text, or a pydantic model class), `choices` (texts), `regex`
    and `grammar` (Lark as llguidance reads it) constrains the answer, instead of the adapter's own constraint;
    `unconstrained` removes that. An adapter with labels answers with the one that `classify` finds, unless one of these
    options, or `tools`, is given.

    With `logprobs`, `Answer.logprobs` has the log-probability of each token, and of that many of the likeliest tokens
    at its place (0 to 20); see `TokenLogprob`.

    `tools` are the functions that the answer may call, as definitions of OpenAI's API or as Python functions, rendered
    by the base's chat template; the calls are in `Answer.tool_calls`. Calls always fit the tools' schemas. With
    `tool_choice` "auto" (default) the model decides whether it calls any, with "required" it must, with a tool's name
    it must call that one, and with "none" it cannot. Tools also replace the adapter's own constraint. With a `schema`
    beside them, an answer is either calls or JSON that fits the schema.

    `min_confidence` (0 to 1) marks answers with a lower confidence as `is_unsure`, and those whose confidence is not
    known; a call whose answers cannot have one is refused unless it is routed, and answers to a routed prompt of no
    task are not marked. `unsure` says what answers in their place, instead of what the recipe says: "mark" (nothing),
    "ask" (the question in `ask`, or the recipe's), "base", the name of another adapter, "defer" (the bigger model of
    `Runtime.open`), or "error" (UnsureError); `ask` alone means "ask" too. `Answer.instead` then says so, and a stream
    gives its first piece when the answer has been judged.

    `think` is the `enable_thinking` of chat templates that know it; others ignore it. Adapters answer as they were
    trained, without it.
    """

    sampling: Sampling | None
    deadline_s: float | None
    cancel: threading.Event | None
    logprobs: int | None
    schema: object
    choices: Sequence[str] | None
    regex: str | None
    grammar: str | None
    unconstrained: bool
    tools: Tools | None
    tool_choice: str | None
    min_confidence: float | None
    unsure: str | None
    ask: str | None
    think: bool | None


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may be: one of `labels`, `output`, text and calls of `tools`, anything if `unconstrained`, or the
    adapter's form.

    With `output` and `tools` it is one of the two. With `exact` all labels are computed. `think` is only rendered.
    """

    output: OutputSpec | None = None
    tools: ToolSet | None = None
    unconstrained: bool = False
    think: bool | None = None
    labels: Sequence[str] | None = None
    exact: bool = False

    @property
    def is_of_adapter(self) -> bool:
        """Whether it is the adapter's: one of its labels, or what its output constraint allows, if it has any."""
        return self.output is None and self.tools is None and not self.unconstrained and self.labels is None

    def labels_of(self, entry: AdapterEntry | None) -> Sequence[str]:
        """The labels that the answer is one of; empty for other answers."""
        if self.labels is not None:
            return self.labels
        return entry.labels if entry is not None and self.is_of_adapter else ()

    def curves_among(self, curves: Curves, entry: AdapterEntry | None) -> Curves:
        """Those of an adapter's curves that its build fitted on answers of this form."""
        if entry is None or self.output is not None or self.unconstrained:
            return {}
        if self.tools is not None and (entry.output is not None or entry.labels or self.tools.choice != "auto"):
            return {}
        return {} if self.labels is not None and {*self.labels} != {*entry.labels} else curves


def split_options(
    options: Mapping[str, Any], named: Sequence[str] = ()
) -> tuple[CallLimits, AnswerForm, dict[str, Any]]:
    """When the call must stop, whose time begins now; what constrains the answer; and the other options.

    `named` are the arguments that the call has besides `AnswerOptions`. Raises what `spec_of` and `tool_set` do;
    UsageError for an unknown option, more than one constraint (other than tools with a schema), `unconstrained` with
    one, and what `CallLimits` refuses.
    """
    _check_names(options, (*named, *AnswerOptions.__annotations__))
    limits = CallLimits(options.get("deadline_s"), options.get("cancel"))
    rule, stop = ("min_confidence", "unsure", "ask"), ("deadline_s", "cancel")
    handled = (*KINDS, "unconstrained", "tools", "tool_choice", "think", *rule, *stop)
    others = {key: value for key, value in options.items() if key not in handled}
    tools = tool_set(options.get("tools"), options.get("tool_choice"))
    constraints = {key: options[key] for key in KINDS if options.get(key) is not None}
    unconstrained = bool(options.get("unconstrained", False))
    kinds = [*(["unconstrained"] if unconstrained else []), *(["tools"] if tools is not None else []), *constraints]
    if len(kinds) > 1 and kinds[0] in ("unconstrained", "tools") and kinds != ["tools", "schema"]:
        raise UsageError(f"{kinds[0]} and {kinds[1]} are both given", "give one of them")
    think = options.get("think")
    if think is not None and not isinstance(think, bool):
        raise UsageError(f"think is {think!r}", "give True, False or None")
    return limits, AnswerForm(spec_of(**constraints) if constraints else None, tools, unconstrained, think), others


def _check_names(options: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise UsageError(f"a call has no option {unknown!r}", suggestion(unknown, names))

"""The llguidance library: imported on first use, with limits fit for a board, and with errors in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import UsageError, importing
from edgetune_runtime.limits import no_limits
from edgetune_runtime.wording import shortened

from .child_compiler import TOO_EXPENSIVE, reason_against

if TYPE_CHECKING:
    from edgetune_runtime.bundle import AdapterEntry

DEAD_END = "NoExtensionBias"
"""Part of llguidance's error where no token of the vocabulary fits, and the answer may not end."""
UNKNOWN_TOKEN = "unknown special token"
"""Part of llguidance's error for a control token that the vocabulary does not have."""

_SIMPLIFY = "simplify it, or bound its repetitions"
_REMEDIES = {
    "Unimplemented keys": "leave these keywords out of the schema",
    "Unknown format": "leave this format out, or give a pattern",
    "oneOf constraints": "write anyOf, or give each option a const or an enum of its own",
    "nsatisfiable": "change it so that some answer fits",
    DEAD_END: "change it so that some answer fits",
    UNKNOWN_TOKEN: "name a control token of the chat template, or its number as <[123]>",
    "too complex": _SIMPLIFY,
    "TooComplex": _SIMPLIFY,
    "too large": _SIMPLIFY,
    "too many": _SIMPLIFY,
    "fuel": _SIMPLIFY,
    TOO_EXPENSIVE: _SIMPLIFY,
}
_NOISE = (
    re.compile(r"<(state|grammar|backtrace)>.*?</\1>|<non-verbose/>", re.DOTALL),
    # The line of the grammar, with a caret under the place, and those of a regex.
    re.compile(r"\n\s+\d+ \|.*", re.DOTALL),
    re.compile(r"regex parse error:.*\nerror: ", re.DOTALL),
    re.compile(r" Enable .coerce_one_of.*", re.DOTALL),
    re.compile(r"^at 1\(8\): invalid regex .*? \(in regex\): ", re.DOTALL),
)


@cache
def library() -> Any:  # noqa: ANN401 - an optional module
    """The llguidance module; MissingLibraryError when it is missing."""
    with importing("output constraints need", '"edgetune-runtime[structured]"'):
        import llguidance  # noqa: PLC0415 - optional
    return llguidance


def require_for(entries: Iterable[AdapterEntry]) -> None:
    """Raise MissingLibraryError if the answers of one of these adapters are constrained, and the library is missing."""
    if any(entry.output is not None for entry in entries):
        library()


@cache
def byte_tokenizer() -> Any:  # noqa: ANN401 - of an optional module
    """A tokenizer of single bytes, for checks without a base."""
    return library().LLTokenizer("byte")


def compile_grammar(
    tokenizer: Any,  # noqa: ANN401 - of an optional module
    grammar: str,
    tried: str,
    check: Callable[[], None] = no_limits,
) -> tuple[Any, str]:
    """A matcher at the beginning of an answer, and why it cannot be used, or ''. It holds the GIL only at the end.

    `tried` is the grammar that is tried in a child process first if it may be expensive, this one or one like it.
    Raises what `check` does, which is called meanwhile.
    """
    reason = reason_against(tried, check)
    if reason and UNKNOWN_TOKEN not in reason:
        return None, reason
    matcher = library().LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        return matcher, matcher.get_error()
    probe = matcher.deep_copy()
    probe.compute_bitmask()
    return matcher, probe.get_error()


def refusal(kind: str, value: str, message: str) -> UsageError:
    """UsageError that gives llguidance's reason against a schema, regex, ..., in one line, and a remedy."""
    reason = "no answer fits it" if DEAD_END in message else one_line(message)
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in message), f"correct the {kind}")
    return UsageError(f"{kind} {shortened(value, 80)} cannot be used: {reason}", remedy)


def one_line(message: str) -> str:
    """llguidance's error without excerpts, in one line of at most 300 characters."""
    for noise in _NOISE:
        message = noise.sub("", message)
    return shortened(message)


@cache
def _limits() -> Any:  # noqa: ANN401 - of an optional module
    # The default of 250,000 states of the lexer may take 500 MB.
    return library().LLParserLimits(max_lexer_states=20_000, verbose_errors=False)

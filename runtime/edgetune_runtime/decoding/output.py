"""The specification of an output constraint: a JSON schema, choices, a regular expression or a grammar."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.wording import shortened, suggestion

from .library import UNKNOWN_TOKEN, byte_tokenizer, compile_grammar, library, one_line, refusal
from .prompt_texts import reads_prompt, texts_in, with_texts, without_texts
from .schema import check, closed

KINDS = ("schema", "choices", "regex", "grammar")
MAX_SCHEMA_CHARACTERS = 262_144
_GIVE_SCHEMA = "give a JSON Schema or a pydantic model class"
_RULE = re.compile(r"^[ \t]*[\w?!-]+[^:\n]*:", re.MULTILINE)
SPACINGS: dict[str, dict[str, Any]] = {
    # A space, or a line break with an indent of up to 24: what json.dumps writes, and no endless blanks.
    "any": {"whitespace_pattern": r" |\r?\n[ \t]{0,24}"},
    "compact": {"whitespace_flexible": False},
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
"""The whitespace of JSON: a blank or a line break wherever JSON allows it, `{"a":1,"b":2}`, or `{"a": 1, "b": 2}`."""


@dataclass(frozen=True)
class OutputSpec:
    """What an answer may be.

    `kind` is one of KINDS. `text` is the schema or the list of choices as JSON, or the regular expression (Rust's
    syntax) or Lark grammar itself. `spacing` is one of SPACINGS, for a schema. `model` is the pydantic class that the
    schema came from; it makes `parse` return its objects, and is not stored. `texts` are those that strings from the
    prompt may be, and `general` is the constraint without them, see `for_prompt`. Make one with `output_of` or
    `from_json`.
    """

    kind: str
    text: str
    spacing: str = "any"
    model: Any = field(default=None, compare=False)
    texts: Sequence[str] = ()
    general: OutputSpec | None = field(default=None, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what a manifest stores, the same in every process."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    @cached_property
    def _matcher(self) -> Any:  # noqa: ANN401 - llguidance's matcher
        """llguidance's matcher at the beginning of an answer, whose tokens are single bytes."""
        return self.compiled(byte_tokenizer())

    @cached_property
    def grammar(self) -> str:
        """What llguidance compiles; IncompatibleError when it is not installed.

        UsageError for too deep a schema, and for a regular expression that is not valid Unicode.
        """
        try:
            if self.kind == "schema":
                options = {"json_allow_general_unicode_escapes": True, **SPACINGS[self.spacing]}
                schema = self._closed if self.general is None else with_texts(self.general._closed, self.texts)
                return str(library().LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
            if self.kind == "regex":
                return str(library().LLMatcher.grammar_from_regex(self.text))
        except (ValueError, RecursionError) as error:
            raise refusal(self.kind, self.text, str(error)) from error
        lark = _lark_of(json.loads(self.text)) if self.kind == "choices" else self.text
        # In JSON, so that a grammar that begins with a brace is not taken for one of llguidance's own format.
        return json.dumps({"grammars": [{"lark_grammar": lark}]})

    @cached_property
    def _closed(self) -> dict[str, Any]:
        return closed(json.loads(self.text))

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answers to any prompt; None where another kind of output is asked for."""
        return without_texts(json.loads(self.text)) if self.kind == "schema" else None

    @cached_property
    def _reads_prompt(self) -> bool:
        return self.kind == "schema" and reads_prompt(json.loads(self.text))

    def for_prompt(self, prompt: Iterable[str]) -> OutputSpec:
        """The constraint on an answer to these messages, of which `texts_of` names those to give.

        Strings that are from the prompt are its `texts_in`. The constraint itself where there are no such strings, and
        where the prompt is too long to have such texts, so that they are any strings.
        """
        return self.with_texts(tuple(texts_in(prompt)) if self._reads_prompt else ())

    def with_texts(self, texts: Sequence[str]) -> OutputSpec:
        """The constraint with these texts for the strings that are from the prompt; any strings if there are none."""
        general = self if self.general is None else self.general
        return replace(general, texts=tuple(texts), general=general) if texts else general

    def compiled(self, tokenizer: Any, check: Callable[[], None] = no_limits) -> Any:  # noqa: ANN401 - of llguidance
        """llguidance's matcher at the beginning of an answer; UsageError for what cannot be used.

        Raises what `check` does, which is called while a grammar that may be expensive is tried in a child process.
        """
        # The texts are bounded, and nothing else limits their strings, so the grammar without them is tried.
        tried = self if self.general is None else self.general
        matcher, error = compile_grammar(tokenizer, self.grammar, tried.grammar, check)
        if error:
            raise refusal(self.kind, self.text, error)
        return matcher

    def accepts(self, text: str) -> bool:
        """Whether an answer may be exactly this text; IncompatibleError when llguidance is not installed."""
        matcher = self._matcher.deep_copy()
        return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())

    def parse(self, text: str) -> Any:  # noqa: ANN401 - whatever the schema describes
        """The parsed answer: JSON, or an instance of `model`, for a schema; else the text itself.

        VerificationError when the text is not such JSON, for example because the answer ended early, or `model` refuses
        it.
        """
        if self.kind != "schema":
            return text
        try:
            return json.loads(text) if self.model is None else self.model.model_validate_json(text)
        except (ValueError, RecursionError) as error:
            message = f"the answer {shortened(text, 80)!r} does not parse: {one_line(str(error))}"
            raise VerificationError(message, "give a higher max_tokens if it was cut off") from error

    def to_json(self) -> dict[str, Any]:
        """What a manifest stores, for `from_json`."""
        value = self.text if self.kind in {"regex", "grammar"} else json.loads(self.text)
        return {self.kind: value} if self.spacing == "any" else {self.kind: value, "spacing": self.spacing}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> OutputSpec:
        """The reverse of `to_json`; UsageError as `output_of`. Nothing is compiled, so llguidance may be missing."""
        unknown = [key for key in stored if key not in {*KINDS, "spacing"}]
        if unknown:
            raise UsageError(f"output has no key {unknown[0]!r}", suggestion(unknown[0], (*KINDS, "spacing")))
        return spec_of(**stored)


def spec_of(
    *,
    schema: object = None,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    spacing: str = "any",
) -> OutputSpec:
    """What an answer may be; its form is checked, but it is not compiled.

    Exactly one of `schema` (a JSON Schema as mapping or JSON text, or a pydantic model class), `choices` (texts),
    `regex` (for the whole answer) and `grammar` (Lark as llguidance reads it) is to be given. `spacing` says where JSON
    may have whitespace, see SPACINGS; a fixed spacing forces more tokens, but has to be that of the training data.
    UsageError, in one line, for none or several of them, and what is too large.
    """
    forms = {"schema": schema, "choices": choices, "regex": regex, "grammar": grammar}
    kinds = [kind for kind, value in forms.items() if value is not None]
    if len(kinds) != 1:
        names = " and ".join(kinds) or "nothing"
        raise UsageError(f"{names} is given for the output", f"give exactly one of {', '.join(KINDS)}")
    (kind,) = kinds
    value: Any = forms[kind]
    if spacing not in SPACINGS:
        raise UsageError(f"spacing is {spacing!r}", f"choose one of: {', '.join(SPACINGS)}")
    if spacing != "any" and kind != "schema":
        raise UsageError(f"spacing {spacing!r} is given for a {kind}", "give it for a schema only")
    if kind == "schema":
        model = value if hasattr(value, "model_json_schema") else None
        return OutputSpec(kind, _schema_text(value), spacing, model)
    if kind == "choices":
        return OutputSpec(kind, _choices_text(value))
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{kind} is {value!r}", "give a text that is not empty")
    if kind == "grammar":
        _check_lark(value)
    return OutputSpec(kind, value)


def output_of(**constraint: Any) -> OutputSpec:  # noqa: ANN401 - as `spec_of`
    """Like `spec_of`, compiled once to see that it can be used.

    UsageError too for what llguidance cannot read or does not support, what is too complex, and what no answer fits.
    IncompatibleError when llguidance is not installed.
    """
    spec = spec_of(**constraint)
    error = compile_grammar(byte_tokenizer(), spec.grammar, spec.grammar)[1]
    # Only a base has control tokens.
    if error and UNKNOWN_TOKEN not in error:
        raise refusal(spec.kind, spec.text, error)
    return spec


def _schema_text(value: Any) -> str:  # noqa: ANN401 - it is checked here
    try:
        if hasattr(value, "model_json_schema"):
            value = value.model_json_schema()
        elif isinstance(value, str):
            value = json.loads(_bounded(value))
        elif isinstance(value, Mapping):
            value = dict(value)
        if not isinstance(value, dict):
            raise UsageError(f"schema is a {type(value).__name__}, not a JSON object", _GIVE_SCHEMA)
        text = _bounded(json.dumps(value, allow_nan=False))
        check(value)
        reads_prompt(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"schema is not JSON: {one_line(str(error))}", _GIVE_SCHEMA) from error
    return text


def _bounded(schema: str) -> str:
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        message = f"schema has {len(schema)} characters, and at most {MAX_SCHEMA_CHARACTERS} are allowed"
        raise UsageError(message, "simplify it")
    return schema


def _choices_text(value: Any) -> str:  # noqa: ANN401 - it is checked here
    texts = [] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"choices are {shortened(repr(value), 80)}", "give a list of texts")
    if "" in texts:
        raise UsageError(f"choice {texts.index('') + 1} of {len(texts)} is empty", "leave it out")
    repeated = [text for text, count in Counter(texts).items() if count > 1]
    if repeated:
        raise UsageError(f"choice {shortened(repeated[0], 80)!r} is given twice", "leave one out")
    return json.dumps(texts)


def _check_lark(text: str) -> None:
    # llguidance overflows the stack where some 2,000 rules, or 600 references in schemas, lead from one to the next.
    for kind, count, max_count in (("rules", len(_RULE.findall(text)), 500), ("references", text.count('"$ref"'), 200)):
        if count > max_count:
            raise UsageError(f"grammar has {count} {kind}", f"give at most {max_count}")


def _lark_of(choices: Sequence[str]) -> str:
    """One terminal, which llguidance compiles into one automaton."""
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)

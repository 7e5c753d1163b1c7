"""Compiled forms of answers for one base: compiled on first use, kept while in use."""

from __future__ import annotations

from typing import Any

from edgetune_runtime.engines.base import Tokenizer

from .constraint import Constraint
from .library import compile_grammar, refusal
from .once import Once
from .output import OutputSpec
from .vocabulary import GrammarVocabulary


class Grammars:
    """The forms of answers that calls on one base use, compiled; the `keep` last used are kept. Thread-safe.

    Reads the base's vocabulary: 0.11 s and 14 MB for 49,152 tokens, 0.75 s and 63 MB for 262,144 (one x86-64 core),
    most of it in llguidance with the GIL held, which cannot store the result. All answers of one form share the states
    of its automaton, so later ones compute less. Only calls with a form that is being compiled wait for it.
    IncompatibleError when llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, keep: int = 32) -> None:
        self._vocabulary = GrammarVocabulary(tokenizer)
        self._compiled: Once[Any] = Once(keep)

    def constraint(self, spec: OutputSpec) -> Constraint:
        """One answer's constraint, at its beginning.

        UsageError when the base has no tokens that fit, or the form cannot be used (see `output_of`).
        """
        return Constraint(self._start(spec), self._vocabulary, lambda: self._restart(spec))

    def _start(self, spec: OutputSpec) -> Any:  # noqa: ANN401 - llguidance's matcher
        # A copy shares the automaton.
        return self._compiled.get(spec.digest, lambda: self._compile(spec)).deep_copy()

    def _restart(self, spec: OutputSpec) -> Any:  # noqa: ANN401 - as above
        """As `_start`, with an automaton that has no states of other answers."""
        self._compiled.drop(spec.digest)
        return self._start(spec)

    def _compile(self, spec: OutputSpec) -> Any:  # noqa: ANN401 - as above
        matcher, error = compile_grammar(self._vocabulary.handle, spec.grammar)
        if error:
            raise refusal(spec.kind, spec.text, error)
        return matcher

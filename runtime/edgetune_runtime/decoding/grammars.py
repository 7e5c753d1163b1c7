"""The compiled output constraints of one base: compiled on first use; the last used are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.limits import no_limits

from .child_compiler import may_be_expensive
from .constraint import Constraint
from .output import OutputSpec
from .single_flight import SingleFlightCache
from .vocabulary import GrammarVocabulary

_KEPT, _KEPT_EXPENSIVE = 16, 2
"""Compiled forms. Expensive ones take up to 64 MB, others a few MB, and their automata grow as they are used."""


class Grammars:
    """The forms of answers that calls on one base use, compiled; the last used are kept. Thread-safe.

    Reads the base's vocabulary: 0.11 s and 14 MB for 49,152 tokens, 0.75 s and 63 MB for 262,144 (one x86-64 core),
    most of it in llguidance with the GIL held, which cannot store the result. All answers of one form share the states
    of its automaton, so later ones compute less, unless it has texts of the prompt: such forms are compiled for each
    answer. Only calls with a form that is being compiled wait for it.
    IncompatibleError when llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = GrammarVocabulary(tokenizer)
        self._cheap: SingleFlightCache[Any] = SingleFlightCache(_KEPT)
        self._expensive: SingleFlightCache[Any] = SingleFlightCache(_KEPT_EXPENSIVE)

    def constraint(self, spec: OutputSpec, check: Callable[[], None] = no_limits) -> Constraint:
        """One answer's constraint, at its beginning.

        UsageError when the base has no tokens that fit, or the form cannot be used (see `output_of`). Raises what
        `check` does, which is called while the form is compiled.
        """
        return Constraint(self._start(spec, check), self._vocabulary, lambda: self._restart(spec))

    def _start(self, spec: OutputSpec, check: Callable[[], None] = no_limits) -> Any:  # noqa: ANN401 - a matcher
        handle = self._vocabulary.handle
        if spec.texts:
            return spec.compiled(handle, check)
        compiled = self._compiled(spec).get(spec.digest, lambda: spec.compiled(handle, check), check)
        # A copy shares the automaton.
        return compiled.deep_copy()

    def _restart(self, spec: OutputSpec) -> Any:  # noqa: ANN401 - llguidance's matcher
        """Like `_start`, with an automaton that has no states of other answers."""
        if not spec.texts:
            self._compiled(spec).drop(spec.digest)
        return self._start(spec)

    def _compiled(self, spec: OutputSpec) -> SingleFlightCache[Any]:
        return self._expensive if may_be_expensive(spec.grammar) else self._cheap

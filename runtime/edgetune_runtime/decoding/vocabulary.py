"""A base's vocabulary for llguidance: the bytes of each token, the end tokens, and the base's own tokenization."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.text.controls import USUAL_NAME

from .library import library

# llguidance's mark of a token without text; not a byte of UTF-8.
_CONTROL = b"\xff"
# Tokens within a JSON string, which llguidance looks up at once instead of one by one where all of them may come next:
# two of its own four slices, as the others make no mask faster and a third of the vocabulary's time and memory.
_SLICES = [rf'[^"\\\x00-\x1F\x7F]{{1,{length}}}' for length in (10, 30)]


class GrammarVocabulary:
    """The tokens of one base for llguidance, which keeps them in a trie. Make it once per base: see `Grammars`.

    Control tokens and end tokens have no text. A grammar may name those control tokens that the chat template
    names, as `<|tool_call|>`, and any by its number, as `<[123]>`. IncompatibleError when llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size: int = tokenizer.vocab_size
        self.end_list = tokenizer.ends()
        self.ends = frozenset(self.end_list)
        adapter = _LlguidanceTokenizer(tokenizer, self)
        # Without an end token llguidance adds one of its own after the vocabulary, where there are no logits.
        self.handle: Any = library().LLTokenizer(adapter, eos_token=self.end_list or None, slices=_SLICES)
        adapter.tokens = []


class _LlguidanceTokenizer:
    """What llguidance asks of a tokenizer that is written in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
        self._tokenizer = tokenizer
        self._ends = vocabulary.ends
        # llguidance holds this object, and Python cannot collect a cycle that goes through llguidance.
        self._vocabulary = weakref.ref(vocabulary)
        self.eos_token_id = min(self._ends, default=None)
        self.tokens = [b"" if piece[:1] == _CONTROL else piece for piece in tokenizer.pieces()]
        for token in self._ends:
            self.tokens[token] = b""
        for token, name in _control_names(tokenizer).items():
            if token not in self._ends:
                self.tokens[token] = _CONTROL + name.encode()

    def __call__(self, text: str) -> list[int]:
        """The base's own tokens of `text`, as in training, so that a forced text has the tokens that were learned."""
        tokens = self._tokenizer.tokenize(text, continues=True)
        if b"".join(map(self._bytes, tokens)) == text.encode():
            return tokens
        # The tokenizer reads the text of a control token as that token, which has no text here.
        vocabulary = self._vocabulary()
        return [] if vocabulary is None else list(vocabulary.handle.greedy_tokenize(text))

    def _bytes(self, token: int) -> bytes:
        piece = b"" if token in self._ends else self._tokenizer.piece(token)
        return b"" if piece.startswith(_CONTROL) else piece


def _control_names(tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens that the chat template names."""
    names = {}
    for name in USUAL_NAME.findall(f"{tokenizer.bos}{tokenizer.eos}{tokenizer.chat_template or ''}"):
        tokens = tokenizer.tokenize(name, continues=True)
        if len(tokens) == 1 and not tokenizer.piece(tokens[0]):
            names[tokens[0]] = name
    return names

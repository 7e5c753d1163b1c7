"""Log-probabilities of the tokens of an answer, and of the likeliest tokens at each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune_runtime.engines.base import Logits, Tokenizer, log_total
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.sampling import top_tokens

MAX_ALTERNATIVES = 20


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability (nats) in the model's own distribution.

    That is the distribution before the output constraint, the repeat penalty, the filters and the temperature, as in
    OpenAI's and llama.cpp's answers. `bytes` may be a part of a UTF-8 character; control tokens have none. `top` are
    the likeliest tokens at this place, the likeliest first, as many as were requested; the token may be among them.
    """

    token: int
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text, with U+FFFD for a part of a character."""
        return self.bytes.decode("utf-8", "replace")


class LogprobRecord:
    """The log-probabilities of one answer, with `alternatives` likeliest tokens each; UsageError for a wrong number."""

    def __init__(self, alternatives: int) -> None:
        is_count = isinstance(alternatives, int) and not isinstance(alternatives, bool)
        if not is_count or not 0 <= alternatives <= MAX_ALTERNATIVES:
            raise UsageError(f"logprobs is {alternatives!r}", f"give an integer from 0 to {MAX_ALTERNATIVES}")
        self._alternatives = alternatives
        self.tokens: list[TokenLogprob] = []

    def add(self, tokenizer: Tokenizer, rows: Sequence[Logits] | Logits, tokens: Sequence[int]) -> None:
        """Record tokens, each chosen at the place of one row of logits."""
        for row, token in zip(rows, tokens, strict=True):
            total = log_total(row)
            count = self._alternatives
            # A padded vocabulary has more logits than tokens.
            likeliest = top_tokens(row[: tokenizer.vocab_size], count).tolist() if count else []
            one, *top = (
                TokenLogprob(each, tokenizer.piece(each), float(row[each]) - total) for each in (token, *likeliest)
            )
            self.tokens.append(TokenLogprob(one.token, one.bytes, one.logprob, tuple(top)))

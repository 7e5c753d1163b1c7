"""Predicts memory and speed of a base with its adapters on a board, and chooses quantization and context for it.

An MB is 10^6 bytes. docs/boards.md compares predictions with measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.sizing.needs import Item, items_of, kept_of
from edgetune_runtime.sizing.speed import Speed, speed_of

from .boards import Board
from .changes import BOARD_QUANTIZATIONS, SHORTEST_CONTEXT, longest_context

USABLE_TOKENS_PER_S = 5.0
"""About reading speed; a quantization that decodes slower is chosen only if no smaller one is faster."""
CONTEXT_LENGTHS = (1024, 512, 256)
"""Context lengths to choose from, in tokens, the preferred one first."""
NeedsOf = Callable[[str | None, int], Needs]
"""The needs of a bundle with a quantization (None: the base as it is) and a context length in tokens."""


@dataclass(frozen=True)
class Fit:
    """The prediction for a board."""

    device: str
    engine: str
    items: Sequence[Item]
    available_mb: float
    speed: Speed

    @property
    def needed_mb(self) -> float:
        """The sum of all items."""
        return sum(item.mb for item in self.items)

    @property
    def kept_mb(self) -> float:
        """The sum of all items without mapped files that the system can drop and that are rarely read again."""
        return kept_of(self.items)

    @property
    def fits(self) -> bool:
        """Whether the board leaves enough memory, if the system drops what it can."""
        return self.kept_mb <= self.available_mb

    @property
    def largest(self) -> Item:
        """The largest item."""
        return max(self.items, key=lambda item: item.mb)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "device": self.device,
            "engine": self.engine,
            "fits": self.fits,
            "items": [{"name": item.name, "mb": round(item.mb, 1)} for item in self.items],
            "needed_mb": round(self.needed_mb, 1),
            "kept_mb": round(self.kept_mb, 1),
            "available_mb": round(self.available_mb, 1),
            **{name: round(tokens_per_s, 1) for name, tokens_per_s in asdict(self.speed).items()},
        }


@dataclass(frozen=True)
class BoardChoice:
    """The settings for a board, and why these. The first one of the `usable` quantizations is the choice; None if the
    base ships unchanged."""

    board: Board
    usable: Sequence[str | None]
    context_length: int
    reason: str


def fit(needs: Needs, board: Board) -> Fit:
    """Compare the memory needed with the memory free on the board, and predict the speed there."""
    items = items_of(needs, repacks=board.repacks)
    return Fit(board.name, needs.engine, items, board.free_mb, speed_of(needs, board.speed))


def require_fit(needs: Needs, board: Board, remedy: str | None = None) -> Fit:
    """`fit`; IncompatibleError with the memory needed and free, and a remedy, if it does not fit.

    `remedy` takes the place of the one that changes a recipe.
    """
    result = fit(needs, board)
    if not result.fits:
        largest = result.largest
        message = (
            f"needs {result.kept_mb:.0f} MB, but {board.name} leaves {result.available_mb:.0f} MB; "
            f"the largest part is {largest.name} with {largest.mb:.0f} MB"
        )
        raise IncompatibleError(message, remedy or _remedy(needs, board, result))
    return result


def choose(
    board: Board,
    needs_of: NeedsOf,
    quantizations: Sequence[str | None] = BOARD_QUANTIZATIONS,
    context_lengths: Sequence[int] = CONTEXT_LENGTHS,
) -> BoardChoice:
    """Choose one of the context lengths, the first one that fits, and one of the quantizations for it.

    That is the first one, given the best one first, that fits and decodes at `USABLE_TOKENS_PER_S` or more, or else the
    fastest that fits. IncompatibleError if none fits.
    """
    for context_length in context_lengths:
        fitting = list[tuple[str | None, Fit]]()
        for name in quantizations:
            needs = needs_of(name, context_length)
            predicted = fit(needs, board)
            if predicted.fits:
                fitting.append((name, predicted))
        if fitting:
            break
    else:
        require_fit(needs, board)
    fast = [choice for choice in fitting if choice[1].speed.adapter_tokens_per_s >= USABLE_TOKENS_PER_S]
    usable = fast or [max(fitting, key=lambda choice: choice[1].speed.adapter_tokens_per_s)]
    name, predicted = usable[0]
    setup = f"{name or 'the base as it is'} with a context of {context_length} tokens"
    why = "the best that fits" if fast else f"the fastest that fits, though below {USABLE_TOKENS_PER_S:.0f} tokens/s"
    reason = (
        f"{setup} is {why} on {board.name}: {predicted.kept_mb:.0f} of {predicted.available_mb:.0f} MB, "
        f"about {predicted.speed.adapter_tokens_per_s:.1f} tokens/s with an adapter"
    )
    return BoardChoice(board, [name for name, _ in usable], context_length, reason)


def table(result: Fit) -> list[tuple[str, str]]:
    """The result as rows of label and value, for people."""
    return [
        ("engine", result.engine),
        *((item.name, f"{item.mb:.1f} MB") for item in result.items),
        ("needed", f"{result.needed_mb:.1f} MB"),
        ("needed at least", f"{result.kept_mb:.1f} MB, after the system dropped mapped files"),
        (f"left by {result.device}", f"{result.available_mb:.0f} MB"),
        ("fits", "yes" if result.fits else "no"),
        ("decode, base", f"{result.speed.decode_tokens_per_s:.1f} tokens/s"),
        ("decode, slowest adapter", f"{result.speed.adapter_tokens_per_s:.1f} tokens/s"),
        ("prefill, base", f"{result.speed.prefill_tokens_per_s:.0f} tokens/s"),
    ]


def _remedy(needs: Needs, board: Board, result: Fit) -> str:
    tokens = longest_context(needs, board)
    if tokens >= SHORTEST_CONTEXT:
        return f"set context_length to {tokens} or less, or quantize the base further"
    if result.largest.name.startswith("merged"):
        return "ship fewer merged adapters, or use a board with more memory"
    return "quantize the base further, or use a smaller base or a board with more memory"

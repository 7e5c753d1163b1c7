"""Predicts memory and speed of a base with its adapters on a board, and chooses quantization and context for it.

An MB is 10^6 bytes. docs/boards.md compares predictions with measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import QUANTIZATIONS

from .boards import Board
from .needs import AdapterSize, Needs, estimate_needs, kv_bytes_per_token, lora_size, needs_of_bundle, needs_of_header

__all__ = [
    "AdapterSize",
    "BoardChoice",
    "Fit",
    "Item",
    "Needs",
    "choose",
    "estimate_needs",
    "fit",
    "kv_bytes_per_token",
    "lora_size",
    "needs_of_bundle",
    "needs_of_header",
    "require_fit",
    "table",
]

MB = 10**6
RUNTIME_MB = 48
"""Resident memory of Python 3.11 on x86-64 Linux with numpy, jinja2, llama_cpp and the runtime imported, no model."""

USABLE_TOKENS_PER_S = 5.0
"""About reading speed; a quantization that decodes slower is chosen only if no smaller one is faster."""
CONTEXT_LENGTHS = (1024, 512, 256)
"""Context lengths to choose from, in tokens, the preferred one first."""


@dataclass(frozen=True)
class Item:
    """One part of the memory needed."""

    name: str
    mb: float


@dataclass(frozen=True)
class Fit:
    """The prediction for a board. `adapter_tokens_per_s` is decode speed with the slowest adapter active."""

    device: str
    items: tuple[Item, ...]
    available_mb: float
    decode_tokens_per_s: float
    adapter_tokens_per_s: float
    prefill_tokens_per_s: float

    @property
    def needed_mb(self) -> float:
        """The sum of all items."""
        return sum(item.mb for item in self.items)

    @property
    def fits(self) -> bool:
        """Whether the board leaves enough memory."""
        return self.needed_mb <= self.available_mb

    @property
    def largest(self) -> Item:
        """The largest item."""
        return max(self.items, key=lambda item: item.mb)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "device": self.device,
            "fits": self.fits,
            "items": [{"name": item.name, "mb": round(item.mb, 1)} for item in self.items],
            "needed_mb": round(self.needed_mb, 1),
            "available_mb": round(self.available_mb, 1),
            "decode_tokens_per_s": round(self.decode_tokens_per_s, 1),
            "adapter_tokens_per_s": round(self.adapter_tokens_per_s, 1),
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
        }


@dataclass(frozen=True)
class BoardChoice:
    """The settings for a board; `quantization` is None if the base ships unchanged. `reason` explains them in words."""

    quantization: str | None
    threads: int
    context_length: int
    reason: str


def fit(needs: Needs, board: Board) -> Fit:
    """Compare the memory needed with the memory free on the board, and predict the speed there."""
    items = [
        Item("base weights", needs.base_bytes / MB),
        *(Item(f"adapter {name}", size.file_bytes / MB) for name, size in needs.adapters.items()),
        *(Item(f"merged model {name}", (size + needs.engine_bytes) / MB) for name, size in needs.merged.items()),
        Item(f"keys and values of {needs.context_length} tokens", needs.kv_bytes_per_token * needs.context_length / MB),
        *([Item("saved states", needs.state_bytes / MB)] if needs.state_bytes else []),
        Item("computing", needs.compute_bytes / MB),
        Item("vocabulary", needs.vocabulary_bytes / MB),
        Item("runtime (Python and libraries)", float(RUNTIME_MB)),
    ]
    slowest = max((_adapter_seconds(size, board) for size in needs.adapters.values()), default=0.0)
    seconds = _token_seconds(needs, board)
    body = max(needs.read_parameters - needs.head_parameters, 1)
    return Fit(
        device=board.name,
        items=tuple(items),
        available_mb=board.free_mb,
        decode_tokens_per_s=1 / seconds,
        adapter_tokens_per_s=1 / (seconds + slowest),
        prefill_tokens_per_s=board.compute_gflop_per_s * 1e9 / (2 * body),
    )


def require_fit(needs: Needs, board: Board) -> Fit:
    """`fit`; IncompatibleError with the memory needed and free, and a remedy, if it does not fit."""
    result = fit(needs, board)
    if not result.fits:
        largest = result.largest
        message = (
            f"needs {result.needed_mb:.0f} MB, but {board.name} leaves {result.available_mb:.0f} MB; "
            f"the largest part is {largest.name} with {largest.mb:.0f} MB"
        )
        raise IncompatibleError(message, _remedy(needs, result))
    return result


def choose(
    board: Board,
    header: GgufHeader,
    *,
    adapters: Mapping[str, AdapterSize] | None = None,
    merged: Sequence[str] = (),
    merged_quantization: str | None = None,
    quantization: str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    requantize: bool = True,
) -> BoardChoice:
    """Choose the quantization, context length and threads that a recipe for `board` leaves unset.

    Given values are kept; with `requantize=False` the base ships unchanged. Chooses the best quantization that fits and
    decodes at `USABLE_TOKENS_PER_S` or more, or else the fastest that fits. IncompatibleError if none fits.
    """
    candidates: Sequence[str | None] = [quantization]
    if quantization is None and requantize:
        candidates = [item.name for item in QUANTIZATIONS.values() if item.on_boards]
    fitting: list[tuple[str | None, int, Fit]] = []
    for length in (context_length,) if context_length else CONTEXT_LENGTHS:
        for candidate in candidates:
            needs = needs_of_header(
                header,
                context_length=length,
                quantization=candidate,
                adapters=adapters,
                merged=merged,
                merged_quantization=merged_quantization,
            )
            found = fit(needs, board)
            if found.fits:
                fitting.append((candidate, length, found))
        if fitting:
            break
    if not fitting:
        require_fit(needs, board)
    usable = [choice for choice in fitting if choice[2].adapter_tokens_per_s >= USABLE_TOKENS_PER_S]
    chosen, length, found = usable[0] if usable else max(fitting, key=lambda choice: choice[2].adapter_tokens_per_s)
    what = f"{chosen or 'the base as it is'} with a context of {length} tokens"
    why = "the best that fits" if usable else f"the fastest that fits, though below {USABLE_TOKENS_PER_S:.0f} tokens/s"
    reason = (
        f"{what} is {why} on {board.name}: {found.needed_mb:.0f} of {found.available_mb:.0f} MB, "
        f"about {found.adapter_tokens_per_s:.1f} tokens/s with an adapter"
    )
    return BoardChoice(chosen, threads or board.cores, length, reason)


def table(result: Fit) -> list[tuple[str, str]]:
    """The result as rows of label and value, for people."""
    return [
        *((item.name, f"{item.mb:.1f} MB") for item in result.items),
        ("needed", f"{result.needed_mb:.1f} MB"),
        (f"left by {result.device}", f"{result.available_mb:.0f} MB"),
        ("fits", "yes" if result.fits else "no"),
        ("decode, base", f"{result.decode_tokens_per_s:.1f} tokens/s"),
        ("decode, slowest adapter", f"{result.adapter_tokens_per_s:.1f} tokens/s"),
        ("prefill, base", f"{result.prefill_tokens_per_s:.0f} tokens/s"),
    ]


def _token_seconds(needs: Needs, board: Board) -> float:
    """Time per token with half the context filled: the longer of reading and computing, plus the time per layer."""
    read = needs.read_bytes + needs.kv_bytes_per_token * needs.context_length / 2
    reading = read / (board.bandwidth_gb_per_s * 1e9)
    computing = 2 * needs.read_parameters / (board.compute_gflop_per_s * 1e9)
    return max(reading, computing) + needs.layers * board.layer_us / 1e6


def _adapter_seconds(size: AdapterSize, board: Board) -> float:
    return size.file_bytes / (board.bandwidth_gb_per_s * 1e9) + size.modules * board.adapter_module_us / 1e6


def _remedy(needs: Needs, result: Fit) -> str:
    bytes_per_token = needs.kv_bytes_per_token + needs.scores_bytes_per_token
    without_context = result.needed_mb - bytes_per_token * needs.context_length / MB
    if without_context < result.available_mb:
        tokens = int((result.available_mb - without_context) * MB / bytes_per_token)
        if tokens >= CONTEXT_LENGTHS[-1]:
            return f"set context_length to {tokens} or less, or quantize the base further"
    if result.largest.name.startswith("merged"):
        return "ship fewer merged adapters, or use a board with more memory"
    return "quantize the base further, or use a smaller base or a board with more memory"

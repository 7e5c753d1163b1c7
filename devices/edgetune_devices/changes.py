"""What to change when a bundle does not fit on a board: the cheapest change first, with its effects."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetune_runtime import engines
from edgetune_runtime.engines.needs import MB, Needs
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import QUANTIZATIONS
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.needs import kept_mb
from edgetune_runtime.sizing.options import kv_types, with_kv
from edgetune_runtime.sizing.speed import speed_of

from .boards import Board, load, names
from .needs import needs_of_header

SHORTEST_CONTEXT = 256
"""A shorter context is not proposed: little more than a system prompt fits in it."""
BOARD_QUANTIZATIONS = tuple(item.name for item in QUANTIZATIONS.values() if item.on_boards)
"""The quantizations to choose from for a board, the largest first."""
_STATES_MB = 16
_SMALL_KV = "q8_0"


@dataclass(frozen=True)
class Change:
    """One change: what it costs, the MB that it saves, and memory and speed with it and all changes before it.

    The speed is None if nothing is known of it.
    """

    what: str
    cost: str
    saves_mb: float
    needed_mb: float
    adapter_tokens_per_s: float | None
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {key: round(value, 1) if isinstance(value, float) else value for key, value in asdict(self).items()}


def changes_for(
    needs: Needs,
    board: Board,
    *,
    header: GgufHeader | None = None,
    other: Needs | None = None,
    limit_mb: float | None = None,
    figures: Mapping[str, SpeedFigures] | None = None,
) -> list[Change]:
    """The changes that make it fit, each on top of those before it; all there are if they do not suffice.

    With `header`, the base's, other quantizations are among them; `other` are the needs in another engine that the
    bundle has files for. `limit_mb` is a limit below what the board has free; `figures` are the board's by engine, the
    same for all if None. Empty if it fits as it is.
    """
    figures = dict.fromkeys(engines.names_with_needs(), board.speed) if figures is None else figures
    unlimited, board = board, board if limit_mb is None else board.limited(limit_mb)
    changes: list[Change] = []
    first = needs
    before = kept_mb(needs, repacks=board.repacks)
    if before <= board.free_mb:
        return changes
    for step in (_engine(other), _states, _kv, _context, _quantization(header), _adapters):
        for what, cost, changed in step(needs, board):
            after = kept_mb(changed, repacks=board.repacks)
            if after >= before:
                continue
            fits = after <= board.free_mb
            changes.append(Change(what, cost, before - after, after, _speed(changed, figures), fits))
            needs, before = changed, after
            if fits:
                return changes
    changes.extend(_more_memory(first, unlimited, limit_mb, figures))
    return changes


def _speed(needs: Needs, figures: Mapping[str, SpeedFigures]) -> float | None:
    return speed_of(needs, figures[needs.engine]).adapter_tokens_per_s if needs.engine in figures else None


def longest_context(needs: Needs, board: Board) -> int:
    """The longest context that fits, in tokens, at most that of `needs`; 0 if none does."""

    def kept(tokens: int) -> float:
        return kept_mb(replace(needs, context_length=tokens), repacks=board.repacks)

    return bisect(range(1, needs.context_length + 1), board.free_mb, key=kept)


Step = Iterator[tuple[str, str, Needs]]


def _engine(other: Needs | None) -> Callable[[Needs, Board], Step]:
    def change(_needs: Needs, _board: Board) -> Step:
        if other is not None:
            yield f"use the other engine: --engine {other.engine}", "none: the bundle has both formats", other

    return change


def _states(needs: Needs, _board: Board) -> Step:
    if needs.state_bytes > _STATES_MB * MB:
        cost = "switching to an adapter that was not used last computes its prompt again"
        changed = replace(needs, cache_mb=_STATES_MB)
        yield f"limit saved states: --cache-mb {_STATES_MB}", cost, changed


def _kv(needs: Needs, _board: Board) -> Step:
    if needs.kv != _SMALL_KV and _SMALL_KV in kv_types(needs):
        what = f"store keys and values in 8 bits: --kv {_SMALL_KV}"
        yield what, "slightly other answers", with_kv(needs, _SMALL_KV)


def _context(needs: Needs, board: Board) -> Step:
    tokens = max(longest_context(needs, board), min(SHORTEST_CONTEXT, needs.context_length))
    if tokens < needs.context_length:
        shorter = replace(needs, context_length=tokens)
        yield f"shorten the context: --context-length {tokens}", "shorter prompts and answers", shorter


def _quantization(header: GgufHeader | None) -> Callable[[Needs, Board], Step]:
    def smaller(needs: Needs, board: Board) -> Step:
        if header is None:
            return
        for changed, name in _requantized(needs, header):
            is_enough = kept_mb(changed, repacks=board.repacks) <= board.free_mb
            if is_enough or name == BOARD_QUANTIZATIONS[-1]:
                yield f"build with quantization: {name}", "some quality; trains the adapters again", changed
                return

    return smaller


_WEIGHTS = (
    "base_bytes", "per_layer_bytes", "angle_bytes", "read_bytes", "head_bytes", "main_type", "head_type", "layer_types",
)  # fmt: skip


def _requantized(needs: Needs, header: GgufHeader) -> Iterator[tuple[Needs, str]]:
    """The needs in each smaller quantization that boards use, the largest first."""
    for name in BOARD_QUANTIZATIONS:
        other = needs_of_header(header, context_length=needs.context_length, quantization=name, engine=needs.engine)
        if other.base_bytes < needs.base_bytes:
            weights = {key: getattr(other, key) for key in _WEIGHTS}
            yield replace(needs, **weights), name


def _adapters(needs: Needs, board: Board) -> Step:
    for name in sorted(needs.merged, key=needs.merged.__getitem__, reverse=True):
        left = {other: size for other, size in needs.merged.items() if other != name}
        needs = replace(needs, merged=left)
        yield f"leave out the merged adapter {name}, or build it as a low-rank one", "that task, or some quality", needs
    # Those left out since the last change: alone, one saves nothing if the others still fill `adapters_mb`.
    names: list[str] = []
    for name in sorted(needs.adapters, key=lambda key: needs.adapters[key].file_bytes, reverse=True)[:-1]:
        names.append(name)
        kept = {other: size for other, size in needs.adapters.items() if other not in names}
        changed = replace(needs, adapters=kept)
        if kept_mb(changed, repacks=board.repacks) < kept_mb(needs, repacks=board.repacks):
            adapters, tasks = ("adapter", "that task") if len(names) == 1 else ("adapters", "those tasks")
            yield f"leave out {adapters} {' and '.join(names)}", tasks, changed
            needs, names = changed, []


def _more_memory(
    needs: Needs, board: Board, limit_mb: float | None, figures: Mapping[str, SpeedFigures]
) -> Iterator[Change]:
    """A higher limit, or the same board with more memory, or the smallest other one that fits."""
    is_listed = board.family in names()
    needed = kept_mb(needs, repacks=board.repacks)
    limit = f"raise the limit: --limit-mb {_whole_mib(needed)}" if limit_mb is not None and needed > limit_mb else ""
    if limit and needed <= board.free_mb:
        cost = "memory that other programs cannot have"
        yield Change(limit, cost, 0.0, needed, _speed(needs, figures), fits=True)
        return
    sizes = (load(board.family) if is_listed else board).sizes()
    others = sorted(map(load, names()), key=lambda other: other.ram_free_mib)
    for other in [*sizes, *others]:
        needed = kept_mb(needs, repacks=other.repacks)
        if needed <= other.free_mb and other.ram_mib > board.ram_mib:
            is_same = other.family == board.family
            named = other.name if is_listed or not is_same else f"--ram-mib {other.ram_mib}"
            what = f"use a board with more memory: {named}" + (f", and {limit}" if limit else "")
            speed = _speed(needs, figures) if is_same else speed_of(needs, other.speed).adapter_tokens_per_s
            yield Change(what, "another board, no other change", 0.0, needed, speed, fits=True)
            return


def _whole_mib(mb: float) -> int:
    """MB (10^6 bytes), rounded up so that at least `mb` are left when the limit is cut to whole MiB (2^20 bytes)."""
    return math.ceil(math.ceil(mb * 1e6 / 2**20) * 2**20 / 1e6)

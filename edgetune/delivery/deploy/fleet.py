"""Runs a deploy on several boards in parallel, and goes on when one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from .deploy import Outcome
from .target import Target


@dataclass(frozen=True)
class Failed(Outcome):
    """The error of an action on one board, without the board's name."""

    error: str

    def __str__(self) -> str:
        return f"{self.target}: failed"


def on_each(targets: Sequence[Target], parallel: int, act: Callable[[Target], Outcome]) -> Iterator[Outcome]:
    """The outcome of `act` on each board, in the order in which they end; at most `parallel` at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        started = {pool.submit(act, target): target for target in targets}
        try:
            for future in as_completed(started):
                target, error = started[future], future.exception()
                text = str(error).removeprefix(f"{target}: ")
                yield future.result() if error is None else Failed(target, text)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

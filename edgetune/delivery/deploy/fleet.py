"""Runs a deploy on several boards in parallel, and goes on when one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from .target import Target

T = TypeVar("T")


def on_each(
    targets: Sequence[Target], parallel: int, act: Callable[[Target], T]
) -> Iterator[tuple[Target, T | Exception]]:
    """What `act` returns or raises for each board, in the order in which they end; at most `parallel` at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        started: dict[Future[T], Target] = {pool.submit(act, target): target for target in targets}
        try:
            for done in as_completed(started):
                try:
                    yield started[done], done.result()
                except Exception as error:
                    yield started[done], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

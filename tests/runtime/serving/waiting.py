"""Runtimes that are closed at the end of a test, and calls that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime


@contextmanager
def opening(bundle: Path, engine: str, **defaults: Any) -> Iterator[Callable[..., Runtime]]:  # noqa: ANN401
    """A function that opens the bundle, or another one, with options of `Runtime.open`."""
    opened: list[Runtime] = []

    def make(other: Path = bundle, **options: Any) -> Runtime:  # noqa: ANN401 - those of Runtime.open
        opened.append(Runtime.open(other, **{"engine": engine, "disk_mb": 0, **defaults, **options}))
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def is_waiting(future: Future[Any]) -> bool:
    """Whether it has not ended after a while."""
    with pytest.raises(NotYet):
        future.result(0.2)
    return True

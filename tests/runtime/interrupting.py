"""Interrupts a call as Ctrl-C does, at each place where Python looks for signals."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

MODULES = ("adapters.py", "places.py", "pool.py", "threading.py")
"""Those whose functions are interrupted."""


def enter_until(place: int, manager: Callable[[], AbstractContextManager[object]]) -> bool:
    """Enter a block, and interrupt that at the place with this number; False if there are not so many.

    Python looks for signals where a function begins or has returned.
    """
    left = place

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        # A profiler, unlike signals, also sees that a generator has yielded.
        is_yield = event == "return" and frame.f_code.co_flags & inspect.CO_GENERATOR
        if event != "c_call" and not is_yield and Path(frame.f_code.co_filename).name in MODULES:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(interrupt)
        with manager():
            sys.setprofile(None)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left < 0

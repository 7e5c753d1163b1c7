"""Keeps llama.cpp's computing on threads of its own where it uses AMX, whose tiles other libraries reconfigure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from edgetune_runtime.threads.priority import NORMAL, ComputeThreads

from .ggml import cpu_backend
from .llama import end_callers_threads, end_threads, library

T = TypeVar("T")


class _Partner(threading.local):
    """The thread that computes for the current one; it ends with it."""

    thread: ComputeThreads | None = None


_partner = _Partner()


def compute(function: Callable[[], T]) -> T:
    """Run a function that computes with llama.cpp; returns or raises what it does.

    ggml configures the tiles of a thread once (`ggml_tile_config_init`), while oneDNN, which computes for torch,
    releases them after each call. On one thread, ggml's next call would be an illegal instruction.
    The threads that torch's operations left to the current thread are ended: see `end_threads_function`.
    """
    if not _uses_amx():
        return function()
    end_callers_threads()
    if _partner.thread is None:
        _partner.thread = ComputeThreads(NORMAL)
    return _partner.thread.run(function)


@cache
def _uses_amx() -> bool:
    return any(feature.startswith("AMX") for feature in cpu_backend(library()).features)


def _end_partners_threads() -> None:
    """End the threads of the partner too, before its process is forked: the new one would count them."""
    if _partner.thread is not None:
        _partner.thread.run(end_threads())


def _forget() -> None:
    """A forked process has none of the threads."""
    global _partner  # noqa: PLW0603 - the variable of the module is what is replaced
    _partner = _Partner()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_partners_threads, after_in_child=_forget)

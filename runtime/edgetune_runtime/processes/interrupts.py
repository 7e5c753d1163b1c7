"""What signals do to command-line tools: end them in order, also in the background, or wait where that would harm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def end_on_interrupt() -> None:
    """Make SIGINT raise KeyboardInterrupt if this process was started with SIGINT ignored.

    Shells without job control start background jobs that way, and Python keeps ignoring the signal. Existing handlers
    are kept. Does nothing outside the main thread, where no handler can be set.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_on_termination() -> None:
    """Interrupt this process, as Ctrl-C does, on SIGTERM and when its terminal is closed.

    Signals that have a handler, or are ignored as by nohup, keep that. Does nothing outside the main thread
    or on Windows.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]

    def interrupt(*_: object) -> None:
        # A closed terminal sends SIGHUP twice; the second one must not interrupt saving.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        for descriptor in terminals:
            # Writing to a closed terminal is an error.
            if not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        signal.raise_signal(signal.SIGINT)

    for number in numbers:
        signal.signal(number, interrupt)


def end_in_order() -> None:
    """Go on when the terminal is closed, and undo what is half done on SIGTERM as on Ctrl-C.

    A unit that was stopped while a new version is asked must run again. Unix only.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Run the block without interrupts by SIGINT; one that came meanwhile takes effect after it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        # Only the main thread is interrupted.
        yield
        return
    held = list[tuple[Any, ...]]()
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])

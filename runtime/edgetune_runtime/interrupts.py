"""Ctrl-C for command-line tools that were started with SIGINT ignored."""

from __future__ import annotations

import signal
import threading


def end_on_interrupt() -> None:
    """Let SIGINT raise KeyboardInterrupt again where this process was started with it ignored.

    Shells without job control start background jobs so, and Python leaves it ignored. Handlers that were set are kept,
    and nothing is done outside the main thread, where none can be set.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""Make Ctrl-C work in command-line tools that were started with SIGINT ignored."""

from __future__ import annotations

import signal
import threading


def end_on_interrupt() -> None:
    """Make SIGINT raise KeyboardInterrupt if this process was started with SIGINT ignored.

    Shells without job control start background jobs that way, and Python keeps ignoring the signal. Existing handlers
    are kept. Does nothing outside the main thread, where no handler can be set.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

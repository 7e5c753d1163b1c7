"""Calls that train or export take turns in a process, with torch's default settings, and restore those of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

_TURN = RLock()


@contextmanager
def own_process_state(say: Callable[[str], None]) -> Iterator[None]:
    """Tell `say` and wait if another thread is in such a block, then run the block as in a new process.

    torch's seed and default dtype, and how models are made without weights, are the same for all threads. At the end,
    also of a block that raises, the settings and the seed of torch and the logging of transformers are as before.
    """
    if not _TURN.acquire(blocking=False):
        say("waiting for another call in this process, which trains or exports")
        _TURN.acquire()
    try:
        with _default_torch(), _same_logging():
            yield
    finally:
        _TURN.release()


@contextmanager
def _default_torch() -> Iterator[None]:
    import torch  # noqa: PLC0415 - only when training or exporting

    # Saving the state of a GPU would start CUDA, which takes memory there.
    has_started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    seeded = range(torch.cuda.device_count()) if has_started else ()
    with ExitStack() as stack:
        # In effect, it would slow each call of torch down.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(seeded))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def _same_logging() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415 - as above
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging  # noqa: PLC0415

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    switch_hub = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
        # Which also switched those of the hub.
        switch_hub()

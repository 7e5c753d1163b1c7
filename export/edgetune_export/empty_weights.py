"""Makes models whose parameters need no memory, in the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from unittest.mock import patch

from torch import nn

_TURN = RLock()
"""Patches of two threads that overlap would leave torch patched."""


@contextmanager
def empty_weights() -> Iterator[None]:
    """Put the parameters of modules that this thread makes on the meta device; buffers have their values.

    accelerate's `init_empty_weights` would do so to the modules of all threads. Waits while another thread
    is in such a block.
    """
    with _TURN:
        register, own_thread = nn.Module.register_parameter, get_ident()

        def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and get_ident() == own_thread:
                parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                # So that transformers spends no time on random values for it.
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            register(module, name, parameter)

        with patch.object(nn.Module, "register_parameter", register_empty):
            yield

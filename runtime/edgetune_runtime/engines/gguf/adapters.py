"""The adapters loaded on one model of llama.cpp: its contexts share them while others are loaded and freed."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_runtime.engines.base import check_scales, prefix_among
from edgetune_runtime.errors import IncompatibleError

from .llama import last_errors, library
from .state import PrefixState

_MAX_CHOICES = 256

_Set = tuple[tuple[str, float], ...]


class _Choice(NamedTuple):
    """The arguments of llama.cpp's switch call for a set of adapters, and the prefix among them."""

    adapters: Mapping[str, float]
    prefix: PrefixState | None
    pointers: Any
    scales: Any


class GgufAdapters:
    """LoRA files and prefixes, by name. Thread-safe.

    In its first step after a switch, a context reads the list of all LoRA files that are loaded on its model, so none
    is loaded or freed while one is `in_first_step`.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a bare pointer
        self._model = model
        self._files: dict[str, Any] = {}
        self._prefixes: dict[str, PrefixState] = {}
        self._loaded: Mapping[str, Any] = ChainMap(self._files, self._prefixes)
        self._choices: dict[_Set, _Choice] = {}
        self._active: dict[Any, _Choice] = {}
        # Not entered through the condition, whose `__enter__` may be interrupted by Ctrl-C when it has the lock.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._first_steps: set[object] = set()
        # Looked up once: at a switch, the processor's caches are cold and each lookup counts.
        self._switch = library().llama_set_adapters_lora

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def load_file(self, name: str, path: Path) -> None:
        """Load a LoRA file that `check_adapter` has accepted; IncompatibleError if llama.cpp refuses it."""
        with self._lock:
            self._wait_for_first_steps()
            last_errors()
            adapter = library().llama_adapter_lora_init(self._model, os.fsencode(path))
            if not adapter:
                message = f"llama.cpp cannot load adapter {name!r}: {last_errors()}"
                raise IncompatibleError(message, "export it again for this base")
            self._files[name] = adapter

    def add_prefix(self, name: str, prefix: PrefixState) -> None:
        """Keep a prefix that a context of this model has accepted."""
        self._prefixes[name] = prefix

    def unload(self, name: str) -> None:
        """Free an adapter; contexts that have it set, and compute nothing, have the plain base from then on."""
        with self._lock:
            self._wait_for_first_steps()
            self._prefixes.pop(name, None)
            adapter = self._files.pop(name, None)
            self._choices = {key: choice for key, choice in self._choices.items() if name not in choice.adapters}
            if adapter is None:
                return
            for context in [context for context, choice in self._active.items() if name in choice.adapters]:
                self._switch(context, None, 0, None)
                del self._active[context]
            library().llama_adapter_lora_free(adapter)

    def switch(self, context: Any, adapters: Mapping[str, float]) -> PrefixState | None:  # noqa: ANN401 - as above
        """Set exactly these adapters with their scales in a context; returns the prefix among them."""
        key = tuple(adapters.items())
        with self._lock:
            choice = self._choices.get(key)
            if choice is None:
                if len(self._choices) >= _MAX_CHOICES:
                    self._choices.clear()
                choice = self._choices[key] = self._choice_of(adapters)
            self._active[context] = choice
            self._switch(context, choice.pointers, len(choice.scales), choice.scales)
        return choice.prefix

    def prefix_among(self, adapters: Mapping[str, float]) -> PrefixState | None:
        """The active prefix among the adapters; same errors as the function of this name."""
        name = prefix_among(adapters, self._prefixes)
        return self._prefixes[name] if name else None

    @contextmanager
    def in_first_step(self) -> Iterator[None]:
        """While the block runs, none is loaded or freed; blocks of several threads run at the same time."""
        step = object()
        try:
            with self._lock:
                self._first_steps.add(step)
            yield
        finally:
            with self._lock:
                self._first_steps.discard(step)
                self._changed.notify_all()

    def forget(self, context: Any) -> None:  # noqa: ANN401 - as above
        """Know nothing more of a context, which is freed next."""
        with self._lock:
            self._active.pop(context, None)

    def close(self) -> None:
        """Free all, after all contexts."""
        for adapter in self._files.values():
            library().llama_adapter_lora_free(adapter)
        self._files.clear()

    def _wait_for_first_steps(self) -> None:
        while self._first_steps:
            self._changed.wait()

    def _choice_of(self, adapters: Mapping[str, float]) -> _Choice:
        check_scales(adapters, self._loaded)
        prefix = self.prefix_among(adapters)
        added = {name: scale for name, scale in adapters.items() if name not in self._prefixes}
        pointers = (library().llama_adapter_lora_p_ctypes * len(added))(*(self._files[name] for name in added))
        return _Choice(dict(adapters), prefix, pointers, (ctypes.c_float * len(added))(*added.values()))

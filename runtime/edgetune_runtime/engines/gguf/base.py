"""A loaded GGUF base that several engines share, and a tokenizer that is loaded without weights."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.base import check_context_length
from edgetune_runtime.formats.gguf_base import check_vocabulary, read_base
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader, read_header

from .adapters import GgufAdapters
from .llama import Vocabulary, library, load_model

_FEATURES = (b"AVX2 = 1", b"DOTPROD = 1")


class GgufTokenizer(Vocabulary):
    """The tokenizer of a GGUF file, loaded without its weights."""

    def __init__(self, path: Path) -> None:
        check_vocabulary(read_header(path), path)
        model = load_model(path, vocabulary_only=True)
        self._free = weakref.finalize(self, library().llama_model_free, model)
        self._free.atexit = False
        super().__init__(model)

    def close(self) -> None:
        """Free the vocabulary. A second call does nothing; any other call afterwards raises UsageError."""
        super().close()
        self._free()


class GgufBase:
    """A loaded GGUF base and its adapters, shared by the engines on it and freed with the last of them."""

    def __init__(self, path: Path, context_length: int, repack: bool | None) -> None:
        self.header = read_base(path)
        self.repacks = _can_repack(self.header) if repack is None else repack
        # Repacked weights beside a mapped file would take twice the memory. But the per-layer embedding of Gemma 4,
        # half of its file, is only read row by row, and should stay in the file.
        mapped = not self.repacks or PER_LAYER_EMBEDDING in self.header.tensors
        self.model = load_model(path, repack=self.repacks, mapped=mapped)
        self.adapters = GgufAdapters(self.model)
        self._free = weakref.finalize(self, _free_base, self.adapters, self.model)
        self._free.atexit = False
        check_context_length(context_length, library().llama_model_n_ctx_train(self.model))
        self.vocabulary = Vocabulary(self.model)


def _can_repack(header: GgufHeader) -> bool:
    """Whether llama.cpp has faster code with repacked weights for this processor and base."""
    features = library().llama_print_system_info()
    return header.main_type.repacked and any(name in features for name in _FEATURES)


def _free_base(adapters: GgufAdapters, model: Any) -> None:  # noqa: ANN401 - a bare pointer
    adapters.close()
    library().llama_model_free(model)

"""GGUF file in, loaded base or tokenizer out: what the engines on one base share, freed with the last of them."""

from __future__ import annotations

import weakref
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.base import check_trained
from edgetune_runtime.formats.gguf_file import GgufHeader, describe_quantization, read_header

from .llama import Vocabulary, library, load_model
from .state import PrefixState

_REPACKED = ("q4_0", "q4_k", "iq4_nl")
"""Types that `ggml-cpu/repack.cpp` has code for on x86 and on ARM."""
_FEATURES = (b"AVX2 = 1", b"DOTPROD = 1")


class GgufTokenizer(Vocabulary):
    """The tokenizer of a GGUF file, read without its weights."""

    def __init__(self, path: Path) -> None:
        read_header(path)
        model = load_model(path, vocabulary_only=True)
        self._free = weakref.finalize(self, library().llama_model_free, model)
        super().__init__(model)

    def close(self) -> None:
        """Free the vocabulary; a second call does nothing, any other is a UsageError."""
        super().close()
        self._free()


class GgufBase:
    """A loaded GGUF base with its adapters, which the engines on it share; freed with the last of them."""

    def __init__(self, path: Path, context_length: int, repack: bool | None) -> None:
        self.header = read_header(path)
        self.repacked = _gains(self.header) if repack is None else repack
        self.model = load_model(path, vocabulary_only=False, repack=self.repacked)
        self.adapters: dict[str, Any] = {}
        self.prefixes: dict[str, PrefixState] = {}
        self.loaded: Mapping[str, Any] = ChainMap(self.adapters, self.prefixes)
        self._free = weakref.finalize(self, _free_base, self.adapters, self.model)
        check_trained(context_length, library().llama_model_n_ctx_train(self.model))
        self.vocabulary = Vocabulary(self.model)


def _gains(header: GgufHeader) -> bool:
    """Whether llama.cpp has code for this processor and base that is faster with repacked weights."""
    features = library().llama_print_system_info()
    return describe_quantization(header) in _REPACKED and any(name in features for name in _FEATURES)


def _free_base(adapters: dict[str, Any], model: Any) -> None:  # noqa: ANN401 - bare pointers
    llama = library()
    for adapter in adapters.values():
        llama.llama_adapter_lora_free(adapter)
    adapters.clear()
    llama.llama_model_free(model)

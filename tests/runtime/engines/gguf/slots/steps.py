"""A context of a model, with or without slots, that decodes rows of several sequences: what the tests compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_runtime.engines.gguf.llama import decode_batch, library, load_model, make_context
from edgetune_runtime.engines.gguf.slots import SlotModel, compose
from edgetune_runtime.engines.gguf.slots.factors import read_factors
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header

SEQUENCES = 64
TOKENS = [20, 31, 7, 45, 66, 12, 9, 80, 33, 21]
OTHERS = [5, 90, 17, 44, 8, 61, 30, 2]


class Steps:
    """A context of 256 tokens; `slots` is the model, if it has slots."""

    def __init__(
        self,
        pointer: Any,  # noqa: ANN401 - a bare pointer
        slots: SlotModel | None = None,
        kv: str = "f16",
    ) -> None:
        self._slots, llama = slots, library()
        self.context = make_context(pointer, 256, 1, batch=SEQUENCES, sequences=SEQUENCES, kv=kv)
        self.memory = llama.llama_get_memory(self.context)
        vocabulary = llama.llama_model_get_vocab(pointer)
        self._width: int = llama.llama_vocab_n_tokens(vocabulary)

    def decode(
        self, tokens: Sequence[int], sequence: int = 0, slot: int = 0, start: int = 0, *, begins: bool = False
    ) -> np.ndarray:
        """Logits after each token of one sequence; `begins`: its adapter acts from the first of them on."""
        return self.batch({sequence: (tokens, slot, start)}, begins=begins)[0]

    def batch(self, rows: Mapping[int, tuple[Sequence[int], int, int]], *, begins: bool = False) -> list[np.ndarray]:
        """Logits after each token of several sequences in one batch; for each its tokens, slot and start."""
        all_tokens: list[int] = []
        for tokens, slot, start in rows.values():
            begin = begins or start == 0
            all_tokens += self._slots.tokens_for(slot, tokens, begins=begin) if self._slots else tokens
        positions = [start + n for tokens, _, start in rows.values() for n in range(len(tokens))]
        members = [(sequence,) for sequence, (tokens, _, _) in rows.items() for _ in tokens]
        assert decode_batch(self.context, all_tokens, positions, members, [True] * len(all_tokens)) == 0
        pointer = library().llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, (len(all_tokens), self._width)).copy()
        return np.split(logits, np.cumsum([len(tokens) for tokens, _, _ in rows.values()])[:-1])

    def drop(self, sequence: int = 0) -> None:
        """Forget a sequence."""
        library().llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def save(self, sequence: int = 0) -> bytes:
        """The state of a sequence."""
        llama = library()
        state = (llama.ctypes.c_uint8 * llama.llama_state_seq_get_size(self.context, sequence))()
        assert llama.llama_state_seq_get_data(self.context, state, len(state), sequence) == len(state)
        return bytes(state)

    def restore(self, state: bytes | bytearray, sequence: int = 0) -> None:
        """Replace a sequence by a saved one."""
        llama = library()
        data = (llama.ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama.llama_state_seq_set_data(self.context, data, len(state), sequence) == len(state)

    def close(self) -> None:
        """Free the context."""
        library().llama_free(self.context)


def fill(model: SlotModel, base: Path, slot: int, adapter: Path, scale: float = 1.0) -> None:
    """Write the adapter in a file to a slot."""
    model.write(slot, read_factors(adapter, checked(base), "a", scale, np.float32))


def checked(path: Path) -> GgufHeader:
    """The header of a base."""
    header = read_header(path)
    check_base(header, path)
    return header


@contextmanager
def with_slots(
    path: Path, slots: int = 3, rank: int = 8, *, dtype: str = "f32", repack: bool = False, kv: str = "f16"
) -> Iterator[tuple[SlotModel, Steps]]:
    """The base with slots, and a context of it."""
    model = compose(path, checked(path), slots, rank, dtype=dtype, repack=repack)
    steps = Steps(model.pointer, model, kv)
    try:
        yield model, steps
    finally:
        steps.close()
        model.close()


@contextmanager
def plain(
    path: Path, adapters: Mapping[Path, float] | None = None, *, repack: bool = False, kv: str = "f16"
) -> Iterator[Steps]:
    """The base as llama.cpp opens it, with adapters as `llama_set_adapters_lora` applies them."""
    llama = library()
    model = load_model(path, vocabulary_only=False, repack=repack)
    loaded = [llama.llama_adapter_lora_init(model, str(file).encode()) for file in adapters or {}]
    steps = Steps(model, kv=kv)
    pointers = (llama.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
    scales = (llama.ctypes.c_float * len(loaded))(*(adapters or {}).values())
    llama.llama_set_adapters_lora(steps.context, pointers, len(loaded), scales)
    try:
        yield steps
    finally:
        steps.close()
        for adapter in loaded:
            llama.llama_adapter_lora_free(adapter)
        llama.llama_model_free(model)

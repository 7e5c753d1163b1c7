"""All calls of llama_cpp that load models, make contexts, decode batches and tokenize."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, VerificationError, importing
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.text.chat import render
from edgetune_runtime.text.controls import ControlTokens
from edgetune_runtime.threads.machine import was_forked

from .ggml import end_threads_function, load_backends
from .log import LlamaLog

_SPM_VOCABULARY = 1
_UNKNOWN_OR_CONTROL = 1 | 8
"""Bits of llama_token_attr: tokens that are parsed only where control tokens are."""
_INSTALL = (
    '"edgetune-runtime[gguf]", which needs a C++ compiler '
    "(apt install g++ under Debian, xcode-select --install under macOS)"
)

_LOG = LlamaLog()


@cache
def library() -> Any:  # noqa: ANN401 - a module of ctypes functions
    """The llama_cpp module, which logs to `logging`; if it is missing, IncompatibleError names the install command."""
    with importing("GGUF bundles need", _INSTALL):
        import llama_cpp  # noqa: PLC0415 - heavy and optional
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    load_backends(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def end_threads() -> Callable[[], object]:
    """A function that ends the threads which were kept for the steps of the calling thread."""
    return end_threads_function(library())


def end_callers_threads() -> None:
    """End the threads that other libraries or the loading of weights left to the calling thread.

    Not on the thread that a fork left before llama.cpp was loaded: its threads are gone, and would be waited for.
    """
    if threading.current_thread() is not _left_by_fork():
        end_threads()()


@cache
def _left_by_fork() -> threading.Thread | None:
    # A fork after this was called ends threads before: see `end_threads_function`.
    end_threads()
    return threading.main_thread() if was_forked() else None


@cache
def _log_callback(llama_cpp: Any) -> Any:  # noqa: ANN401 - as above; cached because C code keeps a bare pointer to it
    return llama_cpp.llama_log_callback(_LOG.write)


def last_errors() -> str:
    """The errors that llama.cpp logged since the last call, in one line."""
    return _LOG.take_errors() or "llama.cpp gave no reason"


def load_model(
    path: Path,
    *,
    vocabulary_only: bool = False,
    repack: bool = False,
    mapped: bool = True,
) -> Any:  # noqa: ANN401 - a bare pointer
    """Map a GGUF file that `gguf_base` has checked, or read it into memory; with `repack`, matrices are arranged in
    memory for this processor.

    VerificationError if llama.cpp refuses the file. The caller must free the model.
    """
    llama = library()
    params = llama.llama_model_default_params()
    params.vocab_only = vocabulary_only
    params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mapped else llama.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = repack
    # A host with a GPU must compute the same numbers as the board.
    params.n_gpu_layers = 0
    last_errors()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    # Where weights are arranged for AMX, threads of OpenMP do it.
    end_callers_threads()
    if not model:
        message = f"llama.cpp cannot load {path}: {last_errors()}"
        raise VerificationError(message, "check the file, or update llama-cpp-python")
    return model


def check_loads(path: Path) -> None:
    """Map a GGUF file that `gguf_base` has checked, and free it again; errors as in `load_model`."""
    library().llama_model_free(load_model(path))


def make_context(
    model: Any,  # noqa: ANN401 - a bare pointer
    context_length: int,
    threads: int,
    *,
    batch: int,
    kv: str,
    sequences: int = 1,
    outputs: int = 1,
    rollback: int = 0,
) -> Any:  # noqa: ANN401 - as above
    """A context for `context_length` tokens in `sequences` sequences, with up to `outputs` rows of logits per batch.

    It keeps the recurrent states before the last `rollback` tokens. IncompatibleError if llama.cpp cannot make it.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = batch
    params.n_seq_max, params.n_outputs_max = sequences, outputs
    params.n_rs_seq = rollback
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = TENSOR_TYPES[kv].number
    # Flash attention takes a third more time than plain attention for a short message after a long state, but
    # llama.cpp needs it for quantized values.
    params.flash_attn_type = (
        llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if kv == "f16" else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
    # One KV buffer for all sequences, so that branches share the cells of the sequence that they start from.
    params.kv_unified = True
    # Keep all cells of sliding-window layers, so that the sequence can be truncated to an earlier position.
    params.swa_full = True
    params.offload_kqv = params.op_offload = False
    last_errors()
    context = llama.llama_init_from_model(model, params)
    if not context:
        message = f"llama.cpp cannot make a context of {context_length} tokens: {last_errors()}"
        remedy = "open the bundle with a smaller context_length" if kv == "f16" else "open the bundle with kv f16"
        raise IncompatibleError(message, remedy)
    return context


class StopFlag:
    """Tells llama.cpp to stop the running batch; llama.cpp checks after each operation of the graph."""

    def __init__(self, context: Any) -> None:  # noqa: ANN401 - a bare pointer
        # The abort callback is strlen on a buffer: not empty means stop. A Python callback costs 6 % of the speed.
        self._text = ctypes.create_string_buffer(2)
        libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
        self._callback = ctypes.cast(libc.strlen, library().ggml_abort_callback)
        library().llama_set_abort_callback(context, self._callback, ctypes.addressof(self._text))

    def set(self) -> None:
        """Stop the running batch."""
        _LOG.stopping.add(id(self))
        self._text.raw = b"\x01\x00"

    def clear(self) -> None:
        """Allow the next batch."""
        _LOG.stopping.discard(id(self))
        self._text.raw = b"\x00\x00"


def decode_batch(
    context: Any,  # noqa: ANN401 - as above
    tokens: Sequence[int],
    positions: Sequence[int],
    sequences: Sequence[tuple[int, ...]],
    outputs: Sequence[bool],
) -> int:
    """Decode tokens, each in one or more sequences, with logits where `outputs` is true; returns llama.cpp's result."""
    llama = library()
    count = len(tokens)
    members = {ids: (ctypes.c_int32 * len(ids))(*ids) for ids in set(sequences)}
    pointer = ctypes.POINTER(ctypes.c_int32)
    batch = llama.llama_batch(
        n_tokens=count,
        token=(ctypes.c_int32 * count)(*tokens),
        pos=(ctypes.c_int32 * count)(*positions),
        n_seq_id=(ctypes.c_int32 * count)(*map(len, sequences)),
        seq_id=(pointer * count)(*(ctypes.cast(members[ids], pointer) for ids in sequences)),
        logits=(ctypes.c_int8 * count)(*outputs),
    )
    result: int = llama.llama_decode(context, batch)
    return result


class Vocabulary(Tokenizer):
    """The tokenizer of a loaded model; `pointer` is llama.cpp's."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a bare pointer
        llama = library()
        self._model = model
        self.pointer = llama.llama_model_get_vocab(model)
        self.vocab_size = llama.llama_vocab_n_tokens(self.pointer)
        bos: int = llama.llama_vocab_bos(self.pointer)
        self._eos: int = llama.llama_vocab_eos(self.pointer)
        self.bos = self._text(bos)
        self.eos = self._text(self._eos)
        template = llama.llama_model_chat_template(model, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None
        self._added_bos = [bos] if bos >= 0 and llama.llama_vocab_get_add_bos(self.pointer) else []
        self._newline = llama.llama_vocab_nl(self.pointer)
        spm = llama.llama_vocab_type(self.pointer) == _SPM_VOCABULARY
        self._adds_space = spm and self.piece(self._raw("a")[0]).startswith(b" ")
        self._end_token: int | None = None

    @property
    def end_token(self) -> int:
        """The end-of-turn token, or the end-of-text token if there is none."""
        # No cached_property, which in Python 3.11 holds a lock of all instances while it renders the template.
        if self._end_token is None:
            self._end_token = self._find_end_token()
        return self._end_token

    def _find_end_token(self) -> int:
        # llama.cpp guesses EOT from token texts and may return end-of-text instead; the chat template is reliable.
        for token in self._after_answer():
            if self.is_end(token):
                return token
        eot: int = library().llama_vocab_eot(self.pointer)
        return self._eos if eot < 0 or (self._eos >= 0 and self.is_end(self._eos)) else eot

    @cached_property
    def controls(self) -> ControlTokens:
        """The control tokens."""
        self._check()
        attributes = library().llama_vocab_get_attr
        tokens = (token for token in range(self.vocab_size) if attributes(self.pointer, token) & _UNKNOWN_OR_CONTROL)
        return ControlTokens(map(self._text, tokens))

    def piece(self, token: int) -> bytes:
        """The bytes of `token`; empty for control tokens."""
        self._check(token)
        llama = library()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written: int = llama.llama_token_to_piece(self.pointer, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    def pieces(self) -> list[bytes]:
        """The bytes of every token, as `piece` gives them."""
        self._check()
        convert, vocab, size = library().llama_token_to_piece, self.pointer, 256
        # A buffer per token would take most of the time.
        buffer = ctypes.create_string_buffer(size)
        pieces = []
        for token in range(self.vocab_size):
            written: int = convert(vocab, token, buffer, size, 0, False)
            pieces.append(ctypes.string_at(buffer, written) if written >= 0 else self.piece(token))
        return pieces

    def is_end(self, token: int) -> bool:
        """Whether generation ends with `token`."""
        self._check(token)
        return bool(library().llama_vocab_is_eog(self.pointer, token))

    def ends(self) -> list[int]:
        """All tokens that generation ends with, in order."""
        self._check()
        is_end, vocab = library().llama_vocab_is_eog, self.pointer
        return [token for token in range(self.vocab_size) if is_end(vocab, token)]

    def _after_answer(self) -> list[int]:
        """The tokens that the chat template adds after an assistant's answer; none if it cannot render one."""
        if self.chat_template is None:
            return []
        answer = "edgetune"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = render(self.chat_template, messages, add_generation_prompt=False, bos=self.bos, eos=self.eos)
        except EdgetuneError:
            return []
        return self._raw(text.rpartition(answer)[2])

    def _raw(self, text: str) -> list[int]:
        self._check()
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * size)()
            count: int = library().llama_tokenize(self.pointer, data, len(data), tokens, size, False, True)
            if count >= 0:
                return tokens[:count]
            size = -count

    def _text(self, token: int) -> str:
        text = library().llama_vocab_get_text(self.pointer, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

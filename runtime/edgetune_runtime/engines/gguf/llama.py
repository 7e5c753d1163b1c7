"""llama.cpp's library in, its tokenizer and models out: what every call into llama_cpp shares."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune_runtime.text.chat import render

from .log import LlamaLog

_SPM_VOCABULARY = 1
_INSTALL = (
    'run: pip install "edgetune-runtime[gguf]", which needs a C++ compiler '
    "(Debian: apt install g++, macOS: xcode-select --install)"
)

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}
"""Bytes of a key's or a value's number in each form that a context may keep them in."""

_LOG = LlamaLog()


@cache
def library() -> Any:  # noqa: ANN401 - a module of ctypes functions
    """The llama_cpp module, which logs to `logging`; IncompatibleError that says what to install when it is missing."""
    try:
        import llama_cpp  # noqa: PLC0415 - heavy and optional
    except ImportError as error:
        raise IncompatibleError("GGUF bundles need llama-cpp-python, which is not installed", _INSTALL) from error
    except (OSError, RuntimeError) as error:
        raise IncompatibleError(f"llama-cpp-python does not load: {error}", _INSTALL) from error
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _log_callback(llama_cpp: Any) -> Any:  # noqa: ANN401 - as above; cached because C code keeps a bare pointer to it
    return llama_cpp.llama_log_callback(_LOG.write)


def last_errors() -> str:
    """What llama.cpp logged as errors since the last call, in one line."""
    return _LOG.take_errors() or "llama.cpp gave no reason"


def load_model(path: Path, *, vocabulary_only: bool, repack: bool = False) -> Any:  # noqa: ANN401 - a bare pointer
    """Map a GGUF file that `read_header` has checked, or with `repack` read it into memory, as this processor likes it.

    VerificationError if llama.cpp refuses it. Free it after use.
    """
    llama = library()
    params = llama.llama_model_default_params()
    params.vocab_only = vocabulary_only
    # Repacked weights beside a mapped file would double what a board needs: it is one or the other.
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE if repack else llama.LLAMA_LOAD_MODE_MMAP
    params.use_extra_bufts = repack
    # A host with a GPU has to give the numbers that the board gives.
    params.n_gpu_layers = 0
    last_errors()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        message = f"llama.cpp cannot load {path}: {last_errors()}"
        raise VerificationError(message, "check the file, or update llama-cpp-python")
    return model


def make_context(
    model: Any,  # noqa: ANN401 - a bare pointer
    context_length: int,
    threads: int,
    *,
    batch: int,
    sequences: int,
    kv: str,
) -> Any:  # noqa: ANN401 - as above
    """A context for so many tokens and sequences, and batches of that size; IncompatibleError if there is none."""
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = batch
    params.n_seq_max = params.n_outputs_max = sequences
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}[kv]
    # Flash attention costs a message of a few tokens behind a long state a third more time than plain attention does.
    # Without it llama.cpp keeps no quantized values.
    params.flash_attn_type = (
        llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if kv == "f16" else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
    # One buffer for all sequences: branches share the cells of the sequence that they start from.
    params.kv_unified = True
    # A sliding window that forgets cannot be trimmed back to an earlier position.
    params.swa_full = True
    params.offload_kqv = params.op_offload = False
    last_errors()
    context = llama.llama_init_from_model(model, params)
    if not context:
        message = f"no context of {context_length} tokens: {last_errors()}"
        remedy = "open the bundle with a shorter context" if kv == "f16" else "open the bundle with kv f16"
        raise IncompatibleError(message, remedy)
    return context


class StopFlag:
    """Tells llama.cpp to end the batch that it computes; it looks after each operation of the graph."""

    def __init__(self, context: Any) -> None:  # noqa: ANN401 - a bare pointer
        # strlen is asked: a text that is not empty means stop. A Python function takes 6 % more time.
        self._text = ctypes.create_string_buffer(2)
        libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
        self._callback = ctypes.cast(libc.strlen, library().ggml_abort_callback)
        library().llama_set_abort_callback(context, self._callback, ctypes.addressof(self._text))

    def set(self) -> None:
        """End the batch."""
        _LOG.stopping.add(id(self))
        self._text.raw = b"\x01\x00"

    def clear(self) -> None:
        """Let the next batch be computed."""
        _LOG.stopping.discard(id(self))
        self._text.raw = b"\x00\x00"


def decode_batch(
    context: Any,  # noqa: ANN401 - as above
    tokens: Sequence[int],
    positions: Sequence[int],
    sequences: Sequence[tuple[int, ...]],
    outputs: Sequence[bool],
) -> int:
    """Decode tokens at their positions, each in one sequence or more, with logits where wanted; llama.cpp's result."""
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


class Vocabulary:
    """The tokenizer of a loaded model."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a bare pointer
        llama = library()
        self._model = model
        self._vocab = llama.llama_model_get_vocab(model)
        self.vocab_size: int = llama.llama_vocab_n_tokens(self._vocab)
        self._bos: int = llama.llama_vocab_bos(self._vocab)
        self._eos: int = llama.llama_vocab_eos(self._vocab)
        self.bos = self._text(self._bos)
        self.eos = self._text(self._eos)
        template = llama.llama_model_chat_template(model, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None
        self._adds_bos = self._bos >= 0 and bool(llama.llama_vocab_get_add_bos(self._vocab))
        spm = llama.llama_vocab_type(self._vocab) == _SPM_VOCABULARY
        self._adds_space = spm and self.piece(self._raw("a")[0]).startswith(b" ")

    @cached_property
    def end_token(self) -> int:
        """The token that ends a turn, or else the one that ends a text."""
        # llama.cpp guesses its EOT from token texts and takes a text's end for a turn's; the template knows better.
        for token in self._after_answer():
            if self.is_end(token):
                return token
        eot: int = library().llama_vocab_eot(self._vocab)
        return self._eos if eot < 0 or (self._eos >= 0 and self.is_end(self._eos)) else eot

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`; see `Tokenizer.tokenize`."""
        if continues:
            return self._after_newline(text) if self._adds_space else self._raw(text)
        tokens = self._raw(text)
        if self._adds_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for control tokens."""
        self._check(token)
        llama = library()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written: int = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    def is_end(self, token: int) -> bool:
        """Whether generation ends with `token`."""
        self._check(token)
        return bool(library().llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Refuse all calls from now on, as the model is about to be freed."""
        self.vocab_size = 0

    def _after_answer(self) -> list[int]:
        """The tokens that the chat template puts behind an assistant's answer; none if it has no such place."""
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
        self._check(0)
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count: int = library().llama_tokenize(self._vocab, data, len(data), tokens, room, False, True)
            if count >= 0:
                return tokens[:count]
            room = -count

    def _after_newline(self, text: str) -> list[int]:
        # llama.cpp puts a space in front of the first word, which cannot be turned off; behind a newline it does not.
        newline: int = library().llama_vocab_nl(self._vocab)
        tokens = self._raw("\n" + text)
        return tokens[tokens.index(newline) + 1 :] if newline in tokens else self._raw(text)

    def _text(self, token: int) -> str:
        text = library().llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def _check(self, token: int) -> None:
        # llama.cpp throws C++ exceptions through ctypes, which end the process.
        if self.vocab_size == 0:
            raise UsageError("the tokenizer is closed", "open its file again")
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"no token {token} in a vocabulary of {self.vocab_size}", "use this base's own tokenizer")

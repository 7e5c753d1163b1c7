"""Computes the logits of an adapter's labels with an ONNX encoder: one forward pass on plain onnxruntime.

The graph pools an encoder's last layer and has slots for the adapters' low-rank updates and for their heads. An adapter
is a set of inputs of a run, so switching means passing others, and several threads may run at the same time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.engines.base import Logits, check_context_length, check_options
from edgetune_runtime.errors import NotFoundError, PromptTooLongError, UsageError, VerificationError
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.onnx_file import OnnxHeader, read_onnx
from edgetune_runtime.formats.onnx_operators import check_operators
from edgetune_runtime.formats.onnx_slots import check_arrays, slots_of, summed
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME
from edgetune_runtime.text.chat import Prompt, text_of
from edgetune_runtime.threads.machine import threads_for
from edgetune_runtime.wording import CLOSED, COPY_BUNDLE_AGAIN

from .arrays import Arrays, read_arrays, to_float32
from .ort import graph_errors, library_version, open_session
from .tokenizers import encode, load_tokenizer

HEAD_WEIGHT, HEAD_BIAS = "classifier.weight", "classifier.bias"
"""Inputs of a head: weight [hidden, labels] and bias [labels], without labels unless they are given."""
LOGITS, POOLED = "logits", "pooled"
"""Outputs: logits [batch, labels], and the pooled last layer [batch, hidden] that they are computed from."""
TRAINED_CONTEXT_LENGTH = "edgetune.trained_context_length"
"""Key of the graph's metadata: the tokens that the base was trained for."""

_MAX_CHARACTERS = 256
"""Per token of the context: a longer text is not tokenized. Tokenizers may drop accents, so the bound is not exact."""


class EncoderTokenizer:
    """The `tokenizer.json` of an encoder: text to token ids, with special tokens and never truncated."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return encode(self._tokenizer, text, adds_special_tokens=True)


class EncoderEngine:
    """An ONNX encoder with its adapters. `path` is model.onnx; its folder has the rest. Safe to use from threads.

    `context_length` is in tokens; `threads` defaults to the cores that this process may use, at most 8. UsageError if
    one is not positive or the context is longer than the base was trained for, VerificationError if the graph is not
    that of an encoder.
    """

    has_sequence: ClassVar[Literal[False]] = False

    def __init__(self, path: Path, *, context_length: int, threads: int | None = None) -> None:
        check_options(context_length, threads)
        header = read_onnx(path)
        check_operators(header, path)
        self._hidden = _hidden_size(header, path)
        check_context_length(context_length, _trained_context_length(header, path))
        self.context_length = context_length
        self._slots = slots_of(header)
        self.tokenizer = EncoderTokenizer(path.with_name(TOKENIZER_NAME))
        self.threads = threads_for(threads)
        self._session: Any = open_session(path, self.threads)
        self._adapters: dict[str, Arrays] = {}

    library_version = staticmethod(library_version)

    @staticmethod
    def examine(path: Path, _sha256: str) -> tuple[list[Path], str | None]:
        """All files that are read for the base at `path`; the fingerprint of the weights that the graph says it has."""
        header = read_onnx(path)
        parts = [path, *(path.parent / name for name in (TOKENIZER_NAME, *header.external_files))]
        return parts, header.metadata.get(BASE_FINGERPRINT)

    def load_adapter(self, name: str, path: Path, fingerprint: str | None = None, labels: int | None = None) -> None:
        """See `LabelEngine`."""
        if name in self._adapters:
            return
        arrays = read_arrays(path, name, fingerprint)
        head = {key: arrays.pop(key) for key in (HEAD_WEIGHT, HEAD_BIAS) if key in arrays}
        _check_head(head, self._hidden, labels, name)
        check_arrays(arrays, self._slots, name)
        self._adapters[name] = to_float32(arrays | head)

    def unload_adapter(self, name: str) -> None:
        """See `LabelEngine`."""
        self._adapters.pop(name, None)

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """See `LabelEngine`."""
        text, remedy = text_of(prompt), "shorten the prompt, or open the bundle with a larger context_length"
        if len(text) > self.context_length * _MAX_CHARACTERS:
            message = f"the prompt has {len(text)} characters, and the context holds {self.context_length} tokens"
            raise PromptTooLongError(message, remedy)
        tokens = self.tokenizer.tokenize(text)
        if not 0 < len(tokens) <= self.context_length:
            message = f"the prompt has {len(tokens)} tokens, the context holds 1 to {self.context_length}"
            error = PromptTooLongError if tokens else UsageError
            raise error(message, remedy)
        return tokens

    def logits(self, tokens: Sequence[int], name: str, scale: float = 1.0) -> Logits:
        """Logits of the adapter's labels, float32 [labels], with `scale` times its update of the base."""
        return self._run(tokens, LOGITS, _scaled(self._adapter(name), scale))

    def pooled(self, tokens: Sequence[int]) -> Logits:
        """The plain base's pooled last layer, float32 [hidden]."""
        return self._run(tokens, POOLED, {})

    def close(self) -> None:
        """Free everything once running calls have ended; a second call does nothing."""
        self._session = None
        self._adapters = {}

    def _adapter(self, name: str) -> Arrays:
        if name not in self._adapters and self._session is not None:
            raise NotFoundError(f"adapter {name!r} is not loaded", "load it first")
        return self._adapters.get(name, {})

    def _run(self, tokens: Sequence[int], output: str, adapter: Arrays) -> Logits:
        # Another thread may close the engine: this call keeps its session.
        session = self._session
        if session is None:
            raise UsageError(*CLOSED)
        ids = np.array([tokens], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), **adapter}
        with graph_errors():
            (values,) = session.run([output], inputs)
        shape = (1, self._hidden if output == POOLED else len(adapter[HEAD_BIAS]))
        if np.shape(values) != shape:
            message = f"the graph of the base gives {output} of shape {np.shape(values)}, not {shape}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        return np.asarray(values[0], np.float32)


def _scaled(adapter: Arrays, scale: float) -> Arrays:
    if scale == 1:
        return adapter
    head = (HEAD_WEIGHT, HEAD_BIAS)
    return {key: array if key in head else summed(key, [(array, scale)]) for key, array in adapter.items()}


def _check_head(head: Mapping[str, NDArray[np.generic]], hidden: int, labels: int | None, name: str) -> None:
    """VerificationError unless the head is whole, finite and has as many labels as it should."""
    shapes = [array.shape for array in head.values()]
    match shapes:
        case [(int(width), int(columns)), (int(outputs),)] if (
            width == hidden
            and columns == outputs == (outputs if labels is None else labels) > 0
            and all(np.isfinite(array).all() for array in head.values())
        ):
            return
    expected = f"[{hidden}, {'labels' if labels is None else labels}]"
    actual = ", ".join(f"{key} {list(array.shape)}" for key, array in head.items()) or "none"
    message = f"adapter {name!r} has no usable head: {HEAD_WEIGHT} should be finite {expected}, there is {actual}"
    raise VerificationError(message, COPY_BUNDLE_AGAIN)


def _hidden_size(header: OnnxHeader, path: Path) -> int:
    """Width of the pooled layer; VerificationError when the graph is not an encoder's."""
    weight, bias, pooled = header.inputs.get(HEAD_WEIGHT), header.inputs.get(HEAD_BIAS), header.outputs.get(POOLED)
    defaults = [header.initializers.get(name) for name in (HEAD_WEIGHT, HEAD_BIAS)]
    has_interface = {"input_ids", "attention_mask"} <= header.inputs.keys() and LOGITS in header.outputs
    if has_interface and weight and bias and pooled and all(defaults):
        hidden = weight.shape[0] if len(weight.shape) == 2 else ""
        if isinstance(hidden, int) and hidden > 0 and pooled.shape[-1:] == (hidden,):
            return hidden
    raise VerificationError(f"{path} is not an encoder's graph", COPY_BUNDLE_AGAIN)


def _trained_context_length(header: OnnxHeader, path: Path) -> int:
    text = header.metadata.get(TRAINED_CONTEXT_LENGTH, "")
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise VerificationError(f"{path} does not say how many tokens it was trained for", COPY_BUNDLE_AGAIN)
    return int(text)


ENGINE = EncoderEngine
"""What `Runtime.open` makes for bundles of text-classification."""

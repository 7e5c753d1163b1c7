"""A `graniteswitch` model in memory: a plain LLaMA base, and slots for the factors of adapters.

A control token in a sequence chooses the slot of all tokens after it, and takes the place of the first one. Source, in
llama.cpp: models/granite-switch.cpp.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.engines.gguf.llama import last_errors, library
from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from .native import BOOL, FLOAT32, INT32, STRING, UINT32, Metadata, Tensor
from .requirements import control_tokens, obstacle, sizes_of
from .weights import EMBEDDING, OUTPUT, BaseWeights

ARCHITECTURE = "graniteswitch"
FACTOR_TYPES: Mapping[str, type[np.floating[Any]]] = {"f16": np.float16, "f32": np.float32}
"""Types that slots can store factors in."""
MAX_SLOTS = 256
"""A slot's number is a value in the KV cache, which q8_0 stores with an error of a thousandth."""
GAIN = 15.0
"""What a key of the routing head is: this of a control token, and its negative of all others."""
_SCALES = (".scale", ".input_scale")
"""llama.cpp makes these tensors for models from memory, and does not use them in this architecture."""
_REMEDY = "install a version of llama-cpp-python that edgetune-runtime allows"

Factors = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
"""A [rank, columns] and B [rows, rank] of each weight that an adapter changes, by the weight's name in the base."""


@dataclass(frozen=True)
class _Layout:
    """The tokens that choose the slots, and the highest rank and the type of their factors."""

    controls: tuple[int, ...]
    rank: int
    dtype: str


class SlotModel:
    """A loaded base with `slots` slots, numbered from 1, of the highest rank `rank`; slot 0 is the plain base.

    What is in a slot that was not written is not defined. `pointer` is the model for `make_context` and `Vocabulary`;
    close their users first.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a bare pointer
        weights: BaseWeights,
        tensors: Mapping[str, Tensor],
        layout: _Layout,
    ) -> None:
        self.pointer = model
        self._free = weakref.finalize(self, _free, model, weights)
        self._controls, self._choosing = layout.controls, frozenset(layout.controls)
        self._embedding = weights.embedding
        self.slots, self.rank = len(layout.controls), layout.rank
        stacks = {name: _array(tensor, layout.dtype) for name, tensor in tensors.items() if ".lora_" in name}
        modules = [name.removesuffix(".lora_a") for name in stacks if name.endswith(".lora_a")]
        self._stacks = {f"{name}.weight": (stacks[f"{name}.lora_a"], stacks[f"{name}.lora_b"]) for name in modules}
        self.write(0, {})

    def write(self, slot: int, factors: Factors) -> None:
        """Overwrite a slot, which no running step may use; weights without factors stay those of the base.

        The ranks must be at most `rank`. Other slots can be in use.
        """
        for name, (all_a, all_b) in self._stacks.items():
            a, b = factors.get(name, (all_a[slot, :0], all_b[slot, :, :0]))
            rank = len(a)
            all_a[slot, :rank], all_b[slot, :, :rank] = a, b
            _clear(all_a[slot, rank:])
            _clear(all_b[slot, :, rank:])

    def can_change(self, weight: str) -> bool:
        """Whether slots have factors for a weight of the base."""
        return weight in self._stacks

    def tokens_for(self, slot: int, tokens: Sequence[int], *, begins: bool) -> list[int]:
        """The tokens to decode for a sequence with this slot; `begins`: its adapter acts from the first of them on.

        Call it in the thread that decodes, right before the batch. A batch can have only one first token per slot,
        because the token that chooses the slot gets its embedding. UsageError for a token that chooses a slot itself.
        """
        if not self._choosing.isdisjoint(tokens):
            token = next(token for token in tokens if token in self._choosing)
            raise UsageError(f"token {token} chooses an adapter, and cannot be in a text", "leave it out")
        if not (begins and slot):
            return list(tokens)
        control = self._controls[slot - 1]
        self._embedding[control] = self._embedding[tokens[0]]
        return [control, *tokens[1:]]

    def close(self) -> None:
        """Free everything; a second call does nothing, and no other call may follow."""
        if self._free.alive:
            self._stacks.clear()
            del self._embedding
            self._free()


def compose(
    path: Path, header: GgufHeader, slots: int, rank: int, *, dtype: str = "f16", repack: bool = False
) -> SlotModel:
    """Make a model of the base at `path`, whose header `check_base` has accepted, with empty slots of this rank.

    For `repack` see `Runtime.open`. IncompatibleError for a base that cannot have slots, or not so many; UsageError for
    numbers below 1; VerificationError when llama.cpp refuses the base.
    """
    reason = obstacle(header)
    if reason is not None:
        raise IncompatibleError(f"{path} cannot have adapters in slots: {reason}", "open it without slots")
    if slots < 1 or rank < 1:
        raise UsageError(f"{slots} slots of rank {rank} are not possible", "give numbers of at least 1")
    controls = control_tokens(header)[:MAX_SLOTS]
    if slots > len(controls):
        message = f"{path} has {len(controls)} tokens that can choose a slot, and {slots} slots need as many"
        raise IncompatibleError(message, f"use at most {len(controls)} slots")
    layout = _Layout(tuple(controls[:slots]), rank, dtype)
    model, tensors = _model_from(_metadata(path, header, layout), path)
    try:
        _check_shapes(tensors, header)
        weights = BaseWeights(path, header, _of_base(tensors), repack)
    except BaseException:
        library().llama_model_free(model)
        raise
    return SlotModel(model, weights, tensors, layout)


def _metadata(path: Path, header: GgufHeader, layout: _Layout) -> Metadata:
    """The base's metadata, with those of the slots and the types of tensors that the base does not have."""
    metadata = Metadata(path)
    for key, value in header.metadata.items():
        if key.startswith("llama."):
            metadata.set(ARCHITECTURE + key.removeprefix("llama"), header.value_types[key], value)
    metadata.set("general.architecture", STRING, ARCHITECTURE)
    own: dict[str, tuple[int, Any]] = {
        "logit_scale": (FLOAT32, 1.0),
        # False would turn rotary embeddings off, which LLaMA always has.
        "rope.scaling.finetuned": (BOOL, True),
        "adapters.count": (UINT32, len(layout.controls)),
        "adapters.lora_rank": (UINT32, layout.rank),
        "adapters.router_gain": (FLOAT32, GAIN),
        "adapters.token_ids_activate": (INT32, layout.controls),
        # Their embeddings are written when a sequence begins.
        "adapters.token_ids_substitute": (INT32, layout.controls),
    }
    for key, (kind, value) in own.items():
        metadata.set(f"{ARCHITECTURE}.{key}", kind, value)
    sizes = sizes_of(header)
    for layer in range(sizes.layers):
        metadata.add_tensor(f"blk.{layer}.attn_qkv.weight", header.tensors[f"blk.{layer}.attn_q.weight"].ggml_type)
        for module in sizes.modules():
            for which in "ab":
                metadata.add_tensor(f"blk.{layer}.{module}.lora_{which}", TENSOR_TYPES[layout.dtype].number)
    if OUTPUT not in header.tensors:
        metadata.add_tensor(OUTPUT, header.tensors[EMBEDDING].ggml_type)
    return metadata


def _model_from(metadata: Metadata, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model of the metadata, which are freed, and its tensors, which have no values yet."""
    llama = library()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.no_host = True
    tensors: dict[str, Tensor] = {}

    def record(address: int, _: object) -> None:
        tensor = Tensor.from_address(address)
        tensors[tensor.name.decode()] = tensor

    last_errors()
    model = llama.llama_model_init_from_user(
        metadata.pointer, llama.llama_model_set_tensor_data_t(record), ctypes.c_void_p(None), params
    )
    metadata.close()
    if not model:
        message = f"llama.cpp cannot put {path} into a model with slots: {last_errors()}"
        raise VerificationError(message, "open it without slots")
    return model, tensors


def _check_shapes(tensors: Mapping[str, Tensor], header: GgufHeader) -> None:
    """Check that llama.cpp wants the tensors that it gets, since it does not compare them itself."""
    sizes = sizes_of(header)
    for name, tensor in tensors.items():
        source = header.tensors.get(name, header.tensors[EMBEDDING] if name == OUTPUT else None)
        if source is not None:
            kind, shape = source.ggml_type, source.shape
        elif name.endswith(".attn_qkv.weight"):
            kind = header.tensors[name.replace("_qkv", "_q")].ggml_type
            shape = (sizes.width, sizes.queries + 2 * sizes.keys)
        elif name.endswith(_SCALES) or ".lora_" in name:
            continue
        else:
            raise IncompatibleError(f"this llama.cpp wants a tensor {name}, which the base does not have", _REMEDY)
        if (tensor.type, tuple(tensor.ne)[: len(shape)]) != (kind, shape):
            message = f"this llama.cpp wants {name} of shape {tuple(tensor.ne)}, the base has {shape}"
            raise IncompatibleError(message, _REMEDY)


def _of_base(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have weights of the base; scales, which it does not have, become 1."""
    for name, tensor in tensors.items():
        if name.endswith(_SCALES):
            ctypes.c_float.from_address(tensor.data).value = 1.0
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}


def _array(tensor: Tensor, dtype: str) -> NDArray[Any]:
    """The values of a stack of factors, [slots + 1, rows, columns], in the memory of the model."""
    shape = tuple(tensor.ne)[2::-1]
    kind = np.dtype(FACTOR_TYPES[dtype])
    memory = (ctypes.c_char * (math.prod(shape) * kind.itemsize)).from_address(tensor.data)
    values: NDArray[Any] = np.frombuffer(memoryview(memory), kind)
    return values.reshape(shape)


def _clear(values: NDArray[Any]) -> None:
    """Set all values to zero, without taking memory for those that never had another."""
    # As integers, because the bits of new memory can be those of a NaN.
    if values.view(f"u{values.itemsize}").any():
        values[...] = 0


def _free(model: Any, weights: BaseWeights) -> None:  # noqa: ANN401 - a bare pointer
    library().llama_model_free(model)
    weights.close()

"""Maps names, row order and values of a Hugging Face model's parameters to those of its GGUF file.

In GGUF files of some architectures the rows of q and k have another order: llama.cpp's rotary embedding rotates
neighbouring rows, Hugging Face's the two halves of a head, so the converter interleaves the halves of each head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo

from . import of

Floats = npt.NDArray[np.float32]

_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)")

_KERNEL = re.compile(r"blk\.\d+\.(shortconv\.conv|ssm_conv1d)\.weight")
_DECAY = re.compile(r"blk\.\d+\.ssm_a")


def name_map(header: GgufHeader) -> gguf.TensorNameMap:
    """Maps module names of the Hugging Face model to names in the GGUF file."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    return gguf.get_tensor_name_map(architecture, count(header.metadata, f"{header.architecture}.block_count"))


def tensor_of(module: str, header: GgufHeader, names: gguf.TensorNameMap) -> TensorInfo:
    """The base's tensor with a module's weights; the embedding if there is none, as with a tied output layer."""
    tensors = header.tensors
    return tensors.get(f"{names.get_name(module)}.weight") or tensors["token_embd.weight"]


def base_rows(tensor: TensorInfo, header: GgufHeader) -> npt.NDArray[np.intp] | None:
    """For each row of the base's tensor, its index in the Hugging Face model; None if the order is the same.

    `hf[base_rows]` is the base's order. IncompatibleError if the rows do not divide into heads.
    """
    match = _QUERY_OR_KEY.fullmatch(tensor.name)
    if match is None or not of(header).interleaves_rows:
        return None
    prefix = f"{header.architecture}.attention"
    key = f"{prefix}.head_count" if match["which"] == "q" else f"{prefix}.head_count_kv"
    heads = count(header.metadata, key if key in header.metadata else f"{prefix}.head_count")
    rows = tensor.shape[-1]
    if rows % (2 * heads):
        message = f"{tensor.name} has {rows} rows, which do not divide into {heads} heads"
        raise IncompatibleError(message, "use a base that llama.cpp can run")
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def tensor_name(parameter: str, names: gguf.TensorNameMap) -> str:
    """The name in the GGUF file of a parameter of the Hugging Face model; empty if none is known."""
    module, _, kind = parameter.rpartition(".")
    if kind == "A_log":
        return names.get_name(parameter) or ""
    if kind == "layer_scalar":
        module, kind = parameter, "weight"
    if kind == "dt_bias":
        module, kind = f"{module}.dt_proj", "bias"
    tensor = names.get_name(module)
    return f"{tensor}.{kind}" if tensor else ""


def as_parameter(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """Values of a tensor as the Hugging Face model has them, apart from the order of rows; may change `values`."""
    if offset := _norm_offset(tensor, header):
        values -= offset
    if _DECAY.fullmatch(tensor.name):
        return np.log(-values, out=values)
    return values[:, None] if _KERNEL.fullmatch(tensor.name) else values


def as_stored(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """The reverse of `as_parameter`."""
    if offset := _norm_offset(tensor, header):
        return values + np.float32(offset)
    if _DECAY.fullmatch(tensor.name):
        return -np.exp(values)
    return values[:, 0] if _KERNEL.fullmatch(tensor.name) else values


def _norm_offset(tensor: TensorInfo, header: GgufHeader) -> float:
    # The gated norm of a delta net multiplies by its weights alone.
    is_norm = tensor.name.endswith("norm.weight") and not tensor.name.endswith("ssm_norm.weight")
    return of(header).norm_offset if is_norm else 0.0


def count(metadata: Mapping[str, Any], key: str) -> int:
    """A positive integer in the base's metadata; IncompatibleError for anything else, such as a value per layer."""
    value = metadata.get(key)
    if not isinstance(value, int) or value < 1:
        remedy = "use a base with the same number of heads in each layer, converted by llama.cpp"
        raise IncompatibleError(f"the base's {key} is {value!r}", remedy)
    return value

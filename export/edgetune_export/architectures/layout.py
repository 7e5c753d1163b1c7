"""Maps names, order and values of a Hugging Face model's parameters to those of its GGUF file.

In GGUF files of some architectures the rows of q and k have another order: llama.cpp's rotary embedding rotates
neighbouring rows, Hugging Face's the two halves of a head, so the converter interleaves the halves of each head.
Delta nets have their value heads in another order: rows of the matrices that make values, columns of the one that
reads them.
"""

from __future__ import annotations

import re

import gguf
import numpy as np
import numpy.typing as npt
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo
from edgetune_runtime.formats.gguf_sizes import number

from . import of

Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]

_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)")

_KERNEL = re.compile(r"blk\.\d+\.(shortconv\.conv|ssm_conv1d)\.weight")
_DECAY = re.compile(r"blk\.\d+\.ssm_a")


def name_map(header: GgufHeader) -> gguf.TensorNameMap:
    """Maps module names of the Hugging Face model to names in the GGUF file."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    return gguf.get_tensor_name_map(architecture, number(header, "block_count"))


def tensor_of(module: str, header: GgufHeader, names: gguf.TensorNameMap) -> TensorInfo:
    """The base's tensor with a module's weights; the embedding if there is none, as with a tied output layer."""
    tensors = header.tensors
    return tensors.get(f"{names.get_name(module)}.weight") or tensors["token_embd.weight"]


def base_rows(tensor: TensorInfo, header: GgufHeader) -> Order | None:
    """For each row of the base's tensor, its index in the Hugging Face model; None if the order is the same.

    `hf[base_rows]` is the base's order. IncompatibleError if the rows do not divide into heads.
    """
    match = _QUERY_OR_KEY.fullmatch(tensor.name)
    if match is None or not of(header).interleaves_rows:
        return _order_of_heads(tensor, header, in_columns=False)
    heads = number(header, "attention.head_count" if match["which"] == "q" else "attention.head_count_kv")
    return _swapped(tensor, np.arange(tensor.shape[-1]), (heads, 2, -1, 1))


def base_columns(tensor: TensorInfo, header: GgufHeader) -> Order | None:
    """For each column of the base's tensor, its index in the Hugging Face model, as `base_rows` has it for rows."""
    return _order_of_heads(tensor, header, in_columns=True)


def in_model_order(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """A tensor's values [rows, columns] with rows and columns in the order of the Hugging Face model."""
    rows, columns = base_rows(tensor, header), base_columns(tensor, header)
    values = values if rows is None else values[np.argsort(rows)]
    return values if columns is None else values[:, np.argsort(columns)]


def in_file_order(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """The reverse of `in_model_order`."""
    rows, columns = base_rows(tensor, header), base_columns(tensor, header)
    values = values if rows is None else values[rows]
    return values if columns is None else values[:, columns]


def in_groups(order: Order, size: int) -> Order:
    """An order of columns as one of groups of `size` columns; IncompatibleError if it splits groups."""
    groups = order[::size] // size
    if len(order) % size or np.any(order.reshape(-1, size) != groups[:, None] * size + np.arange(size)):
        # The columns of a head stay together.
        head = int(np.argmax(np.diff(order) != 1)) + 1
        message = f"the base has value heads of {head} columns, which do not fit quantized blocks of {size}"
        raise IncompatibleError(message, "use a base with quantization: f16")
    return groups


def _order_of_heads(tensor: TensorInfo, header: GgufHeader, *, in_columns: bool) -> Order | None:
    heads = of(header).value_heads(header, tensor.name.split(".", 2)[-1])
    if heads is None or heads.in_columns != in_columns:
        return None
    places = np.arange(tensor.shape[0 if in_columns else -1])
    moved = _swapped(tensor, places[heads.before :], (1, heads.groups, heads.heads // heads.groups, -1))
    return np.concatenate([places[: heads.before], moved])


def _swapped(tensor: TensorInfo, places: Order, shape: tuple[int, ...]) -> Order:
    """The places in four dimensions, of which the second and the third are swapped."""
    try:
        return places.reshape(shape).swapaxes(1, 2).reshape(-1)
    except ValueError as error:
        message = f"{tensor.name} has {len(places)} values, which do not divide into heads"
        raise IncompatibleError(message, "use a base that llama.cpp can run") from error


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
    """Values of a tensor as the Hugging Face model has them, apart from their order; may change `values`."""
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

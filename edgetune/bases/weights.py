"""Loads a GGUF base as a transformers model: reads and dequantizes one tensor after another."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from edgetune_export import architectures
from edgetune_export.adapters.shapes import Floats
from edgetune_export.architectures.layout import as_parameter, base_columns, base_rows, name_map, tensor_name
from edgetune_export.base_file.grid import Bytes, Grid, dither_of, grid_of
from edgetune_export.base_file.quantize import dequantize_rows
from edgetune_export.base_file.rotation import frequency_divisors
from edgetune_export.empty_weights import empty_weights
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.atomic import raising_out_of_space
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_VOCABULARY = "tokenizer.ggml.tokens"
_OUTPUT = "output.weight"
# Of tensors in a mapped file, for the speed of matrix products.
_ALIGNMENT = 64
# The writer adds general.architecture itself. From general.name transformers recognizes Mistral, and adds a sliding
# window that llama.cpp does not use.
_LEFT_OUT = ("general.architecture", "general.name")
# The ends of names of buffers with frequencies of the rotary embedding, but for layers with a sliding window.
_FREQUENCIES = (".inv_freq", ".full_attention_inv_freq")


def config_of(header: GgufHeader) -> PreTrainedConfig:
    """The config that transformers reads from a GGUF file's metadata, corrected to what llama.cpp runs.

    Raises IncompatibleError for an architecture that is not supported.
    """
    architecture = architectures.of(header)
    if architecture.transformers_reads_gguf:
        config = _read_config(header)
    else:
        config = AutoConfig.for_model(architecture.model_types[0], **architecture.whole_config(header))
    for name, value in architecture.config_entries(header).items():
        setattr(config, name, value)
    return config


def _read_config(header: GgufHeader) -> PreTrainedConfig:
    """The config that transformers reads from the metadata.

    It reads a file without the vocabulary, which would take seconds to parse; only its length is needed.
    """
    vocabulary = f"{header.architecture}.vocab_size"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        writer = gguf.GGUFWriter(path, header.architecture)
        for key, value in header.metadata.items():
            if isinstance(value, tuple) and not key.startswith("tokenizer."):
                writer.add_array(key, value)
            elif not isinstance(value, tuple) and key not in _LEFT_OUT:
                writer.add_key_value(key, value, gguf.GGUFValueType(header.value_types[key]))
        if vocabulary not in header.metadata and _VOCABULARY in header.metadata:
            writer.add_uint32(vocabulary, len(header.metadata[_VOCABULARY]))
        # Only the tensors' names show whether embedding and output layer are tied.
        writer.add_tensor(_OUTPUT if _OUTPUT in header.tensors else "token_embd.weight", np.zeros(1, np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    return config


def model_of(
    config: PreTrainedConfig, dtype: torch.dtype, path: Path, header: GgufHeader, mapped: Path | None = None
) -> PreTrainedModel:
    """The causal model of `config` on the CPU, in evaluation mode, with the weights of the GGUF file `path` in `dtype`.

    Needs memory for the model and one tensor in float32. With `mapped`, float32 weights are written to that file and
    mapped from it: when memory is short, the system drops their pages and reads them again. The `embeddings_in_file` of
    its architecture stay in the GGUF file, and are not parameters. Parameters without a tensor there stay on the
    meta device.

    Raises ValueError for an unknown architecture, RuntimeError if a tensor has another shape, VerificationError if one
    has values that are not finite, IncompatibleError if one has an unknown type, an embedding is missing, or the rotary
    embedding is scaled in an unsupported way.
    """
    with empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (divisors := frequency_divisors(path, header)) is not None:
        for name, frequencies in model.named_buffers():
            if name.endswith(_FREQUENCIES):
                frequencies.div_(torch.from_numpy(divisors))
    file = GgufWeights(path, header)
    for name in architectures.of(header).embeddings_in_file:
        model.set_submodule(name, FileEmbedding(file, name, model.get_submodule(name), dtype))
    read = ((name, file.values(name)) for name in model.state_dict() if name in file)
    weights = {name: values.to(dtype) for name, values in read} if mapped is None else _mapped(read, mapped)
    # Assigned tensors become the parameters; copying would need memory for both.
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def unread_tensors(model: PreTrainedModel, header: GgufHeader) -> list[str]:
    """Tensors of the file that `model_of` has no parameter for, though llama.cpp computes with them."""
    architecture, names = architectures.of(header), name_map(header)
    parameters = [*model.state_dict(), *(f"{name}.weight" for name in architecture.embeddings_in_file)]
    read = {tensor_name(parameter, names) for parameter in parameters}
    return sorted(header.tensors.keys() - read - {*architecture.unused_tensors(header)})


class FileEmbedding(torch.nn.Module):
    """A frozen embedding of which only the rows of the tokens that occur are read from a GGUF file, and dequantized."""

    scale: torch.Tensor

    def __init__(self, file: GgufWeights, name: str, embedding: Any, dtype: torch.dtype) -> None:  # noqa: ANN401 - transformers' class
        """`embedding` is the module `name` that it replaces, which multiplies by `scalar_embed_scale`.

        Raises IncompatibleError if the file does not have it, or in an unknown type.
        """
        super().__init__()
        self._read = partial(file.rows, f"{name}.weight")
        self._read(np.zeros(1, np.int64))
        scale = torch.tensor(embedding.scalar_embed_scale, dtype=dtype)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of tokens of any shape, with a dimension for the columns added."""
        different, places = np.unique(tokens.cpu().numpy(), return_inverse=True)
        rows = self._read(different).to(self.scale) * self.scale
        return rows[torch.from_numpy(places.reshape(tokens.shape)).to(rows.device)]


class GgufWeights:
    """Reads single parameters of a Hugging Face model from a GGUF file, with rows and columns in its order."""

    def __init__(self, path: Path, header: GgufHeader | None = None) -> None:
        """Raises the errors of `read_header`, which reads the header if it is not given."""
        self._path, self._header = path, header or read_header(path)
        self._names = name_map(self._header)

    def values(self, parameter: str) -> torch.Tensor:
        """The dequantized values in float32 and in the parameter's shape; see `dequantize_rows` for errors.

        Raises IncompatibleError if the file has no such parameter, VerificationError if a value is NaN or infinite.
        """
        data, tensor = self._bytes(parameter)
        # Allocated by torch for its alignment, which makes matrix products faster.
        values = torch.empty(tensor.shape[::-1], dtype=torch.float32)
        dequantize_rows(data, tensor, out=values.numpy())
        if not is_finite(values):
            message = f"tensor {tensor.name} of the base {self._path} has values that are NaN or infinite"
            remedy = "get the base again, or set quantization: bf16 if its weights are beyond the range of f16"
            raise VerificationError(message, remedy)
        if (columns := base_columns(tensor, self._header)) is not None:
            values[:, columns] = values.clone()
        return torch.from_numpy(as_parameter(values.numpy(), tensor, self._header))

    def rows(self, parameter: str, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """The dequantized values of some rows of a matrix, whose order is that of the file, in float32."""
        tensor = self._required(parameter)
        data = np.memmap(self._path, np.uint8, "r", tensor.offset, (tensor.shape[1], tensor.nbytes // tensor.shape[1]))
        columns, picked = tensor.shape[0], data[numbers]
        part = replace(tensor, shape=(columns, len(numbers)), nbytes=picked.nbytes)
        return torch.from_numpy(dequantize_rows(picked.reshape(-1), part))

    def grid(self, parameter: str) -> tuple[Grid, Floats] | None:
        """The grid of a quantized matrix with its `dither_of`; None if it is stored as floats.

        Errors as in `values` and `grid_of`.
        """
        data, tensor = self._bytes(parameter)
        if tensor.type.is_float:
            return None
        grid, dither = grid_of(data, tensor), self._ordered(dither_of(tensor), tensor)
        columns = base_columns(tensor, self._header)
        return (grid, dither) if columns is None else (grid.with_columns(columns), dither[:, np.argsort(columns)])

    def __contains__(self, parameter: str) -> bool:
        """Whether the file has the parameter."""
        return self._tensor(parameter) is not None

    def _tensor(self, parameter: str) -> TensorInfo | None:
        return self._header.tensors.get(tensor_name(parameter, self._names))

    def _required(self, parameter: str) -> TensorInfo:
        tensor = self._tensor(parameter)
        if tensor is None:
            message = f"{self._path} has no tensor for {parameter}"
            raise IncompatibleError(message, "use the base that the adapter was trained on")
        return tensor

    def _bytes(self, parameter: str) -> tuple[Bytes, TensorInfo]:
        tensor = self._required(parameter)
        data = np.fromfile(self._path, np.uint8, tensor.nbytes, offset=tensor.offset)
        # Reorder rows before dequantizing, when there are fewer bytes to move.
        return self._ordered(data, tensor), tensor

    def _ordered(self, values: np.ndarray, tensor: TensorInfo) -> np.ndarray:
        """Values per row of a tensor, in the order of the Hugging Face model's rows."""
        order = base_rows(tensor, self._header)
        return values if order is None else values.reshape(tensor.shape[-1], -1)[np.argsort(order)]


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory for a mask."""
    return values.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(values))


def _mapped(weights: Iterator[tuple[str, torch.Tensor]], path: Path) -> dict[str, torch.Tensor]:
    """Write float32 tensors to a file one by one, and map them from it."""
    offsets: dict[str, tuple[int, torch.Size]] = {}
    with raising_out_of_space(path), path.open("wb") as file:
        for name, values in weights:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offsets[name] = (file.tell(), values.shape)
            values.numpy().tofile(file)
    # Copy on write: changes stay in memory and never reach the file.
    data = np.memmap(path, np.float32, "c")
    return {
        name: torch.from_numpy(data[start // 4 :][: shape.numel()]).view(shape)
        for name, (start, shape) in offsets.items()
    }

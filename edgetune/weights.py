"""GGUF base in, transformers model out: each tensor is read, dequantized and made a parameter, one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from edgetune_export import architectures
from edgetune_export.architectures.layout import base_rows, name_map
from edgetune_export.backends.gguf.quantize import dequantize_rows
from edgetune_runtime.atomic import raising_out_of_space
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_VOCABULARY = "tokenizer.ggml.tokens"
_OUTPUT = "output.weight"
# Of tensors in a mapped file, on which the speed of products depends.
_ALIGNMENT = 64
# The writer adds the one itself; by the other transformers tells Mistral from LLaMA, and gives it a window of attention
# that llama.cpp leaves out.
_LEFT_OUT = ("general.architecture", "general.name")


def config_of(header: GgufHeader) -> PreTrainedConfig:
    """What transformers makes of a GGUF file's metadata, corrected where llama.cpp makes something else of it.

    Raises IncompatibleError for an architecture that is not supported.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - slow to import

    architecture = architectures.of(header)
    if architecture.transformers_reads_gguf:
        config = _read_config(header)
    else:
        config = AutoConfig.for_model(architecture.model_types[0], **architecture.whole_config(header))
    for name, value in architecture.config_entries(header).items():
        setattr(config, name, value)
    return config


def _read_config(header: GgufHeader) -> PreTrainedConfig:
    """What transformers makes of the metadata.

    It gets a file without the arrays of the vocabulary, which take it seconds to read and of which it needs the length.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - slow to import

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
        # Whether the output layer is the embedding shows in the tensors' names alone.
        writer.add_tensor(_OUTPUT if _OUTPUT in header.tensors else "token_embd.weight", np.zeros(1, np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    return config


def model_of(
    config: PreTrainedConfig, dtype: torch.dtype, path: Path, header: GgufHeader, mapped: Path | None = None
) -> PreTrainedModel:
    """The causal model of `config` on the CPU, to be evaluated, with the weights of the GGUF file `path` in `dtype`.

    Takes the memory of the model and of one tensor in float32. With `mapped`, a file that is written for it, weights in
    float32 are mapped from that file: when memory is short, the system drops their pages and reads them again.
    Parameters that the GGUF file has no tensor for stay on the meta device.

    Raises ValueError for an unknown architecture, RuntimeError when a tensor has another shape, IncompatibleError when
    one is of an unknown type.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    read = _read(model.state_dict(), path, header)
    weights = {name: values.to(dtype) for name, values in read} if mapped is None else _mapped(read, mapped)
    # What is assigned becomes the parameter itself; copying would hold both.
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _read(parameters: Iterable[str], path: Path, header: GgufHeader) -> Iterator[tuple[str, torch.Tensor]]:
    """The values in float32 of each of these parameters that the file has."""
    names = name_map(header)
    with path.open("rb") as file:
        for parameter in parameters:
            module, _, kind = parameter.rpartition(".")
            tensor = header.tensors.get(f"{names.get_name(module)}.{kind}")
            if tensor is not None:
                file.seek(tensor.offset)
                yield parameter, _values(np.fromfile(file, np.uint8, tensor.nbytes), tensor, header)


def _mapped(weights: Iterator[tuple[str, torch.Tensor]], path: Path) -> dict[str, torch.Tensor]:
    """The same float32 tensors, as they are in a file that is written tensor by tensor."""
    places: dict[str, tuple[int, torch.Size]] = {}
    with raising_out_of_space(path), path.open("wb") as file:
        for name, values in weights:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places[name] = (file.tell(), values.shape)
            values.numpy().tofile(file)
    # What is written to goes into memory, and never into the file.
    data = np.memmap(path, np.float32, "c")
    return {
        name: torch.from_numpy(data[start // 4 :][: shape.numel()]).view(shape)
        for name, (start, shape) in places.items()
    }


def _values(data: np.ndarray, tensor: TensorInfo, header: GgufHeader) -> torch.Tensor:
    """The values in float32, rows and norms as the Hugging Face model has them."""
    order = base_rows(tensor, header)
    if order is not None:
        # Fewer bytes to move before they are dequantized than after.
        data = data.reshape(tensor.shape[-1], -1)[np.argsort(order)]
    # Aligned by torch, on which the speed of its products depends.
    values = torch.empty(tensor.shape[::-1], dtype=torch.float32)
    dequantize_rows(data, tensor, out=values.numpy())
    if tensor.name.endswith("norm.weight"):
        values -= architectures.of(header).norm_offset
    return values

"""Reads the sizes of a Hugging Face folder without torch: predicts its GGUF header, and lists an encoder's modules."""

from __future__ import annotations

import json
import math
import operator
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune_export.architectures import Architecture
from edgetune_export.architectures.base import ENTRIES
from edgetune_export.architectures.layout import name_map, tensor_name
from edgetune_export.architectures.shape import SizedModule
from edgetune_export.base_file.convert import check_folder, weight_files
from edgetune_export.hf_folder import read_config
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.formats.regular_file import reading
from edgetune_runtime.wording import first_of

HEADER_BYTES_PER_TOKEN = 36
"""Size of the tokenizer in a GGUF file, per token; measured on SmolLM2: 1.79 MB for 49,152 tokens."""

_NOT_TEXT = ("model.visual.", "model.vision_", "model.audio_", "model.embed_vision.", "model.embed_audio.", "mtp.")
"""The beginnings of names of tensors that no text part has."""
_PACKED = (".qweight", ".weight_packed")
"""The ends of names of integers of 2 to 8 bits, as of GPTQ, AWQ and compressed-tensors."""
_SCALES = ("_scale_inv", "_scale")
"""What is added to the name of a weight in 8 bits for that of its scale."""
_OF_MULTIMODAL = "model.language_model."
"""The beginning of names where others have `model.`."""
_OF_ENCODER = re.compile(r"(?:\w+\.)?((?:(?:encoder|transformer)\.layer\.\d+\..+|embeddings_project))\.weight")
"""The weights of an encoder's modules, whose names some folders begin with its model_type."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_F16 = TENSOR_TYPES["f16"].number


def predict_header(folder: Path) -> GgufHeader:
    """The header of the folder's f16 GGUF file, without the tokenizer; each offset estimates the size of the header.

    Reads config.json and the headers of the .safetensors files. Raises what `check_folder` raises,
    VerificationError if a file is damaged, and IncompatibleError for packed weights.
    """
    spec = check_folder(folder)
    architecture, config = spec.gguf, spec.text_part(read_config(folder))
    metadata: dict[str, Any] = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": config[name] for name, key in ENTRIES.items() if config.get(name) is not None}
    metadata.setdefault(f"{architecture}.attention.head_count_kv", config.get("num_attention_heads"))
    if config.get("head_dim") is not None:
        metadata[f"{architecture}.attention.value_length"] = config["head_dim"]
    metadata |= {f"{architecture}.{key}": value for key, value in spec.header_entries(config).items()}
    names = name_map(GgufHeader(metadata, {}))
    tensors = [each for file in weight_files(folder) for each in _tensors(file) if not each[0].startswith(_NOT_TEXT)]
    _check_quantized(folder, {name: dtype for name, dtype, _ in tensors})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, _, shape in tensors:
        parameter = name.replace(_OF_MULTIMODAL, "model.", 1)
        tensor = tensor_name(parameter, names)
        parts = [tensor] if tensor else _parts(parameter, spec) or [parameter]
        for part in parts:
            # Of a convolution with one input per channel, the converter drops the dimension of the inputs.
            sizes = [shape[0], shape[2]] if len(shape) == 3 and shape[1] == 1 else shape
            shapes[part] = tuple(reversed([*(rows // len(parts) for rows in sizes[:1]), *sizes[1:]]))
    # A damaged file may have a matrix of fewer dimensions.
    start = HEADER_BYTES_PER_TOKEN * sum(shapes.get("token_embd.weight", ())[1:2])
    return GgufHeader(
        metadata, {name: TensorInfo(name, shape, _F16, start, 2 * math.prod(shape)) for name, shape in shapes.items()}
    )


def _check_quantized(folder: Path, types: Mapping[str, str]) -> None:
    """Check the types of the tensors by name: none may be packed, and weights in 8 bits need a scale."""
    if packed := [name for name in types if name.endswith(_PACKED)]:
        message = f"{folder} has packed weights of a quantization ({packed[0]}), which are not supported"
        raise IncompatibleError(message, "use the same model without this quantization, or its .gguf file")
    in_8_bits = (name for name, dtype in types.items() if dtype.startswith("F8_"))
    if unscaled := [name for name in in_8_bits if not {name + end for end in _SCALES} & types.keys()]:
        message = f"{folder} has {first_of(sorted(unscaled), 1)} in 8 bits without a scale"
        raise VerificationError(message, "download the model again")


def encoder_modules(weights: Path) -> tuple[SizedModule, ...]:
    """The linear modules of an encoder, of any of `bases.ENCODER_TYPES`, from the header of its weights.

    Raises VerificationError if the file is damaged.
    """
    found = ((_OF_ENCODER.fullmatch(name), shape) for name, _, shape in _tensors(weights))
    return tuple(
        SizedModule(match[1], match[1], columns=shape[1], rows=shape[0])
        for match, shape in found
        if match and len(shape) == 2
    )


def _parts(name: str, architecture: Architecture) -> list[str]:
    """The tensors into which the converter splits that of a module; none if it does not."""
    for module, tensors in architecture.split_modules.items():
        if match := re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(module)}\.weight", name):
            return [f"blk.{match[1]}.{tensor}.weight" for tensor in tensors]
    return []


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of each tensor of a .safetensors file: 8 bytes of header length, then a JSON header."""
    try:
        with reading(file) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            head: Mapping[str, Any] = json.loads(opened.read(length))
        end = max((entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError("the file is truncated")
        for name, entry in head.items():
            if name != "__metadata__":
                yield name, str(entry["dtype"]), [operator.index(size) for size in entry["shape"]]
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{file} is not a whole .safetensors file", "download the model again") from error

"""Writes a base as an ONNX folder and adapters as `.onnx_adapter` files, which onnxruntime-genai loads too.

The structure comes from onnxruntime-genai's builder and the weights from the base's GGUF file, block by block, so that
the base is the same in both formats. A merged model is made from the merged GGUF file for the same reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_runtime.engines.onnx.config import CONFIG_NAME
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.atomic import raising_out_of_space
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.formats.onnx_file import OnnxHeader, read_onnx
from edgetune_runtime.formats.onnx_prefix import past_inputs

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Adapter, Floats, LowRank, Merged, Prefix, Tensors
from edgetune_export.architectures import Architecture
from edgetune_export.backends.base import Source
from edgetune_export.base_file import merge
from edgetune_export.base_file.rotation import frequency_divisors

from . import slots as onnx_slots
from . import value_types
from .adapter import write_tensors
from .graph import (
    GRAPH,
    add_conv_inputs,
    add_logits_start,
    divide_frequencies,
    load_structure,
    put_vectors,
    put_weights,
    save_model,
)
from .options import OnnxOptions
from .structure import run_builder
from .tensors import add_tensor_slots, fill_tensors
from .tokenizer import end_tokens, write_tokenizer

if TYPE_CHECKING:
    import torch

SHAPES = ("low_rank", "prefix", "tensors", "merged")
ADAPTER_FILE = "adapter.onnx_adapter"
MODEL_FILE = f"onnx/{GRAPH}"
PACKAGES = ("onnxruntime", "onnxruntime-genai")
values_by_type = value_types.values_by_type

_MATRIX = 2


def write_base(source: Source, folder: Path, adapters: Sequence[Adapter]) -> Path:
    """Write the base into `folder/onnx`, with slots for everything that these adapters change; returns its graph.

    Raises IncompatibleError when the builder cannot export the base, OutOfSpaceError when the disk is full.
    """
    out = folder / MODEL_FILE
    _write_model(source, source.path, out, adapters)
    return out


def write_adapter(adapter: Adapter, base: Path, out: Path, *, dtype: str = "f32", base_fingerprint: str) -> None:
    """Write the adapter as tensors for the slots of the graph `base`, or as its past keys and values.

    `dtype` is f32 or f16. Raises IncompatibleError if the adapter does not fit the graph, and what `write_tensors`
    raises.
    """
    header = read_onnx(base)
    if isinstance(adapter, LowRank):
        tensors = onnx_slots.fill(adapter, header)
    elif isinstance(adapter, Tensors):
        tensors = fill_tensors(adapter, header)
    else:
        tensors = _prefix_tensors(adapter, header)
    write_tensors(tensors, out, dtype=dtype, base_fingerprint=base_fingerprint)


def write_merged(merged: Merged, source: Source, out: Path) -> None:
    """Write a full model with the merged parameters, rounded as in the merged GGUF file."""
    gguf_file = source.work / f"{merged.name}.gguf"
    merge.write_merged(merged, source.path, gguf_file)
    _write_model(source, gguf_file, out, (), merged)
    gguf_file.unlink()


def weight_type(source: Source) -> str:
    """The main type of the GGUF base, or what the graph has instead: f32, q8_0 for floats as int8, or int4."""
    base = source.header.main_type
    weights = OnnxOptions.of(source.options).weights
    if weights == "fp32":
        return "f32"
    if weights == "int4" and base.onnx_bits != 4:
        return weights
    if base.is_float:
        return "q8_0" if weights == "int8" else "f32"
    return base.name


def _prefix_tensors(prefix: Prefix, graph: OnnxHeader) -> dict[str, Floats]:
    """`past_key_values.N.key` and `.value` of each layer, [1, key/value heads, tokens, head size].

    IncompatibleError if the graph has other inputs.
    """
    tensors: dict[str, Floats] = {}
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors |= {f"past_key_values.{layer}.key": keys[None], f"past_key_values.{layer}.value": values[None]}
    shapes = {name: (tensor.shape[1], tensor.shape[3]) for name, tensor in tensors.items()}
    if not prefix.tokens or shapes != past_inputs(graph, prefix.keys.shape[-1]):
        message = f"prefix {prefix.name!r} has keys of shape {prefix.keys.shape}, which do not fit the graph's inputs"
        raise IncompatibleError(message, "use the base that the prefix was trained on")
    return tensors


def _vectors(source: Source) -> dict[str, torch.Tensor]:
    """The base's norms, biases, kernels and scales, which the graph takes from the builder and not from the GGUF
    file."""
    assert source.model is not None
    return {name: values for name, values in source.model.state_dict().items() if values.dim() != _MATRIX}


def _write_model(
    source: Source, file: Path, out: Path, adapters: Sequence[Adapter], merged: Merged | None = None
) -> None:
    structure, base = _structure(source), source.header
    config = json.loads((structure / CONFIG_NAME).read_text(encoding="utf-8"))
    model = load_structure(structure, base)
    if (divisors := frequency_divisors(source.path, base)) is not None:
        divide_frequencies(model.graph, divisors)
    if merged is not None:
        vectors = {name: parameter.numpy(force=True) for name, parameter in _vectors(source).items()}
        changed = {name: compute() for name, compute in merged.parameters.items() if name in vectors}
        put_vectors(model.graph, base, {**vectors, **changed})
    options = OnnxOptions.of(source.options)
    if options.weights != "int4":
        put_weights(model, file, layers=options.weights, vocabulary=options.weights)
    else:
        put_weights(model, file, layers="fp32", vocabulary="int8")
        from .quantize import requantize  # noqa: PLC0415 - it sets up logging for the whole process

        model = requantize(model, options, source.calibration, config["model"]["decoder"]["head_size"])
    header = read_header(file)
    add_logits_start(model.graph)
    add_conv_inputs(model.graph)
    # Before the low-rank slots, so that they act on the outputs of these.
    add_tensor_slots(model, header, [adapter for adapter in adapters if isinstance(adapter, Tensors)])
    onnx_slots.add_slots(model, header, [adapter for adapter in adapters if isinstance(adapter, LowRank)])
    model.metadata_props[BASE_FINGERPRINT] = source.fingerprint
    save_model(model, out.parent)
    with raising_out_of_space(out):
        write_tokenizer(source.path, out.parent)
        config["model"]["eos_token_id"] = end_tokens(source.path)
        (out.parent / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _structure(source: Source) -> Path:
    """The folder of the builder's float32 graph, made once per build."""
    structure = source.work / "structure"
    if not (structure / GRAPH).exists():
        assert source.model is not None
        folder = source.work / "checkpoint"
        with raising_out_of_space(folder):
            source.model.save_pretrained(folder, state_dict=_vectors(source))
            write_tokenizer(source.path, folder)
            _prepare_config(folder / "config.json", architectures.of(source.header))
            run_builder(folder, structure)
        shutil.rmtree(folder)
    return structure


def _prepare_config(path: Path, architecture: Architecture) -> None:
    """Add the keys to config.json that the builder reads."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **architecture.builder_entries(config)}), encoding="utf-8")

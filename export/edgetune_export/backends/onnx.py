"""Base and folded adapters in, ONNX folder and `.onnx_adapter` files out, as onnxruntime-genai loads them too.

The structure comes from onnxruntime-genai's builder, the numbers from the base's GGUF file, block by block, so that an
adapter meets the same base in both formats. A merged model is made from the merged GGUF for the same reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from edgetune_runtime.gguf_file import read_header
from edgetune_runtime.onnx_file import read_onnx

from edgetune_export import onnx_slots
from edgetune_export.atomic import raising_out_of_space
from edgetune_export.fold import LowRank
from edgetune_export.onnx_adapter import write_tensors
from edgetune_export.onnx_graph import (
    GRAPH,
    add_logits_start,
    load_structure,
    put_ends,
    put_weights,
    run_builder,
    save_model,
)
from edgetune_export.onnx_weights import FLOAT_TYPES
from edgetune_export.parity import INT4
from edgetune_export.quantize import describe_quantization
from edgetune_export.tokenizer import end_tokens, write_tokenizer

from . import gguf
from ._base import Source

SHAPES = ("low_rank", "merged")
SUPPORTED = ("llama", "qwen2", "qwen3", "gemma3")
ADAPTER_FILE = "adapter.onnx_adapter"
MODEL_FILE = f"onnx/{GRAPH}"

_CONFIG = "genai_config.json"


def write_base(source: Source, folder: Path, modules: Collection[str]) -> Path:
    """Write the base into `folder/onnx`, with slots for adapters of these modules; returns its graph.

    Raises IncompatibleError when the builder cannot export the base, OutOfSpaceError when the disk is full.
    """
    out = folder / MODEL_FILE
    _write_model(source, source.path, out, modules)
    return out


def write_adapter(adapter: LowRank, base: Path, out: Path, *, dtype: str = "f32", base_fingerprint: str) -> None:
    """Write the adapter as tensors for the slots of the graph `base`; `dtype` is f32 or f16.

    Raises IncompatibleError when the adapter does not fit the slots, OutOfSpaceError when the disk is full.
    """
    tensors = onnx_slots.fill(adapter, onnx_slots.slots_of(read_onnx(base).metadata))
    write_tensors(tensors, out, dtype=dtype, base_fingerprint=base_fingerprint)


def write_merged(adapter: LowRank, source: Source, out: Path, scale: float = 1.0) -> None:
    """Write a whole model with `scale` times the adapter added, its matrices rounded once more to the base's types."""
    merged = source.work / f"{adapter.name}.gguf"
    gguf.write_merged(adapter, source, merged, scale)
    _write_model(source, merged, out, ())
    merged.unlink()


def quantization(source: Source) -> str:
    """How the graph's weights are rounded, as `parity.check` knows it."""
    held = describe_quantization(read_header(source.path))
    if source.weights.scheme == "fp32":
        return "f32"
    if source.weights.scheme == "int4" and held != "q4_0":
        return INT4
    if held in FLOAT_TYPES:
        return "q8_0" if source.weights.scheme == "int8" else "f32"
    return held


def _write_model(source: Source, weights: Path, out: Path, modules: Collection[str]) -> None:
    structure = _structure(source)
    config = json.loads((structure / _CONFIG).read_text(encoding="utf-8"))
    model = load_structure(structure)
    scheme = source.weights.scheme
    put_weights(model, weights, "fp32" if scheme == "int4" else scheme)
    if scheme == "int4":
        from edgetune_export.onnx_quantize import requantize  # noqa: PLC0415 - it sets up logging for the whole process

        model = requantize(model, source.weights, config["model"]["decoder"]["head_size"])
    put_ends(model, weights, "int8" if scheme == "int4" else scheme)
    header = read_header(weights)
    add_logits_start(model.graph)
    onnx_slots.add_slots(model, header, modules)
    model.metadata_props["edgetune.base_fingerprint"] = source.fingerprint
    save_model(model, out.parent)
    with raising_out_of_space(out):
        write_tokenizer(source.path, out.parent)
        config["model"]["eos_token_id"] = end_tokens(source.path)
        (out.parent / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _structure(source: Source) -> Path:
    """The folder of the builder's float32 graph, made once a build."""
    structure = source.work / "structure"
    if not (structure / GRAPH).exists():
        assert source.model is not None
        folder = source.work / "checkpoint"
        with raising_out_of_space(folder):
            source.model.save_pretrained(folder)
            write_tokenizer(source.path, folder)
            _flatten_rope(folder / "config.json")
            run_builder(folder, structure)
        shutil.rmtree(folder)
    return structure


def _flatten_rope(path: Path) -> None:
    """Say of a model whose kinds of layers rotate differently what the builder looks for beside the kinds' own entries.

    transformers 5 writes an entry for each kind, builder 0.18 reads the names of transformers 4.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        rope |= {**rope["full_attention"], "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        path.write_text(json.dumps(config), encoding="utf-8")

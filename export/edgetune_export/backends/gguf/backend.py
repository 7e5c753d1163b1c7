"""Writes adapters as GGUF LoRA or prefix files and merged models as GGUF files, for llama.cpp.

llama.cpp computes W·x + alpha/rank · B·(A·x) for each pair `<tensor>.lora_a`, `<tensor>.lora_b`. If the base has the
rows of q and k in another order than the Hugging Face model, B's rows are reordered too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_adapter import INVOCATION_TOKENS
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from edgetune_runtime.wording import first_of

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Adapter, Delta, Floats, LowRank, Merged, Prefix
from edgetune_export.architectures.layout import base_columns, base_rows, name_map
from edgetune_export.backends.base import DTYPES, Source, check_f16_range
from edgetune_export.base_file import merge
from edgetune_export.base_file.quantize import quantize_rows

from . import AUTO, factor_types, prefix_type, stored_rank
from .prefix import write_prefix
from .writer import adapter_file

SHAPES = ("low_rank", "prefix", "merged")
ADAPTER_FILE = "adapter.gguf"
MODEL_FILE = "model.gguf"
PACKAGES = ("llama-cpp-python",)


def write_base(source: Source, folder: Path, _adapters: Sequence[Adapter]) -> Path:
    """Link the base's file into `folder`: it ships unchanged, whatever the adapters are."""
    out = folder / source.path.name
    folder.mkdir(parents=True, exist_ok=True)
    out.symlink_to(source.path.resolve())
    return out


def write_adapter(adapter: Adapter, base: Path, out: Path, *, dtype: str = AUTO, base_fingerprint: str) -> None:
    """Write the adapter as a GGUF LoRA file, or a prefix, for the base GGUF `base`, whose sha256 is `base_fingerprint`.

    `dtype` is f32, f16, q8_0, where a matrix whose columns 32 does not divide stays f16, or auto (`factor_types`).
    Raises IncompatibleError when the adapter does not fit the base, VerificationError when a value is beyond the range
    of f16, OutOfSpaceError when the disk is full.
    """
    header = read_header(base)
    if isinstance(adapter, Prefix):
        write_prefix(adapter, base, out, dtype=prefix_type(dtype), base_fingerprint=base_fingerprint)
        return
    if not isinstance(adapter, LowRank):
        raise IncompatibleError(f"a GGUF adapter cannot hold {adapter.shape}", "choose another target")
    placed = [(tensor, _filled(delta, stored_rank(delta.rank, dtype))) for tensor, delta in _place(adapter, header)]
    alpha = max(delta.rank for _, delta in placed)
    with adapter_file(adapter, header, out, kind="lora", alpha=alpha, base_fingerprint=base_fingerprint) as writer:
        if adapter.invocation:
            # llama.cpp refuses the signed numbers that add_array would write.
            tokens, kinds = list(adapter.invocation), gguf.GGUFValueType
            writer.add_key_value(INVOCATION_TOKENS, tokens, kinds.ARRAY, sub_type=kinds.UINT32)
        for tensor, delta in placed:
            # llama.cpp multiplies by alpha / rank, and alpha is one number for the whole file.
            b = delta.b * np.float32(delta.rank / alpha)
            a_type, b_type = factor_types(dtype, delta.rank, delta.a.shape[1])
            _add_tensor(writer, f"{tensor.name}.lora_a", delta.a, a_type)
            _add_tensor(writer, f"{tensor.name}.lora_b", b, b_type)


def weight_type(source: Source) -> str:
    """The tensor type with the most bytes in the base's layers."""
    return source.header.main_type.name


def values_by_type(file: Path) -> dict[str, int]:
    """The number of values in each tensor type of a GGUF file."""
    return read_header(file).values_by_type


def write_merged(merged: Merged, source: Source, out: Path) -> None:
    """Write a copy of the base with the merged parameters; see `merge.write_merged`."""
    merge.write_merged(merged, source.path, out)


def _place(adapter: LowRank, header: GgufHeader) -> list[tuple[TensorInfo, Delta]]:
    """The base's tensor of each module, and its delta with rows and columns in the base's order.

    IncompatibleError lists the modules that do not fit.
    """
    fixed = architectures.of(header).fixed_modules
    if not adapter.modules:
        raise IncompatibleError(f"adapter {adapter.name!r} changes no module", "train it with target modules")
    names = name_map(header)
    placed: list[tuple[TensorInfo, Delta]] = []
    problems: list[str] = []
    for module, delta in adapter.modules.items():
        tensor = header.tensors.get(f"{names.get_name(module)}.weight")
        problem = f"llama.cpp applies no adapter to {module}" if module in fixed else _misfit(module, delta, tensor)
        if problem or tensor is None:
            problems.append(problem)
        else:
            rows, columns = base_rows(tensor, header), base_columns(tensor, header)
            a = delta.a if columns is None else delta.a[:, columns]
            placed.append((tensor, Delta(a, delta.b if rows is None else delta.b[rows])))
    if problems:
        message = f"adapter {adapter.name!r} does not fit this base: {first_of(problems)}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
    return placed


def _misfit(module: str, delta: Delta, tensor: TensorInfo | None) -> str:
    if tensor is None:
        tied = " (its output layer is its token embedding)" if module == "lm_head" else ""
        return f"the base has no tensor for {module}{tied}"
    if tensor.name == "token_embd.weight" or len(tensor.shape) != 2:
        return f"{module} is not a linear layer"
    columns, rows = tensor.shape
    return delta.misfit(module, rows, columns)


def _filled(delta: Delta, rank: int) -> Delta:
    """The delta with zeros up to a rank."""
    more = rank - delta.rank
    return Delta(np.pad(delta.a, ((0, more), (0, 0))), np.pad(delta.b, ((0, 0), (0, more)))) if more else delta


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Floats, tensor_type: str) -> None:
    if tensor_type != "f32":
        check_f16_range(name, values, "write it with dtype: f32")
    if tensor_type == "q8_0":
        packed = np.frombuffer(quantize_rows(values, gguf.GGMLQuantizationType.Q8_0), np.uint8)
        writer.add_tensor(name, packed.reshape(values.shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, np.ascontiguousarray(values, DTYPES[tensor_type]))

"""Writes adapters as GGUF LoRA or prefix files and merged models as GGUF files, for llama.cpp.

llama.cpp computes W·x + alpha/rank · B·(A·x) for each pair `<tensor>.lora_a`, `<tensor>.lora_b`. If the base has the
rows of q and k in another order than the Hugging Face model, B's rows are reordered too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.formats.atomic import replacing, require_space
from edgetune_runtime.formats.gguf_file import INVOCATION_TOKENS, GgufHeader, TensorInfo, read_header
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.wording import first_of

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Adapter, Delta, Floats, LowRank, Merged, Prefix
from edgetune_export.architectures.layout import base_rows, name_map
from edgetune_export.backends.base import Source

from . import FORMAT
from .prefix import write_prefix
from .quantize import quantize_rows
from .rounding import rounded

SHAPES = ("low_rank", "prefix", "merged")
ADAPTER_FILE = "adapter.gguf"
MODEL_FILE = "model.gguf"
PACKAGES = ("llama-cpp-python",)

_F16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Placed:
    """A delta with the base tensor that it changes, rows in the base's order."""

    tensor: TensorInfo
    delta: Delta


def write_base(source: Source, folder: Path, _adapters: Sequence[Adapter]) -> Path:
    """Link the base's file into `folder`: it ships unchanged, whatever the adapters are."""
    out = folder / source.path.name
    folder.mkdir(parents=True, exist_ok=True)
    out.symlink_to(source.path.resolve())
    return out


def write_adapter(adapter: Adapter, base: Path, out: Path, *, dtype: str = "f16", base_fingerprint: str) -> None:
    """Write the adapter as a GGUF LoRA file, or a prefix, for the base GGUF `base`, whose sha256 is `base_fingerprint`.

    `dtype` is f32, f16 or q8_0; a matrix whose columns 32 does not divide stays f16 under q8_0. Raises
    IncompatibleError when the adapter does not fit the base, VerificationError when a value is beyond the range of f16,
    OutOfSpaceError when the disk is full.
    """
    if dtype not in FORMAT.adapter_dtypes:
        raise UsageError(f"no adapter dtype {dtype!r}", f"choose one of: {', '.join(FORMAT.adapter_dtypes)}")
    header = read_header(base)
    if isinstance(adapter, Prefix):
        write_prefix(adapter, base, out, dtype=dtype, base_fingerprint=base_fingerprint)
        return
    if not isinstance(adapter, LowRank):
        raise IncompatibleError(f"a GGUF adapter cannot hold {adapter.shape}", "choose another target")
    placed = _place(adapter, header)
    alpha = max(item.delta.rank for item in placed)
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, header.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.add_string("edgetune.base_fingerprint", base_fingerprint)
        writer.add_string("edgetune.method", adapter.method)
        if adapter.invocation:
            # llama.cpp refuses the signed numbers that add_array would write.
            tokens, kinds = list(adapter.invocation), gguf.GGUFValueType
            writer.add_key_value(INVOCATION_TOKENS, tokens, kinds.ARRAY, sub_type=kinds.UINT32)
        for item in placed:
            # llama.cpp multiplies by alpha / rank, and alpha is one number for the whole file.
            b = item.delta.b * np.float32(item.delta.rank / alpha)
            _add_tensor(writer, f"{item.tensor.name}.lora_a", item.delta.a, dtype)
            _add_tensor(writer, f"{item.tensor.name}.lora_b", b, dtype)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def weight_type(source: Source) -> str:
    """The tensor type with the most bytes in the base's file."""
    return read_header(source.path).main_type.name


def values_by_type(file: Path) -> dict[str, int]:
    """The number of values in each tensor type of a GGUF file."""
    return read_header(file).values_by_type


def write_merged(merged: Merged, source: Source, out: Path) -> None:
    """Write a copy of the base with the merged parameters: same header, same type and offset of each tensor.

    Only these parameters are rounded, by `rounded`. Raises IncompatibleError if one does not fit the base or if a
    tensor's type cannot be written, OutOfSpaceError if the disk is full.
    """
    base = source.path
    header = read_header(base)
    if not merged.parameters:
        raise IncompatibleError(f"adapter {merged.name!r} changes no module", "train it with target modules")
    placed = _place_parameters(merged, header)
    with replacing(out) as temporary:
        require_space(out, base.stat().st_size)
        shutil.copyfile(base, temporary)
        with temporary.open("r+b") as file:
            for tensor, compute in placed:
                values = _stored(compute(), tensor, header).reshape(-1, tensor.shape[0])
                file.seek(tensor.offset)
                held = file.read(tensor.nbytes)
                file.seek(tensor.offset)
                file.write(rounded(held, tensor, values))


def _place_parameters(merged: Merged, header: GgufHeader) -> list[tuple[TensorInfo, Callable[[], Floats]]]:
    """The base's tensor of each parameter; IncompatibleError lists the parameters that have none."""
    names = name_map(header)
    placed, problems = [], []
    for parameter, compute in merged.parameters.items():
        module, _, kind = parameter.rpartition(".")
        tensor = header.tensors.get(f"{names.get_name(module)}.{kind}")
        if tensor is None:
            problems.append(f"the base has no tensor for {parameter}")
        else:
            placed.append((tensor, compute))
    _refuse(merged.name, problems)
    return placed


def _stored(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """A parameter as the file stores it: rows in the base's order, norms with the architecture's offset."""
    if values.shape[::-1] != tensor.shape:
        message = f"{tensor.name} is {tensor.shape[::-1]} in the base, {values.shape} in the merged model"
        raise IncompatibleError(message, "give the base that the model was trained from")
    if tensor.name.endswith("norm.weight"):
        return values + np.float32(architectures.of(header).norm_offset)
    order = base_rows(tensor, header)
    return values if order is None else values[order]


def _place(adapter: LowRank, header: GgufHeader) -> list[_Placed]:
    """Find the base tensor of each module and check that it fits; IncompatibleError lists the modules that do not."""
    architectures.of(header)
    if not adapter.modules:
        raise IncompatibleError(f"adapter {adapter.name!r} changes no module", "train it with target modules")
    names = name_map(header)
    placed: list[_Placed] = []
    problems: list[str] = []
    for module, delta in adapter.modules.items():
        tensor = header.tensors.get(f"{names.get_name(module)}.weight")
        problem = _misfit(module, delta, tensor)
        if problem or tensor is None:
            problems.append(problem)
        else:
            placed.append(_Placed(tensor, _in_base_order(delta, tensor, header)))
    _refuse(adapter.name, problems)
    return placed


def _refuse(name: str, problems: Sequence[str]) -> None:
    if problems:
        message = f"adapter {name!r} does not fit this base: {first_of(problems)}"
        raise IncompatibleError(message, "give the base that the adapter was trained on")


def _misfit(module: str, delta: Delta, tensor: TensorInfo | None) -> str:
    if tensor is None:
        tied = " (its output layer is its token embedding)" if module == "lm_head" else ""
        return f"the base has no tensor for {module}{tied}"
    if tensor.name == "token_embd.weight" or len(tensor.shape) != 2:
        return f"{module} is no linear layer"
    columns, rows = tensor.shape
    if (rows, columns) == (delta.b.shape[0], delta.a.shape[1]):
        return ""
    return f"{module} is {delta.b.shape[0]}x{delta.a.shape[1]} in the adapter, {rows}x{columns} in the base"


def _in_base_order(delta: Delta, tensor: TensorInfo, header: GgufHeader) -> Delta:
    order = base_rows(tensor, header)
    return delta if order is None else Delta(delta.a, delta.b[order])


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Floats, dtype: str) -> None:
    if dtype == "f32":
        writer.add_tensor(name, np.ascontiguousarray(values))
    elif dtype == "q8_0" and values.shape[1] % TENSOR_TYPES[dtype].block == 0:
        _require_f16_range(name, values)
        packed = np.frombuffer(quantize_rows(values, gguf.GGMLQuantizationType.Q8_0), np.uint8)
        writer.add_tensor(name, packed.reshape(values.shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        _require_f16_range(name, values)
        writer.add_tensor(name, np.ascontiguousarray(values, np.float16))


def _require_f16_range(name: str, values: Floats) -> None:
    largest = float(np.abs(values).max())
    if not largest <= _F16_MAX:
        raise VerificationError(f"{name} reaches {largest:.3g}, f16 ends at {_F16_MAX:.0f}", "write it with dtype: f32")

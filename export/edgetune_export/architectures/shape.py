"""The sizes of a base, read from its GGUF header: what adapters, training memory and ONNX graphs are sized by."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader
from edgetune_runtime.formats.gguf_sizes import (
    head_lengths,
    kv_values_per_token,
    number,
    recurrent_layers,
    sharing_layers,
)

from . import of
from .base import OUTPUT_LAYER, Architecture

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)")
_OUTSIDE = -1
_KEYS_AND_VALUES = ("attn_k", "attn_k_norm", "attn_v")


@dataclass(frozen=True)
class SizedModule:
    """A linear module of a base: its full name in transformers, the `product` of an ONNX graph that computes it
    together with the modules that read the same inputs, its inputs (`columns`) and outputs (`rows`), and its layer, -1
    for the output layer."""

    name: str
    product: str
    columns: int
    rows: int
    layer: int = -1

    @property
    def values_per_rank(self) -> int:
        """Numbers in the two factors of a low-rank update, per rank."""
        return self.columns + self.rows


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base. `modules` are the linear modules of all layers.

    `parameters_by_layer` does not count embeddings and the last norm, and `parameters` counts all, of which
    `parameters_in_file` are embeddings that training does not load. `queries` and `keys`
    are the widths of all heads of a layer, `norms` the values per token that a layer's norms read.
    With `ties_output`, the weights of the output layer are the token embedding.
    """

    architecture: Architecture
    modules: tuple[SizedModule, ...]
    output_layer: SizedModule
    intermediate: int
    queries: int
    keys: int
    norms: int
    kv_values_per_token: int
    parameters_by_layer: tuple[int, ...]
    parameters: int
    parameters_in_file: int = 0
    ties_output: bool = False

    @classmethod
    def of_header(cls, header: GgufHeader) -> BaseShape:
        """The shape of a GGUF base; IncompatibleError if layers lack a module or differ in their heads."""
        architecture, key_size = of(header), head_lengths(header)[0]
        queries = number(header, "attention.head_count") * key_size
        keys = number(header, "attention.head_count_kv") * key_size
        per_head = queries + keys if architecture.norms_queries_and_keys else 0
        modules = linear_modules(header)
        output_layer = modules.pop(OUTPUT_LAYER)
        by_layer: Counter[int] = Counter()
        sharing, embedding = sharing_layers(header), header.tensors.get(PER_LAYER_EMBEDDING)
        for name, tensor in header.tensors.items():
            match = _LAYER.match(name)
            layer, kind = (int(match[1]), match[2]) if match else (_OUTSIDE, name)
            # Angles of the rotary embedding and the scales of layers are not parameters of the model, and llama.cpp's
            # converter also writes the keys and values of layers that do not use them.
            is_unused = layer in sharing and kind in _KEYS_AND_VALUES
            if not (kind.startswith("rope_") or kind == "layer_output_scale" or is_unused):
                by_layer[layer] += math.prod(tensor.shape)
        return cls(
            architecture=architecture,
            modules=tuple(modules.values()),
            output_layer=output_layer,
            intermediate=number(header, "feed_forward_length"),
            queries=queries,
            keys=keys,
            norms=output_layer.columns * architecture.norms_per_layer + per_head,
            kv_values_per_token=kv_values_per_token(header),
            parameters_by_layer=tuple(by_layer[layer] for layer in range(number(header, "block_count"))),
            parameters=by_layer.total(),
            parameters_in_file=math.prod(embedding.shape) if embedding else 0,
            ties_output="output.weight" not in header.tensors,
        )

    @property
    def linear_modules(self) -> tuple[SizedModule, ...]:
        """The linear modules of all layers, and the output layer."""
        return (*self.modules, self.output_layer)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.parameters_by_layer)

    @property
    def loaded_parameters(self) -> int:
        """The parameters that training has in memory."""
        return self.parameters - self.parameters_in_file

    @property
    def weights_mb(self) -> float:
        """The size of the loaded parameters in float32, in MB."""
        return 4 * self.loaded_parameters / 1e6

    @property
    def hidden(self) -> int:
        """The width of the model."""
        return self.output_layer.columns

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self.output_layer.rows

    @property
    def linear_weights(self) -> int:
        """Weights of the linear modules of all layers."""
        return sum(module.columns * module.rows for module in self.modules)


def linear_modules(header: GgufHeader) -> dict[str, SizedModule]:
    """The linear modules of all layers, and the output layer, by name; IncompatibleError if the base lacks one."""
    architecture, sized = of(header), {}
    recurrent, sharing = recurrent_layers(header), sharing_layers(header)
    for layer in range(number(header, "block_count")):
        for module in architecture.modules_of(is_recurrent=layer in recurrent, shares_keys=layer in sharing):
            name, product = (f"model.layers.{layer}.{part}" for part in (module.name, module.product))
            sized[name] = SizedModule(name, product, *_size(header, f"blk.{layer}.{module.tensor}.weight"), layer)
    return {**sized, OUTPUT_LAYER: SizedModule(OUTPUT_LAYER, OUTPUT_LAYER, *_size(header, header.output_tensor))}


def _size(header: GgufHeader, tensor: str) -> tuple[int, int]:
    """Columns and rows of a matrix."""
    shape = header.tensors[tensor].shape if tensor in header.tensors else ()
    if len(shape) != 2:
        raise IncompatibleError(f"the base has no matrix {tensor}", "use a base that llama.cpp's converter wrote")
    return shape[0], shape[1]

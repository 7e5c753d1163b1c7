"""Maps a prefix to an ONNX graph's inputs of past keys and values."""

from __future__ import annotations

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.onnx_file import OnnxHeader
from edgetune_runtime.formats.onnx_prefix import past_inputs

from edgetune_export.adapters.shapes import Floats, Prefix


def prefix_tensors(prefix: Prefix, graph: OnnxHeader) -> dict[str, Floats]:
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

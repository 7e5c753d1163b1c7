"""The class with which onnxruntime-genai's builder makes the graphs of Gemma 4 E2B and E4B.

The builder has one for larger models, with the same norms and heads. These have an input of each layer besides, and
last layers that attend to the keys and values of an earlier one, so they add nothing to a cache. After their input,
such layers are needed only for the positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from .graph import ROWS

_Builder: Any = object
# Of torch, which is imported only where it is used.
_Tensor: TypeAlias = Any
_Module: TypeAlias = Any


def make_class(builder: Any) -> Any:  # noqa: ANN401 - a module that is found at run time
    """The class, derived from one of the module `builder`."""
    # Its Gemma 4 has a layer's scale right after the blocks, and loads weights of other classes.
    methods = {"blocks": builder.Gemma3Model.make_layer, "load_weights": builder.Gemma3Model.load_weights}
    return type("PerLayerModel", (_PerLayer, builder.Gemma4Model), methods)


class _PerLayer(_Builder):  # type: ignore[misc]
    """What the builder's `Gemma4Model` lacks; the methods replace those of that class."""

    def make_config_init(self, config: Any) -> None:  # noqa: ANN401 - transformers' configuration
        """Read the sizes of heads, and which layer has the keys and values of each that shares them."""
        # Else transformers refuses to give the size of some heads as that of all.
        config.allow_global_per_layer_attribute_access = True
        layers, kinds = range(config.num_hidden_layers), list(config.layer_types)
        own = len(layers) - config.num_kv_shared_layers
        last = {kind: layer for layer, kind in enumerate(kinds[:own])}
        self.sources = {layer: last[kinds[layer]] for layer in layers[own:]}
        self.head_sizes = [config.per_layer_config[layer].head_dim for layer in layers]
        self.widths = config.intermediate_size, config.intermediate_size * (1 + config.use_double_wide_mlp)
        self.input_width = config.hidden_size_per_layer_input
        config.global_head_dim = max(self.head_sizes)
        config.num_global_key_value_heads = config.num_key_value_heads
        super().make_config_init(config)

    def is_fused_rope_supported(self) -> bool:
        """Attention rotates all of a head: the angles of what layers with full attention keep are zero."""
        return True

    def layer_head_dim(self, layer_id: int) -> int:
        """The size of a layer's heads."""
        return int(self.head_sizes[layer_id])

    def make_inputs_and_outputs(self) -> None:
        """The graph's inputs and outputs; layers that share keys and values have none."""
        for names in [*self.input_names.values(), *self.output_names.values()]:
            for layer in self.sources if isinstance(names, dict) else ():
                del names[layer]
        super().make_inputs_and_outputs()

    def make_key_value_cache_names(self, layer_id: int) -> tuple[str, ...]:
        """The names of past and present keys and values; to shared ones, nothing is added."""
        if layer_id not in self.sources:
            return tuple(super().make_key_value_cache_names(layer_id))
        return (*super().make_key_value_cache_names(self.sources[layer_id])[2:], "", "")

    def make_embedding(self, embedding: _Tensor) -> None:
        """The embedding of tokens, and the inputs of all layers, which come from it and from an embedding of their own.

        The builder calls this for both embeddings.
        """
        if "/model/embed_tokens/Gather" in self.node_names:
            return
        super().make_embedding(embedding)
        model, width, inputs = self.weights.model, self.num_layers * self.input_width, "/model/per_layer_inputs"
        table, projection = "model.embed_tokens_per_layer.weight", "/model/per_layer_model_projection"
        self.make_initializer(model.embed_tokens_per_layer.weight, table)
        rows = self._node("Gather", "/model/embed_tokens_per_layer/Gather", [table, "input_ids"], width)
        rows = self._times("/model/embed_tokens_per_layer/Mul", rows, self.input_width**0.5, width)
        embedded = self.layernorm_attrs["root_input"]
        product = self.make_matmul(model.per_layer_model_projection, f"{projection}/MatMul", embedded)
        projected = self._times(f"{projection}/Mul", f"{product}/output_0", self.hidden_size**-0.5, width)
        norm = "model.per_layer_projection_norm.weight"
        self.make_initializer(model.per_layer_projection_norm.weight, norm, to=self.io_dtype)
        projected = self._norm_of_parts("/model/per_layer_projection_norm", projected, norm, self.input_width, width)
        total = self._node("Add", f"{inputs}/Add", [projected, rows], width)
        total = self._times(f"{inputs}/Mul", total, 2**-0.5, width)
        shared = len(self.sources) * self.input_width
        widths = [self.input_width] * (self.num_layers - len(self.sources)) + [shared] * bool(shared)
        self.parts = self._split(f"{inputs}/Split", total, widths)

    def make_layer(self, layer_id: int, layer: _Module) -> None:
        """A layer: its blocks, what its input adds, and its scale."""
        norms, name, width = self.layernorm_attrs, f"/model/layers.{layer_id}", self.input_width
        if layer_id == min(self.sources, default=None):
            self._cut_rows()
        self.blocks(layer_id, layer)
        state = self._node("Add", f"{name}/Add", [norms["root_input"], norms["skip_input"]], self.hidden_size)
        gate = self.make_matmul(layer.per_layer_input_gate, f"{name}/per_layer_input_gate/MatMul", state)
        gate = self._node("Gelu", f"{name}/per_layer_input/Gelu", [f"{gate}/output_0"], width, approximate="tanh")
        gated = self._node("Mul", f"{name}/per_layer_input/Mul", [gate, self.parts[layer_id]], width)
        added = self.make_matmul(layer.per_layer_projection, f"{name}/per_layer_projection/MatMul", gated)
        norms["root_input"] = f"{added}/output_0"
        self.make_layernorm(layer_id, layer.post_per_layer_input_norm, False, True, "post_per_layer_input")
        scale = f"model.layers.{layer_id}.layer_scalar"
        self.make_initializer(layer.layer_scalar, scale, to=self.io_dtype)
        # The next norm adds the two.
        for key, value in {"root_input": state, "skip_input": norms["output_0"]}.items():
            norms[key] = self._node("Mul", f"{name}/layer_scalar/Mul_{key}", [value, scale], self.hidden_size)

    def make_mlp(self, layer_id: int, mlp: _Module, root_input: str) -> None:
        """A feed-forward block, wider in layers that share keys and values."""
        self.intermediate_size = self.widths[layer_id in self.sources]
        super().make_mlp(layer_id, mlp, root_input)

    def make_attention(self, layer_id: int, attention: _Module, root_input: str, **options: object) -> None:
        """Attention with the heads of a layer."""
        # The class of larger models gives them to attention, which does not read them.
        self.input_names["position_ids"] = ""
        super().make_attention(layer_id, attention, root_input, **options)
        del self.input_names["position_ids"]

    def make_attention_input_proj(self, layer_id: int, attention: _Module, root_input: str, **options: object) -> None:
        """Queries, keys and values; keys and values of no positions where they are shared."""
        if layer_id not in self.sources:
            super().make_attention_input_proj(layer_id, attention, root_input, **options)
            return
        product = self.make_matmul(attention.q_proj, f"/model/layers.{layer_id}/attn/q_proj/MatMul", root_input)
        queries, zeros = f"{product}/output_0", "/model/constants/INT64/[0, 0]"
        ends, axes = (f"/model/constants/INT64/{numbers}" for numbers in ([0, self.kv_size], [1, 2]))
        # Made once for layers with heads of the same size.
        name = f"/model/no_keys/{self.kv_size}/Slice"
        none = self._node("Slice", name, [queries, zeros, ends, axes], self.kv_size)
        self.attention_attrs |= {"q_path": queries, "k_path": none, "v_path": none}

    def make_attention_qk_norm(self, layer_id: int, attention: _Module) -> None:
        """Norms of queries and keys; shared keys are normed already."""
        if layer_id not in self.sources:
            super().make_attention_qk_norm(layer_id, attention)
            return
        weight = f"model.layers.{layer_id}.attn.q_norm.layernorm.weight"
        self.make_initializer(attention.q_norm.weight, weight, to=self.io_dtype)
        name, queries = f"/model/layers.{layer_id}/attn/q_norm", self.attention_attrs["q_path"]
        self.attention_attrs["q_path"] = self._norm_of_parts(name, queries, weight, self.head_size, self.q_size)

    def _cut_rows(self) -> None:
        """Mark that all that follows is needed only for positions with logits."""
        for key in ("root_input", "skip_input"):
            value = self.layernorm_attrs[key]
            self.layernorm_attrs[key] = self._node("Identity", f"{ROWS}{key}", [value], self.hidden_size)
        *own, rest = self.parts
        widths = [self.input_width] * len(self.sources)
        rest = self._node("Identity", f"{ROWS}per_layer_inputs", [rest], sum(widths))
        self.parts = [*own, *self._split("/model/per_layer_inputs/Split_rows", rest, widths)]

    def _split(self, name: str, value: str, widths: Sequence[int]) -> list[str]:
        """Parts of a value's columns."""
        parts, types = [f"{name}/output_{part}" for part in range(len(widths))], [self.io_dtype] * len(widths)
        shapes = [self.make_hidden_state_shape(last_dim=width) for width in widths]
        self.make_split(name, [value, f"/model/constants/INT64/{list(widths)}"], parts, types, shapes)
        return parts

    def _times(self, name: str, value: str, factor: float, width: int) -> str:
        return self._node("Mul", name, [value, f"/model/constants/FLOAT/{factor}"], width)

    def _norm_of_parts(self, name: str, value: str, weight: str, size: int, width: int) -> str:
        """A value of `width` columns whose parts of `size` columns are normed."""
        shapes = [f"/model/constants/INT64/{[0, -1, columns]}" for columns in (size, width)]
        parts = self._node("Reshape", f"{name}/Reshape_1", [value, shapes[0]], size, rows="parts")
        epsilon, norm = self.layernorm_attrs["epsilon"], "SimplifiedLayerNormalization"
        normed = self._node(norm, f"{name}/{norm}", [parts, weight], size, rows="parts", epsilon=epsilon)
        return self._node("Reshape", f"{name}/Reshape_2", [normed, shapes[1]], width)

    def _node(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        width: int,
        rows: str = "sequence_length",
        **attributes: object,
    ) -> str:
        """Make a node of ONNX, and return the name of its output with `width` columns."""
        output = f"{name}/output_0"
        self.make_node(op_type, inputs=inputs, outputs=[output], name=name, **attributes)
        self.make_value(output, self.io_dtype, shape=["batch_size", rows, width])
        return output

"""PEFT's prompt learning on packed rows: a base with trained virtual tokens before each row.

PEFT's own forward pass drops the position ids that packed rows need; `GivenTokensModel` runs it on one row, as the
reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from edgetune_runtime.errors import IncompatibleError
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from edgetune.objectives.packing import PackedRows

States = tuple[torch.Tensor, torch.Tensor]
"""Keys (after rotary embedding) and values, each [layers, key/value heads, tokens, head size]."""


class PrefixedModel(torch.nn.Module):
    """A base with trained virtual tokens."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft

    def positions(self) -> torch.Tensor:
        """The output of PEFT's encoder for the virtual tokens [tokens, width], always in float32."""
        name = self.peft.active_adapter
        encoder, tokens = self.peft.prompt_encoder[name], self.peft.prompt_tokens[name]
        device = next(encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            encoded: torch.Tensor = encoder(tokens[None].to(device))[0]
        return encoded


class CachePrefixedModel(PrefixedModel):
    """A base with trained keys and values in every layer."""

    def forward(self, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """See `after_states`."""
        base = self.peft.get_base_model()
        return after_states(base, split_states(self.positions(), base.config), **inputs)


class TokenPrefixedModel(PrefixedModel):
    """A base with trained embeddings before the sequence."""

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        packed: PackedRows,
        logits_to_keep: torch.Tensor,
        **inputs: Any,  # noqa: ANN401 - further arguments of the base
    ) -> Any:  # noqa: ANN401 - transformers' output
        """Logits at `logits_to_keep`, counted from the first given token."""
        base = self.peft.get_base_model()
        virtual, embedded = self.positions(), base.get_input_embeddings()(input_ids)
        shifted = packed.after_tokens(len(virtual))
        return base(
            inputs_embeds=torch.cat([virtual[None].to(embedded.dtype), embedded], 1),
            position_ids=shifted.positions,
            packed=shifted,
            logits_to_keep=logits_to_keep + len(virtual),
            **inputs,
        )


class GivenTokensModel(torch.nn.Module):
    """PEFT's own forward pass on one row; it returns the logits of the given tokens."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft.eval()

    def forward(self, input_ids: torch.Tensor) -> Any:  # noqa: ANN401 - transformers' output
        """Logits [1, n, vocabulary] of tokens [1, n]."""
        with warnings.catch_warnings():
            # PEFT still uses the old name of transformers' cache argument.
            warnings.simplefilter("ignore", FutureWarning)
            return self.peft(input_ids=input_ids, logits_to_keep=input_ids.shape[1])


class _FixedCache(DynamicCache):  # type: ignore[misc]  # transformers carries no types for it
    """A cache that does not grow, so that a layer with activation checkpointing can run twice."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, followed by the given ones."""
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


def after_states(
    base: PreTrainedModel,
    states: States,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    packed: PackedRows,
    **inputs: Any,  # noqa: ANN401 - further arguments of the base
) -> Any:  # noqa: ANN401 - transformers' output
    """The base on packed rows, each after the given keys and values, which get gradients."""
    shifted = packed.after_cache(states[0].shape[2])
    # Layers with a sliding window keep all of them too; the window applies to each row's own distances.
    cache = _FixedCache([(k[None].to(base.dtype), v[None].to(base.dtype)) for k, v in zip(*states, strict=True)])
    return base(input_ids=input_ids, position_ids=shifted.positions, packed=shifted, cache=cache, **inputs)


def states_of(base: PreTrainedModel, **inputs: Any) -> States:  # noqa: ANN401 - arguments of the base
    """The keys and values that the base computes for one sequence of inputs, without gradients."""
    cache = DynamicCache()
    with torch.no_grad():
        base(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
    return states_in(cache)


def states_in(cache: DynamicCache) -> States:
    """The keys and values of the one sequence in a cache."""
    keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    return torch.stack(keys), torch.stack(values)


def repeated(tokens: Sequence[int], length: int) -> torch.Tensor:
    """The tokens, repeated or cut to [1, length]."""
    return torch.tensor([tokens]).repeat(1, -(-length // len(tokens)))[:, :length]


def split_states(saved: torch.Tensor, config: Any) -> States:  # noqa: ANN401 - transformers' configuration
    """The states from PEFT's layout [tokens, layers · 2 · heads · head size]. Raises IncompatibleError if the size is
    that of another base."""
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * 2 * heads * size
    if saved.shape[1] != width:
        message = f"the prefix has {saved.shape[1]} values per token, but the base needs {width}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
    keys, values = saved.view(len(saved), config.num_hidden_layers, 2, heads, size).permute(2, 1, 3, 0, 4)
    return keys, values


def join_states(states: States) -> torch.Tensor:
    """The states in PEFT's layout; the inverse of `split_states`."""
    return torch.stack(states).permute(3, 1, 0, 2, 4).flatten(1)


def random_tokens(base: PreTrainedModel, length: int) -> list[int]:
    """Random tokens of the base's vocabulary, starting with BOS, because the first token is an attention sink."""
    tokens: list[int] = torch.randint(base.config.vocab_size, (length,)).tolist()
    first = base.config.bos_token_id
    return tokens if first is None else [first, *tokens[1:]]

"""A base behind trained positions: PEFT's prompt learning in, logits of packed rows out, as training asks for them.

PEFT's own forward drops the positions that packed rows need; `GivenTokensModel` runs it on one row, as a reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from edgetune_runtime.errors import IncompatibleError
from transformers import DynamicCache

from edgetune.objectives.packing import PackedRows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

States = tuple[torch.Tensor, torch.Tensor]
"""Keys, as they are after rotary embedding, and values: [layers, key/value heads, tokens, head size] each."""


class PrefixedModel(torch.nn.Module):
    """A base behind positions that are trained."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft

    def positions(self) -> torch.Tensor:
        """What PEFT's encoder makes of the virtual tokens [tokens, width], float32 whatever the base is run in."""
        name = self.peft.active_adapter
        encoder, tokens = self.peft.prompt_encoder[name], self.peft.prompt_tokens[name]
        device = next(encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            made: torch.Tensor = encoder(tokens[None].to(device))[0]
        return made


class CachePrefixedModel(PrefixedModel):
    """Behind keys and values of every layer."""

    def forward(self, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """As `behind_states`."""
        base = self.peft.get_base_model()
        return behind_states(base, split_states(self.positions(), base.config), **inputs)


class TokenPrefixedModel(PrefixedModel):
    """Behind soft tokens."""

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        packed: PackedRows,
        logits_to_keep: torch.Tensor,
        **inputs: Any,  # noqa: ANN401 - what the base takes besides
    ) -> Any:  # noqa: ANN401 - transformers' output
        """Logits at `logits_to_keep`, which count from the first given token."""
        base = self.peft.get_base_model()
        soft, given = self.positions(), base.get_input_embeddings()(input_ids)
        behind = packed.after_tokens(len(soft))
        return base(
            inputs_embeds=torch.cat([soft[None].to(given.dtype), given], 1),
            position_ids=behind.positions,
            packed=behind,
            logits_to_keep=logits_to_keep + len(soft),
            **inputs,
        )


class GivenTokensModel(torch.nn.Module):
    """PEFT's own forward of one row; the logits are those of the given tokens."""

    def __init__(self, peft: PeftModel) -> None:
        super().__init__()
        self.peft = peft.eval()

    def forward(self, input_ids: torch.Tensor) -> Any:  # noqa: ANN401 - transformers' output
        """Of tokens [1, n], logits [1, n, vocabulary]."""
        with warnings.catch_warnings():
            # PEFT calls the cache by the name that transformers gave it before.
            warnings.simplefilter("ignore", FutureWarning)
            return self.peft(input_ids=input_ids, logits_to_keep=input_ids.shape[1])


class _Before(DynamicCache):  # type: ignore[misc]  # transformers carries no types for it
    """Keys and values that stay as they are, so that a layer with activation checkpointing can run twice."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values with the given ones behind them."""
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


def behind_states(
    base: PreTrainedModel,
    states: States,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    packed: PackedRows,
    **inputs: Any,  # noqa: ANN401 - what the base takes besides
) -> Any:  # noqa: ANN401 - transformers' output
    """The base on packed rows, each behind the given keys and values; gradients reach these."""
    behind = packed.after_cache(states[0].shape[2])
    # Sliding layers too keep all of them here: what a row sees of them is for its distances to say.
    cache = _Before([(k[None].to(base.dtype), v[None].to(base.dtype)) for k, v in zip(*states, strict=True)])
    return base(input_ids=input_ids, position_ids=behind.positions, packed=behind, cache=cache, **inputs)


def states_of(base: PreTrainedModel, **inputs: Any) -> States:  # noqa: ANN401 - what the base takes
    """The states that one sequence of inputs produces in the base, without gradients."""
    cache = DynamicCache()
    with torch.no_grad():
        base(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
    keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    return torch.stack(keys), torch.stack(values)


def repeated(tokens: Sequence[int], length: int) -> torch.Tensor:
    """The tokens [1, length], again and again or cut."""
    return torch.tensor([tokens]).repeat(1, -(-length // len(tokens)))[:, :length]


def split_states(saved: torch.Tensor, config: Any) -> States:  # noqa: ANN401 - transformers' configuration
    """The states in PEFT's order [tokens, layers · 2 · heads · head size]; IncompatibleError for another base's."""
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * 2 * heads * size
    if saved.shape[1] != width:
        message = f"the prefix has {saved.shape[1]} values a token where the base takes {width}"
        raise IncompatibleError(message, "give the base that the adapter was trained on")
    keys, values = saved.view(len(saved), config.num_hidden_layers, 2, heads, size).permute(2, 1, 3, 0, 4)
    return keys, values


def join_states(states: States) -> torch.Tensor:
    """The states in PEFT's order, which `split_states` undoes."""
    return torch.stack(states).permute(3, 1, 0, 2, 4).flatten(1)


def random_tokens(base: PreTrainedModel, length: int) -> list[int]:
    """Random tokens of the base's vocabulary; the first opens a sequence, as that is what other tokens lean on."""
    tokens: list[int] = torch.randint(base.config.vocab_size, (length,)).tolist()
    first = base.config.bos_token_id
    return tokens if first is None else [first, *tokens[1:]]

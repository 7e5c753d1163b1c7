from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime import IncompatibleError
from edgetune_runtime.engines.gguf.slots import compose, obstacle, slot_bytes
from edgetune_runtime.engines.gguf.slots.requirements import control_tokens
from edgetune_runtime.formats.gguf_file import GgufHeader
from runtime.engines.gguf.slots.steps import checked
from runtime.gguf_files import rewritten

Q = "blk.0.attn_q.weight"


def test_other_architectures_have_no_slots(tiny_gguf: Callable[[str], Path]) -> None:
    path = tiny_gguf("qwen3")
    reason = "its architecture is qwen3, and slots need llama; open it without slots"
    with pytest.raises(IncompatibleError, match=f"cannot have adapters in slots: {reason}"):
        compose(path, checked(path), 2, 4)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "it has blk.0.attn_q.bias, which slots have no place for"),
        ({"blk.1.attn_q_norm.weight": np.ones(16, np.float32)}, "it has blk.1.attn_q_norm.weight"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, "it has rope_freqs.weight"),
        ({"blk.0.ffn_up.scale": np.ones(1, np.float32)}, "it has blk.0.ffn_up.scale"),
        ({Q: np.zeros((64, 64), np.float32)}, "the types of q, k and v in layer 0 are f32, f16, f16, and slots need"),
    ],
)
def test_a_base_with_other_tensors_has_no_slots(
    tensors: dict[str, np.ndarray], reason: str, base: Path, tmp_path: Path
) -> None:
    found = obstacle(checked(rewritten(base, tmp_path / "base.gguf", tensors=tensors)))
    assert found is not None
    assert found.startswith(reason)


def changed(header: GgufHeader, **metadata: Any) -> GgufHeader:  # noqa: ANN401 - values of metadata
    return replace(header, metadata={**header.metadata, **metadata})


def test_sizes_that_contradict_the_tensors_are_refused(base: Path) -> None:
    header = checked(base)
    for key, value, reason in (
        ("llama.rope.dimension_count", 8, "it rotates 8 of the 16 values of a head, and slots need all"),
        ("llama.feed_forward_length", 64, r"blk.0.ffn_down.weight has the shape (128, 64) instead of (64, 64)"),
        ("llama.block_count", 1, "it has blk.1.attn_norm.weight, which slots have no place for"),
        ("llama.block_count", 3, "it has no blk.2.attn_norm.weight"),
    ):
        assert obstacle(changed(header, **{key: value})) == reason
    typed = replace(header, value_types={**header.value_types, "llama.context_length": 10})
    assert obstacle(typed) == "llama.context_length is a value of type 10, which no such base has"
    shifted = replace(header.tensors[Q], offset=header.tensors[Q].offset + 8)
    assert obstacle(replace(header, tensors={**header.tensors, Q: shifted})) == f"{Q} is not at a multiple of 32 bytes"


def test_the_memory_of_a_slot_is_that_of_its_factors(base: Path) -> None:
    # Two layers with q, output [64, 64], k, v [64, 32], gate, up, down [64, 128].
    assert slot_bytes(checked(base), 8) == 2 * 8 * (2 * 128 + 2 * 96 + 3 * 192) * 2
    assert slot_bytes(checked(base), 4, "f32") == slot_bytes(checked(base), 8)


def test_only_tokens_that_texts_do_not_have_choose_a_slot(base: Path) -> None:
    header = checked(base)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert {tokens[token] for token in control_tokens(header)} == {
        f"<0x{byte:02X}>" for byte in (0xC0, 0xC1, *range(0xF5, 0x100))
    }
    kinds = [1] * len(tokens)
    assert obstacle(changed(header, **{"tokenizer.ggml.token_type": kinds})) == (
        "each of its tokens can be in a text, and slots need some that cannot"
    )
    # Control tokens: one is the BOS, one is in the chat template, and one is free.
    kinds[1] = kinds[tokens.index("<|im_start|>")] = kinds[9] = 3
    assert control_tokens(changed(header, **{"tokenizer.ggml.token_type": kinds})) == [9]


def test_bytes_that_utf8_does_not_use_choose_a_slot_in_byte_level_vocabularies() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ("a", "À", "Ã", "ÿ", "ÿ2", "<pad>"),
        "tokenizer.ggml.token_type": (1, 1, 1, 1, 1, 3),
        "tokenizer.ggml.padding_token_id": 5,
    }
    assert control_tokens(GgufHeader(metadata, {})) == [1, 3]

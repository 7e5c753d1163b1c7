"""LoRA files with factors for all matrices of a tiny LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from runtime.bundles import low_rank, write_adapter

MODULES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ALL_MATRICES = [f"blk.{layer}.{module}.weight" for layer in (0, 1) for module in MODULES]


@pytest.fixture(scope="session")
def base(tiny_gguf: Callable[[str], Path]) -> Path:
    return tiny_gguf("llama")


@pytest.fixture(scope="session")
def adapter_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`adapter_of(seed)`: a random adapter of rank 4 that changes logits by about 1."""
    folder = tmp_path_factory.mktemp("adapters")
    return cache(lambda seed: write_adapter(base, folder / f"{seed}.gguf", low_rank(base, seed, 4, ALL_MATRICES, 0.1)))

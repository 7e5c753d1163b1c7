"""Hunyuan, dense: LLaMA's layers with norms on the queries and keys of each head, after their rotation."""

from __future__ import annotations

from .base import Architecture

ARCHITECTURE = Architecture(
    "hunyuan-dense",
    ("hunyuan_v1_dense",),
    "HunYuanDenseV1",
    norms_queries_and_keys=True,
    norm_names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    transformers_reads_gguf=False,
)

"""Hunyuan, dense: LLaMA's layers with norms on the queries and keys of each head, after their rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .base import Architecture


class _Hunyuan(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """transformers and llama.cpp's converter scale a rotary embedding in the same way only by alpha."""
        super().check_config(config)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" and not (kind == "dynamic" and rope.get("alpha")):
            message = f"the base scales its rotary embedding ({str(kind)[:80]}) without alpha, which is not supported"
            raise IncompatibleError(message, "use one with alpha, such as Hunyuan-0.5B-Instruct")


ARCHITECTURE = _Hunyuan(
    "hunyuan-dense",
    ("hunyuan_v1_dense",),
    "HunYuanDenseV1",
    norms_queries_and_keys=True,
    norm_names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    transformers_reads_gguf=False,
)

"""What an architecture's file says of it: names, the order of rows, norms, and what transformers must be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.formats.gguf_file import GgufHeader

ENTRIES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""What GGUF calls the entries of config.json, behind the architecture's name."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of decoders. Its defaults are those of LLaMA.

    `gguf` is the name in GGUF files, `model_types` those in config.json, `rms_norm` the class of its norms in
    transformers, which multiply by their weights plus `norm_offset`; GGUF files hold the sum.
    """

    gguf: str
    model_types: tuple[str, ...]
    rms_norm: str
    norm_offset: float = 0.0
    norms_per_layer: int = 2
    """Norms of a layer that read values as wide as the model."""
    norms_queries_and_keys: bool = False
    interleaves_rows: bool = False
    """Whether llama.cpp's rotary embedding turns neighbouring numbers of a head together, where Hugging Face's turns
    the two halves: then the rows of q and k in a GGUF file, and its keys, lie in another order (see layout.py)."""

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """Entries of transformers' configuration that it does not take from a GGUF file as llama.cpp does."""
        head_dim = header.metadata.get(f"{self.gguf}.attention.key_length")
        return {"head_dim": head_dim} if isinstance(head_dim, int) else {}

    def embedding_scale(self, _header: GgufHeader) -> float | None:
        """What the embeddings are multiplied by, where onnxruntime-genai's builder rounds it; else None."""
        return None

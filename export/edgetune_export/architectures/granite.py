"""Granite 3, and Granite 4 in GGUF files: LLaMA's layers, with factors on embeddings, attention, residuals, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .base import Architecture

_FACTORS = {
    "embedding_multiplier": "granite.embedding_scale",
    "attention_multiplier": "granite.attention.scale",
    "residual_multiplier": "granite.residual_scale",
    "logits_scaling": "granite.logit_scale",
}


class _Granite(Architecture):
    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """The config with these factors. IncompatibleError for a base without rotary embedding."""
        if header.metadata.get("granite.rope.scaling.finetuned") is False:
            message = "the base is a Granite without rotary embedding, which is not supported"
            raise IncompatibleError(message, "use a Granite 3 or a dense Granite 4")
        factors = {name: header.metadata[key] for name, key in _FACTORS.items() if key in header.metadata}
        return {**super().whole_config(header), **factors}

    def logits_of(self, output: Any, config: Any) -> Any:  # noqa: ANN401 - a tensor, and transformers' configuration
        """Divided by the logits_scaling of the config."""
        return output / config.logits_scaling


ARCHITECTURE = _Granite(
    "granite",
    ("granite",),
    "Granite",
    interleaves_rows=True,
    frequency_tensor="rope_freqs.weight",
    transformers_reads_gguf=False,
    unchanged_logits={"logits_scaling": 1.0},
)

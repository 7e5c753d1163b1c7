"""OLMo 2: norms after each block instead of before it, and over all queries and all keys of a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .base import Architecture


class _Olmo2(Architecture):
    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """IncompatibleError for OLMo 3, which has the same GGUF name."""
        if header.metadata.get("olmo2.attention.sliding_window"):
            message = "the base is an OLMo 3, whose sliding-window attention is not supported"
            raise IncompatibleError(message, "use an OLMo 2")
        return super().whole_config(header)


ARCHITECTURE = _Olmo2(
    "olmo2",
    ("olmo2",),
    "Olmo2",
    norms_queries_and_keys=True,
    transformers_reads_gguf=False,
    refusals={"onnx": "onnxruntime-genai's builder does not support it"},
)

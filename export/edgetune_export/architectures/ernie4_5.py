"""ERNIE 4.5, dense: LLaMA's layers, whose rotary embedding rotates neighbouring values in transformers too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .base import Architecture


class _Ernie(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """llama.cpp does not add biases."""
        super().check_config(config)
        if config.get("use_bias"):
            message = "the base is an ERNIE with biases (use_bias), which llama.cpp does not support"
            raise IncompatibleError(message, "use one without, such as ERNIE-4.5-0.3B-PT")


ARCHITECTURE = _Ernie("ernie4_5", ("ernie4_5",), "Ernie4_5", transformers_reads_gguf=False)

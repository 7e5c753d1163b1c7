"""Read genai_config.json, which onnxruntime-genai's builder writes next to a graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import parsing
from edgetune_runtime.formats.regular_file import reading

CONFIG_NAME = "genai_config.json"
_LONGEST_CONTEXT, _LARGEST_HEAD = 1 << 24, 2048
_SIZES = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers")


@dataclass(frozen=True)
class OnnxConfig:
    """The values of genai_config.json that the runtime uses."""

    trained_context_length: int
    head_size: int
    end_tokens: tuple[int, ...]
    width: int
    heads: int
    layers: int
    vocabulary: int


def read_config(path: Path) -> OnnxConfig:
    """Read the file; NotFoundError when it is missing, VerificationError when a value is missing or wrong."""
    with reading(path) as file:
        text = file.read()
    problem = f"{path} is not a {CONFIG_NAME} as onnxruntime-genai's builder writes it"
    with parsing(problem, "build the bundle again"):
        model = json.loads(text.decode())["model"]
        ends = model["eos_token_id"]
        end_tokens = tuple(int(token) for token in (ends if isinstance(ends, list) else [ends]))
        context_length, decoder = int(model["context_length"]), model["decoder"]
        head_size, width, heads, layers = (int(decoder[key]) for key in _SIZES)
        if not (0 < context_length <= _LONGEST_CONTEXT and 0 < head_size <= _LARGEST_HEAD):
            raise ValueError(f"a context of {context_length} tokens and heads of size {head_size}")
        return OnnxConfig(context_length, head_size, end_tokens, width, heads, layers, int(model["vocab_size"]))

"""Greedy answers of an engine, and of onnxruntime-genai on the same folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime_genai as og
from edgetune_runtime.engines.onnx.engine import OnnxEngine


def greedy(engine: OnnxEngine, prompt: list[int], active: Mapping[str, float], count: int) -> list[int]:
    """At most `count` tokens of the engine, without the token that ends a text."""
    engine.activate(active)
    engine.truncate(0)
    tokens, logits = [], engine.decode(prompt)
    while len(tokens) < count and not engine.tokenizer.is_end(int(logits.argmax())):
        tokens.append(int(logits.argmax()))
        logits = engine.decode(tokens[-1:])
    return tokens


def greedy_in_genai(model: Any, adapters: Any, prompt: list[int], name: str | None, count: int) -> list[int]:  # noqa: ANN401 - of a library without types
    """At most `count` tokens of onnxruntime-genai, which keeps the token that ends a text to itself."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0)[len(prompt) :])

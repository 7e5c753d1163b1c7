"""PEFT adapters with random A and B on tiny bases, saved by PEFT, with the logits that torch computes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_export import architectures
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx.engine import OnnxEngine

EVERYWHERE: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": EVERYWHERE,
    "rslora": {**EVERYWHERE, "use_rslora": True},
    "patterns": {
        **EVERYWHERE,
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 12},
        "alpha_pattern": {"k_proj": 32, "layers.0.mlp.down_proj": 4, ".*o_proj": 24},
    },
    "q and v": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
}


@dataclass(frozen=True)
class Tuned:
    """A PEFT folder, with torch's logits [tokens, vocabulary] of the base and of the adapted model."""

    folder: Path
    peft: Any
    plain: Callable[[Sequence[int]], np.ndarray]
    adapted: Callable[[Sequence[int]], np.ndarray]


@pytest.fixture(scope="session")
def tune(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tuned]:
    """`tune(arch, kind)`: an adapter of that kind on the tiny base, whose matrices are those of its f16 file."""

    @cache
    def make(arch: str, kind: str = "plain", seed: int = 1, std: float = 0.1) -> Tuned:
        return _save_random_adapter(tiny_folder(arch), tmp_path_factory.mktemp("peft"), KINDS[kind], seed, std)

    return make


@pytest.fixture(scope="session")
def save_random_adapter() -> Callable[..., Tuned]:
    """`save_random_adapter(model, folder, options)`: a random LoRA with any of PEFT's options."""
    return _save_random_adapter


def _save_random_adapter(model: Path, folder: Path, options: dict[str, Any], seed: int = 1, std: float = 0.1) -> Tuned:
    """Put a random LoRA with these options on the model and save it in `folder`."""
    import torch  # noqa: PLC0415 - seconds, which only some tests need
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from tiny import FIRST_TOKENS  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from edgetune.shipping.verify import logits_of  # noqa: PLC0415

    config = AutoConfig.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    if config.vocab_size > FIRST_TOKENS:
        base.resize_token_embeddings(FIRST_TOKENS)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    fixed = architectures.of_model_type(config.model_type).fixed_modules
    peft = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM", exclude_modules=[*fixed] or None)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    # Fewer embeddings than the folder has are no change to save.
    peft.save_pretrained(folder, save_embedding_layers=False)

    adapted = logits_of(peft)

    def plain(tokens: Sequence[int]) -> np.ndarray:
        with peft.disable_adapter():
            return adapted(tokens)

    return Tuned(folder, peft, plain, adapted)


@pytest.fixture
def open_engine() -> Iterator[Callable[..., GgufEngine | OnnxEngine]]:
    """`open_engine(base, adapter=None)`: the engine of a GGUF or an ONNX file, with the adapter file active."""
    engines: list[GgufEngine | OnnxEngine] = []

    def open_(base: Path, adapter: Path | None = None) -> GgufEngine | OnnxEngine:
        make = OnnxEngine if base.suffix == ".onnx" else GgufEngine
        engine = make(base, context_length=128, threads=1)
        engines.append(engine)
        if adapter is not None:
            engine.load_adapter("adapter", adapter)
            engine.activate({"adapter": 1.0})
        return engine

    yield open_
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    """Token rows within the tiny vocabulary, longer than the tiny Gemma's sliding window."""
    random = np.random.default_rng(0)
    return [random.integers(5, 380, length).tolist() for length in (40, 24)]

"""Bases, also with random weights, and bundles with random adapters: for what depends on sizes and not on answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.bases import Base

# Imports are in functions, so that the processes of other setups do not load torch.


def resolve_base(name: str = "smollm2-135m", *, quantization: str | None = None, work: Path = Path()) -> Base:
    """The base, quantized in `work`."""
    from edgetune.bases import resolve
    from edgetune.common.progress import Progress

    progress = Progress(quiet=True)
    return resolve(name, folder=Path(), quantization=quantization, work=work, progress=progress, converter=None)


@dataclass(frozen=True)
class Shape:
    """Hidden size, layers, query heads, key heads and intermediate size of a LLaMA model."""

    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int


def write_base(folder: Path, shape: Shape) -> int:
    """Write a transformers folder with random f16 weights and SmolLM2's tokenizer; returns the number of parameters."""
    import torch
    from edgetune_export.backends.onnx.tokenizer import write_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    smollm = resolve_base()
    metadata = smollm.header.metadata
    config = LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.inner,
        tie_word_embeddings=True,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata["llama.rope.freq_base"],
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        dtype="float16",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    # About a shard per layer.
    model.save_pretrained(folder, max_shard_size="150MB")
    write_tokenizer(smollm.path, folder)
    return int(model.num_parameters())


def random_adapters(base: Base, names: Iterable[str], rank: int, out: Path) -> dict[str, Path]:
    """PEFT folders in `out` with random LoRAs on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from edgetune.bases import load_torch

    first, *others = names
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(load_torch(base, torch.float32), config, adapter_name=first)
    for name in others:
        peft.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                # Large enough to change most answers, small enough to keep them sensible.
                parameter.normal_(0, 0.02 if "lora_B" in key else 0.05)
    peft.save_pretrained(out)
    return {name: out / name for name in (first, *others)}


def export_random(base: Base, folders: Mapping[str, Path], out: Path, **options: Any) -> Path:  # noqa: ANN401
    """The bundle `out` of the base with these PEFT folders; `options` are those of `edgetune.export_trained`."""
    from edgetune.building.pipeline import export_trained
    from edgetune.common.progress import Progress

    return export_trained(str(base.path), folders, out, progress=Progress(), **options).bundle

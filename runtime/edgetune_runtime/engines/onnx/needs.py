"""The memory that a base needs in onnxruntime, from the sizes of its files and genai_config.json."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines.needs import EngineCost, Needs
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

from . import KV_TYPES, NAME

COST = EngineCost(KV_TYPES, 100.0, 67.0, 700, 2, 0, maps_embedding=True, f32_adapters=True)


def needs_of_base(path: Path, manifest: Manifest, context_length: int) -> Needs:
    """See `EngineNeeds`; VerificationError if genai_config.json lacks a size."""
    try:
        model = json.loads(path.with_name("genai_config.json").read_text(encoding="utf-8"))["model"]
        vocabulary, decoder = int(model["vocab_size"]), model["decoder"]
        width, heads = int(decoder["hidden_size"]), int(decoder["num_attention_heads"])
        layers = int(decoder["num_hidden_layers"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        message = f"{path.with_name('genai_config.json')} does not give the model's sizes: {error}"
        raise VerificationError(message, COPY_BUNDLE_AGAIN) from error
    base_bytes = model_bytes(manifest, manifest.base.files[NAME])
    return Needs(
        base_bytes=base_bytes,
        read_bytes=base_bytes,
        read_parameters=manifest.base.parameters,
        head_parameters=vocabulary * width,
        layers=layers,
        heads=heads,
        embedding_length=width,
        # The file does not give it; most models have about three times their width.
        feed_forward_length=3 * width,
        vocabulary=vocabulary,
        kv_values_per_token=manifest.base.kv_values_per_token,
        context_length=context_length,
        engine=NAME,
        # 8 bits per weight.
        head_bytes=vocabulary * width,
    )


def model_bytes(manifest: Manifest, file: str) -> int:
    """See `EngineNeeds`: the graph, and its weights, which are files of their own beside it."""
    folder = PurePosixPath(file).parent
    weights = [name for name in map(PurePosixPath, manifest.files) if name.parent == folder and name.suffix == ".data"]
    return manifest.files[file].bytes + sum(manifest.files[str(name)].bytes for name in weights)

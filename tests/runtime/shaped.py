"""Folded adapters in, bundles of both formats out; and what torch computes behind a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_export.adapters import shapes
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf import backend as gguf
from edgetune_export.backends.onnx import backend as onnx
from edgetune_runtime.bundle import AdapterEntry, read_manifest
from edgetune_runtime.formats.gguf_adapter import cache_shape
from edgetune_runtime.formats.gguf_file import read_header
from runtime.bundles import write_bundle, write_manifest

BACKENDS: dict[str, Any] = {"gguf": gguf, "onnx": onnx}


def random_prefix(base: Path, tokens: int, seed: int = 0, name: str = "prefix") -> shapes.Prefix:
    """Keys and values of the base's shape that no tokens give."""
    shape, random = cache_shape(read_header(base)), np.random.default_rng(seed)
    heads = (shape.layers, shape.heads, tokens)
    keys, values = random.normal(0, 1, (*heads, shape.key_size)), random.normal(0, 1, (*heads, shape.value_size))
    return shapes.Prefix(name, "prefix", keys.astype(np.float32), values.astype(np.float32))


def torch_logits(
    source: Source, tokens: Sequence[int], prefix: shapes.Prefix | None = None, delta: shapes.LowRank | None = None
) -> np.ndarray:
    """Torch's logits [tokens, vocabulary] of the base behind the prefix, with the delta added to its weights."""
    import torch  # noqa: PLC0415 - torch only where a test needs it
    from transformers import DynamicCache  # noqa: PLC0415

    model = source.model
    assert model is not None
    cache = DynamicCache(config=model.config)
    for layer in range(len(prefix.keys) if prefix else 0):
        assert prefix is not None
        keys, values = (torch.from_numpy(array[layer][None]) for array in (prefix.keys, prefix.values))
        cache.update(keys, values, layer)
    with torch.no_grad(), _added(model, delta):
        logits = model(input_ids=torch.tensor([list(tokens)]), cache=cache, use_cache=True).logits
    return np.asarray(logits[0].numpy())


def write_shaped(
    out: Path, source: Source, adapters: Mapping[str, shapes.Adapter], backends: Sequence[str] = ("gguf", "onnx")
) -> Path:
    """A bundle of the base with these adapters in each backend's format; all values but a prefix's are float32."""
    write_bundle(out, source.path, {})
    base = read_manifest(out).base
    files: dict[str, dict[str, str]] = {"": {}} | {name: {} for name in adapters}
    for backend in backends:
        writer = BACKENDS[backend]
        model = out / base.files["gguf"]
        if backend == "onnx":
            model = onnx.write_base(source, out / "base", list(adapters.values()))
        files[""][backend] = model.relative_to(out).as_posix()
        for name, adapter in adapters.items():
            file = out / "adapters" / name / writer.ADAPTER_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            writer.write_adapter(adapter, model, file, dtype="f32", base_fingerprint=source.fingerprint)
            files[name][backend] = file.relative_to(out).as_posix()
    entries = {
        name: AdapterEntry(
            name,
            adapter.method,
            dict.fromkeys(backends, adapter.shape),
            files[name],
            source.fingerprint,
            prefix_tokens=adapter.tokens if isinstance(adapter, shapes.Prefix) else 0,
            invocation=adapter.invocation if isinstance(adapter, shapes.LowRank) else (),
        )
        for name, adapter in adapters.items()
    }
    write_manifest(out, replace(base, files=files[""]), entries)
    return out


@contextmanager
def _added(model: Any, delta: shapes.LowRank | None) -> Iterator[None]:  # noqa: ANN401 - a transformers model
    import torch  # noqa: PLC0415 - as above

    weights = {name: model.get_submodule(name).weight for name in (delta.modules if delta else ())}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            assert delta is not None
            weight.add_(torch.from_numpy(delta.modules[name].b @ delta.modules[name].a))
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])

"""A small bundle of an encoder: a tiny BERT with two tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edgetune_export.adapters.shapes import Delta, Head, LowRank
from edgetune_export.backends.base import EncoderSource
from edgetune_export.backends.onnx.encoder import write_adapter, write_base
from edgetune_export.pack import pack
from edgetune_runtime.bundle import CLASSIFICATION, AdapterEntry, BaseEntry, Manifest, sha256_of
from tiny import FINGERPRINT

LABELS = {"place": ("hall", "kitchen", "none"), "power": ("on", "off")}
RANKS = {"place": 4, "power": 2}
MODULES = ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense")
WIDTHS = {MODULES[0]: (64, 64), MODULES[1]: (128, 64)}


def low_rank(name: str) -> LowRank:
    """A random adapter; `power` changes one module alone."""
    random = np.random.default_rng(RANKS[name])
    modules = {}
    for module in MODULES[: RANKS[name] // 2]:
        columns, rows = WIDTHS[module]
        a, b = random.normal(0, 0.5, (RANKS[name], columns)), random.normal(0, 0.5, (rows, RANKS[name]))
        modules[module] = Delta(a.astype(np.float32), b.astype(np.float32))
    return LowRank(name, "lora", modules, head=head(name))


def head(name: str) -> Head:
    random = np.random.default_rng(10 + RANKS[name])
    labels = len(LABELS[name])
    weight, bias = random.normal(0, 0.5, (labels, 64)), random.normal(0, 1, labels)
    return Head(weight.astype(np.float32), bias.astype(np.float32))


def write_encoder_bundle(source: EncoderSource, work: Path) -> Path:
    """The bundle `home` in the folder `work`, of a base with the layers of a BERT."""
    graph = write_base(source, work / "base", [low_rank(name) for name in LABELS])
    entries = {}
    for name, labels in LABELS.items():
        file = f"adapters/{name}/adapter.onnx_adapter"
        write_adapter(low_rank(name), graph, work / file, base_fingerprint=FINGERPRINT)
        entries[name] = AdapterEntry(
            name, "lora", {"onnx": "low_rank"}, {"onnx": file}, FINGERPRINT, metric="label", labels=labels
        )
    files = {"onnx": "base/onnx/model.onnx"}
    tokenizer = sha256_of(source.path.with_name("tokenizer.json"))
    base = BaseEntry("tiny", FINGERPRINT, "bert", "f32", 1, 64, 2, 0, tokenizer, "", files)
    manifest = Manifest("home", base, entries, {}, context_length=32, task=CLASSIFICATION)
    return pack(work, work / "home", manifest)

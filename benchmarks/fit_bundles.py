"""Bundles with random adapters, for measurements of memory and speed: the size counts, not the answers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf import backend as gguf
from edgetune_export.backends.onnx import backend as onnx
from edgetune_runtime.bundle import MANIFEST_NAME, AdapterEntry, BaseEntry, FileEntry, Manifest, sha256_of
from edgetune_runtime.formats.gguf_file import digest_of_chat_template, digest_of_tokenizer, read_header

from edgetune import bases
from edgetune.progress import Progress

RANK = 8
SYSTEMS = (
    "You control the lamps, the blinds and the heating of a house. Answer with one JSON object: the device, the room "
    "and the action. Leave out what the request does not name. Never explain the answer and never ask back.",
    "Name the intent of the request in one word: light, climate, cover, media, lock, timer, weather or talk.",
    "Reply as a polite butler of few words, in one sentence, and do not repeat what was asked.",
)


def make_bundle(out: Path, work: Path, quantization: str, adapters: int) -> Path:
    """SmolLM2-135M in `quantization` with this many random rank-8 adapters on all linear modules, in both formats."""
    base = bases.resolve(
        "smollm2-135m",
        folder=Path(),
        quantization=quantization,
        work=work,
        progress=Progress(quiet=True),
        converter=None,
    )
    source = Source(base.path, base.fingerprint, bases.load_torch(base, torch.float32), work / quantization)
    source.work.mkdir(parents=True, exist_ok=True)
    lora = random_lora(source.model)
    (out / "base").mkdir(parents=True)
    shutil.copy(base.path, out / "base/model.gguf")
    graph = onnx.write_base(source, out / "base", [lora])
    for name in names_of(adapters):
        folder = out / "adapters" / name
        folder.mkdir(parents=True)
        gguf.write_adapter(lora, base.path, folder / gguf.ADAPTER_FILE, dtype="f16", base_fingerprint=base.fingerprint)
        onnx.write_adapter(lora, graph, folder / onnx.ADAPTER_FILE, dtype="f32", base_fingerprint=base.fingerprint)
    header = read_header(base.path)
    entry = BaseEntry(
        name="smollm2-135m",
        fingerprint=base.fingerprint,
        architecture=header.architecture,
        quantization=quantization,
        parameters=134_515_008,
        trained_context_length=bases.trained_context_length(header),
        layers=30,
        kv_values_per_token=30 * 2 * 3 * 64,
        tokenizer_sha256=digest_of_tokenizer(header),
        chat_template_sha256=digest_of_chat_template(header),
        files={"gguf": "base/model.gguf", "onnx": f"base/{onnx.MODEL_FILE}"},
    )
    return write_manifest(out, entry, list(lora.modules), adapters)


def write_manifest(out: Path, base: BaseEntry, modules: Sequence[str], adapters: int) -> Path:
    """The manifest of a bundle whose files are there."""
    entries = {}
    for number, name in enumerate(names_of(adapters)):
        files = {"gguf": f"adapters/{name}/{gguf.ADAPTER_FILE}", "onnx": f"adapters/{name}/{onnx.ADAPTER_FILE}"}
        shapes = dict.fromkeys(files, "low_rank")
        system = f"{SYSTEMS[number % len(SYSTEMS)]} ({name})"
        entries[name] = AdapterEntry(
            name, "lora", shapes, files, base.fingerprint, dict.fromkeys(modules, RANK), system=system
        )
    files = {
        path.relative_to(out).as_posix(): FileEntry(sha256_of(path), path.stat().st_size)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    manifest = Manifest("fit", base, entries, files, context_length=1024)
    (out / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return out


def with_fewer(bundle: Path, manifest: Manifest, adapters: int, out: Path) -> Path:
    """The same bundle with only the first adapters; its files are links to those of `bundle`."""
    names = names_of(adapters)
    dropped = {f"adapters/{name}/" for name in manifest.adapters if name not in names}
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(tuple(dropped))}
    out.mkdir(parents=True)
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).hardlink_to(bundle / name)
    kept = replace(manifest, files=files, adapters={name: manifest.adapters[name] for name in names})
    (out / MANIFEST_NAME).write_text(kept.to_json(), encoding="utf-8")
    return out


def names_of(adapters: int) -> list[str]:
    """The names of the adapters of a bundle."""
    return [f"task{number}" for number in range(adapters)]


def random_lora(model: torch.nn.Module | None) -> LowRank:
    """A random rank-8 change of every linear module of the layers, small enough to leave the answers readable."""
    assert model is not None
    rng = np.random.default_rng(0)
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            rows, columns = module.weight.shape
            a, b = rng.normal(0, 0.05, (RANK, columns)), rng.normal(0, 0.02, (rows, RANK))
            modules[name] = Delta(a.astype(np.float32), b.astype(np.float32))
    return LowRank("random", "lora", modules)

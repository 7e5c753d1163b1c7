"""Adapter settings in, adapter files and bundles out, GGUF and ONNX: what the runtime's tests run on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from edgetune_export.adapters import shapes
from edgetune_export.architectures.layout import base_columns, base_rows, name_map
from edgetune_export.architectures.shape import linear_modules
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx import backend as onnx
from edgetune_export.drafts import Row, table_of
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import (
    BASE,
    MANIFEST_NAME,
    AdapterEntry,
    BaseEntry,
    FileEntry,
    GoldenAnswer,
    Manifest,
    RoutedCall,
    RouterEntry,
    read_manifest,
    sha256_of,
)
from edgetune_runtime.decoding.drafts import write_table
from edgetune_runtime.engines import load_needs
from edgetune_runtime.engines.needs import adapter_size
from edgetune_runtime.formats.gguf_file import GgufHeader, digest_of_chat_template, digest_of_tokenizer, read_header
from edgetune_runtime.inference.golden import ask
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.routing.classifier import ROUTER_FILE, PromptClassifier, write_classifiers
from edgetune_runtime.inference.routing.features import count_buckets

MODULES = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
# Of a base whose first layer is recurrent.
IN_PLACE = ("blk.0.shortconv.in_proj.weight", "blk.0.attn_gate.weight")
HYBRIDS = (("gguf", "lfm2"), ("gguf", "qwen35"), ("onnx", "lfm2"), ("onnx", "qwen35"))
"""The engines of bases with recurrent layers, whose states cannot be cut."""
CASES = (("gguf", "llama"), ("onnx", "llama"), *HYBRIDS)
LowRank = dict[str, tuple[np.ndarray, np.ndarray]]
LIGHT_ON = GoldenAnswer(({"role": "user", "content": "turn on the light"},), "", 8)
"""A question for `add_golden`."""


def low_rank(base: Path, seed: int, rank: int = 4, modules: Sequence[str] = MODULES, size: float = 0.5) -> LowRank:
    """Random A [rank, in] and B [out, rank] for each module, large enough to change greedy answers."""
    tensors = read_header(base).tensors
    random = np.random.default_rng(seed)
    pairs = {}
    for name in (name if name in tensors else next(filter(tensors.get, IN_PLACE)) for name in modules):
        columns, rows = tensors[name].shape
        a, b = random.normal(0, size, (rank, columns)), random.normal(0, size, (rows, rank))
        pairs[name] = (a.astype(np.float32), b.astype(np.float32))
    return pairs


def concatenated(first: LowRank, second: LowRank) -> LowRank:
    """The sum of two adapters as one adapter of their ranks' sum."""
    return {
        name: (np.concatenate([a, second[name][0]]), np.concatenate([b, second[name][1]], axis=1))
        for name, (a, b) in first.items()
    }


def write_adapter(base: Path, out: Path, pairs: LowRank, **metadata: str) -> Path:
    """A GGUF LoRA file whose scale is that of the matrices; `metadata` replaces or adds string values."""
    out.parent.mkdir(parents=True, exist_ok=True)
    header = read_header(base)
    writer = gguf.GGUFWriter(out, metadata.pop("architecture", header.architecture))
    values = {"general.type": "adapter", "adapter.type": "lora", **metadata}
    for key, value in values.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", float(next(iter(pairs.values()))[0].shape[0]))
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def folded(base: Path, pairs: LowRank, name: str = "adapter") -> shapes.LowRank:
    """The same adapter by the names, and with the rows in the order, of the Hugging Face model."""
    header = read_header(base)
    names = name_map(header)
    known = {f"{names.get_name(name)}.weight": name for name in linear_modules(header)}
    modules = {}
    for tensor, (a, b) in pairs.items():
        rows, columns = (order(header.tensors[tensor], header) for order in (base_rows, base_columns))
        modules[known[tensor]] = shapes.Delta(
            a if columns is None else a[:, np.argsort(columns)], b if rows is None else b[np.argsort(rows)]
        )
    return shapes.LowRank(name, "lora", modules)


def write_onnx_adapter(source: Source, graph: Path, out: Path, pairs: LowRank, fingerprint: str | None = None) -> Path:
    """The same adapter as an `.onnx_adapter` file for the graph that was made of `source`."""
    made_for = fingerprint or source.fingerprint
    onnx.write_adapter(folded(source.path, pairs), graph, out, base_fingerprint=made_for)
    return out


@dataclass(frozen=True)
class Adapter:
    """What a test wants of one adapter in a bundle."""

    pairs: LowRank
    scale: float = 1.0
    system: str | None = None
    labels: tuple[str, ...] = ()
    fingerprint: str | None = None


def write_bundle(
    out: Path, base: Path, adapters: Mapping[str, Adapter], merged: Mapping[str, Path] | None = None, **changes: object
) -> Path:
    """A bundle of a copy of `base` with these adapters; `merged` adds whole models, `changes` go into the manifest."""
    (out / "base").mkdir(parents=True)
    shutil.copy(base, out / "base/model.gguf")
    fingerprint = sha256_of(base)
    entries = {}
    for name, adapter in adapters.items():
        file = f"adapters/{name}/adapter.gguf"
        tied = {"edgetune.base_fingerprint": adapter.fingerprint or fingerprint}
        write_adapter(base, out / file, adapter.pairs, **tied)
        entries[name] = AdapterEntry(
            name, "lora", {"gguf": "low_rank"}, {"gguf": file}, fingerprint,
            scale=adapter.scale, system=adapter.system, labels=adapter.labels,
        )  # fmt: skip
    for name, model in (merged or {}).items():
        file = f"adapters/{name}/model.gguf"
        (out / file).parent.mkdir(parents=True)
        shutil.copy(model, out / file)
        # The scale is in the weights.
        entries[name] = AdapterEntry(name, "lora", {"gguf": "merged"}, {"gguf": file}, fingerprint, scale=0.5)
    write_manifest(out, _base_entry(read_header(base), fingerprint), entries, **changes)
    return out


def add_onnx(bundle: Path, source: Source, adapters: Mapping[str, Adapter]) -> None:
    """Put the base, these adapters and the merged models of a bundle into it as ONNX files too."""
    manifest = read_manifest(bundle)
    base = bundle / manifest.base.files["gguf"]
    graph = onnx.write_base(source, bundle / "base", [folded(base, adapter.pairs) for adapter in adapters.values()])
    files = {}
    for name, entry in manifest.adapters.items():
        folder = bundle / "adapters" / name
        if entry.shapes["gguf"] == "merged":
            files[name] = onnx.write_base(replace(source, path=bundle / entry.files["gguf"]), folder, ())
        else:
            adapter = adapters[name]
            out = folder / onnx.ADAPTER_FILE
            files[name] = write_onnx_adapter(source, graph, out, adapter.pairs, adapter.fingerprint)
    named = {name: file.relative_to(bundle).as_posix() for name, file in {**files, "": graph}.items()}
    entries = {
        name: replace(
            entry,
            files={**entry.files, "onnx": named[name]},
            shapes={**entry.shapes, "onnx": entry.shapes["gguf"]},
        )
        for name, entry in manifest.adapters.items()
    }
    entry = replace(manifest.base, files={**manifest.base.files, "onnx": named[""]})
    write_manifest(bundle, entry, entries)


def write_both(out: Path, source: Source, adapters: Mapping[str, Adapter]) -> Path:
    """A bundle of the base with these adapters in both formats."""
    bundle = write_bundle(out, source.path, adapters)
    add_onnx(bundle, source, adapters)
    return bundle


def write_manifest(out: Path, base: BaseEntry, adapters: Mapping[str, AdapterEntry], **changes: object) -> None:
    """`manifest.json` with the digests of the files that are there."""
    files = {
        path.relative_to(out).as_posix(): FileEntry(sha256_of(path), path.stat().st_size)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    values: dict[str, Any] = {"context_length": 256, "threads": 1, **changes}
    manifest = Manifest(out.name, base, adapters, files, **values)
    (out / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _base_entry(header: GgufHeader, fingerprint: str) -> BaseEntry:
    prefix = header.architecture
    return BaseEntry(
        name="tiny",
        fingerprint=fingerprint,
        architecture=prefix,
        quantization=None,
        parameters=100_000,
        trained_context_length=header.metadata[f"{prefix}.context_length"],
        layers=header.metadata[f"{prefix}.block_count"],
        kv_values_per_token=128,
        tokenizer_sha256=digest_of_tokenizer(header),
        chat_template_sha256=digest_of_chat_template(header),
        files={"gguf": "base/model.gguf"},
        values_by_type={"gguf": header.values_by_type},
    )


def change_manifest(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` have its way with the JSON values of a bundle's manifest."""
    raw = json.loads((copy / MANIFEST_NAME).read_text())
    change(raw)
    (copy / MANIFEST_NAME).write_text(json.dumps(raw))


def make_foreign(raw: dict[str, Any]) -> None:
    """Make the JSON values of a manifest those of a bundle of another base."""
    raw["base"]["fingerprint"] = "0" * 64
    for adapter in raw["adapters"].values():
        adapter["base_fingerprint"] = "0" * 64


def room_for(bundle: Path, engine: str, count: int, contexts: int = 1) -> float:
    """The `adapters_mb` that so many adapters like the bundle's first one need, and half of one more."""
    manifest = read_manifest(bundle)
    size, cost = adapter_size(manifest, next(iter(manifest.adapters.values())), engine), load_needs(engine).COST
    return (count + 0.5) * (size.file_bytes + contexts * size.modules * cost.module_bytes) / 1e6


def add_router(bundle: Path, words: Mapping[str, Mapping[str, str]], below: str = BASE) -> RouterEntry:
    """Put a router into a bundle that knows one word of each adapter, per kind of call; returns its entry."""
    classifiers = {call: _classifier_of(tuple(one.values())) for call, one in words.items()}
    write_classifiers(bundle / "adapters" / ROUTER_FILE, classifiers)
    calls = {call: RoutedCall(tuple(one), 0.5, dict.fromkeys(one, 1.0), 1.0) for call, one in words.items()}
    entry, file = RouterEntry(f"adapters/{ROUTER_FILE}", calls, below), bundle / "adapters" / ROUTER_FILE
    about = {entry.file: _described(file)}
    change_manifest(bundle, lambda raw: raw.update(router=asdict(entry), files={**raw["files"], **about}))
    return entry


def add_draft_table(bundle: Path, engine: str, prompts: Sequence[str]) -> None:
    """Put a table of what its adapter `one` answers to some prompts into a bundle."""
    rows, path = [], bundle / "adapters/one/draft.bin"
    with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
        for prompt in prompts:
            call = loaded_bundle(runtime).call(prompt, "one")
            assert runtime.generate(prompt, adapter="one", max_tokens=40).timings.accepted == 0
            rows += [Row(list(call.pool.first.tokens), len(call.job.tokens))] * 3
    write_table(path, table_of(rows, lambda _: False, read_manifest(bundle).base.tokenizer_sha256))

    def add(raw: dict[str, Any]) -> None:
        raw["adapters"]["one"]["draft"] = "adapters/one/draft.bin"
        raw["files"]["adapters/one/draft.bin"] = _described(path)

    change_manifest(bundle, add)


def add_golden(bundle: Path, engines: Sequence[str], prompts: Mapping[str, GoldenAnswer]) -> Path:
    """Store what adapters answer on this machine as their golden answers; returns the bundle."""
    golden: dict[str, dict[str, Any]] = {name: {} for name in prompts}
    for engine in engines:
        with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
            for name, prompt in prompts.items():
                golden[name][engine] = asdict(replace(prompt, answer=ask(runtime, name, prompt)))

    def add(raw: dict[str, Any]) -> None:
        for name, answers in golden.items():
            raw["adapters"][name]["golden"] = answers

    change_manifest(bundle, add)
    return bundle


def _described(file: Path) -> dict[str, Any]:
    return asdict(FileEntry(sha256_of(file), file.stat().st_size))


def _classifier_of(words: Sequence[str]) -> PromptClassifier:
    buckets = 1 << 14
    weights = np.zeros((buckets, len(words)), np.float16)
    for column, word in enumerate(words):
        weights[list(count_buckets(word, buckets)), column] = 20
    return PromptClassifier(np.ones(buckets, np.float16), weights, np.full(len(words), -4, np.float32))

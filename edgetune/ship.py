"""A base and trained PEFT folders in, a checked bundle out: fold, export, parity, pack.

What comes before, whether `edgetune build` trained the adapters or someone else did, makes no difference here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from edgetune_devices.fit import kv_bytes_per_token
from edgetune_export.backends._base import Backend
from edgetune_export.fold import LowRank, fold_peft
from edgetune_export.pack import pack
from edgetune_export.parity import Parity, check, compare
from edgetune_export.quantize import describe_quantization
from edgetune_runtime.bundle import AdapterEntry, BaseEntry, Manifest
from edgetune_runtime.engines.gguf import GgufEngine
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.gguf_file import GgufHeader, digest_of_chat_template, digest_of_tokenizer

from . import bases
from .bases import Base
from .progress import Progress

if TYPE_CHECKING:
    from edgetune_export.fold import Floats
    from transformers import PreTrainedModel

BACKEND = "gguf"
# Held-out rows that each adapter is compared on, and prompts that are answered greedily.
PARITY_ROWS = 12
PARITY_PROMPTS = 3
PARITY_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Trained:
    """A trained adapter on its way into a bundle.

    `folder` is PEFT's; `probes` are token rows to compare on, the first of them with `prompt_lengths` to be answered.
    """

    name: str
    folder: Path
    method: str
    probes: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int]
    scale: float = 1.0
    system: str | None = None
    metric: str = "exact"
    labels: tuple[str, ...] = ()
    merged: bool = False
    dtype: str = "f16"
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shipped:
    """What is in the bundle for an adapter: its manifest entry, size in bytes and parity."""

    entry: AdapterEntry
    bytes: int
    parity: Parity


def ship(
    base: Base,
    adapters: Sequence[Trained],
    work: Path,
    out: Path,
    *,
    name: str,
    context_length: int,
    threads: int | None,
    recipe: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Shipped]:
    """Export `adapters`, compare each with what was trained, and pack the bundle `out`; `work` is overwritten.

    Raises VerificationError that names the adapter when one does not say what was trained, and what fold, the backend
    and pack raise. Nothing is left under `out` unless all is right.
    """
    shutil.rmtree(work, ignore_errors=True)
    base_file = f"base/{base.path.name}"
    (work / base_file).parent.mkdir(parents=True)
    (work / base_file).symlink_to(base.path.resolve())
    files = {adapter.name: _export(adapter, base, work, progress) for adapter in adapters}
    parities = _parities(base, adapters, {name: work / file for name, (file, _) in files.items()}, progress)
    shipped: dict[str, Shipped] = {}
    for adapter in adapters:
        file, folded = files[adapter.name]
        entry = AdapterEntry(
            name=adapter.name,
            method=adapter.method,
            shape="merged" if adapter.merged else "low_rank",
            files={BACKEND: file},
            base_fingerprint=base.fingerprint,
            ranks={module: delta.rank for module, delta in folded.modules.items()},
            scale=adapter.scale,
            system=adapter.system,
            metric=adapter.metric,
            labels=adapter.labels,
            parity={BACKEND: asdict(parities[adapter.name])},
            training=adapter.training,
        )
        shipped[adapter.name] = Shipped(entry, (work / file).stat().st_size, parities[adapter.name])
    manifest = Manifest(
        name=name,
        base=_base_entry(base, base_file),
        adapters={adapter: item.entry for adapter, item in shipped.items()},
        files={},
        context_length=context_length,
        threads=threads,
        recipe=recipe,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    pack(work, out, manifest)
    shutil.rmtree(work, ignore_errors=True)
    return shipped


def _export(adapter: Trained, base: Base, work: Path, progress: Progress) -> tuple[str, LowRank]:
    """Fold and write one adapter; returns its path in the bundle and what was folded."""
    backend = cast("Backend", importlib.import_module(f"edgetune_export.backends.{BACKEND}"))
    folded = fold_peft(adapter.folder, adapter.name)
    file = f"adapters/{adapter.name}/{'model' if adapter.merged else 'adapter'}.gguf"
    if adapter.merged:
        progress.say(f"merging {adapter.name} into the base")
        backend.write_merged(folded, base.path, work / file, adapter.scale)
    else:
        backend.write_adapter(folded, base.path, work / file, dtype=adapter.dtype, base_fingerprint=base.fingerprint)
    return file, folded


def _parities(
    base: Base, adapters: Sequence[Trained], files: Mapping[str, Path], progress: Progress
) -> dict[str, Parity]:
    """Run every adapter in torch and in llama.cpp on the same weights and tokens; check all, the base last."""
    import torch  # noqa: PLC0415 - only where something is compared

    progress.say("checking that the bundle says what was trained")
    model = bases.load_torch(base, torch.float32)
    quantization = describe_quantization(base.header)
    longest = max(len(row) for adapter in adapters for row in adapter.probes) + PARITY_ANSWER_TOKENS
    parities: dict[str, Parity] = {}
    with closing(GgufEngine(base.path, context_length=longest)) as engine:
        for adapter in adapters:
            if adapter.merged:
                with closing(GgufEngine(files[adapter.name], context_length=longest)) as merged:
                    parity = _compare(model, adapter, merged)
            else:
                engine.load_adapter(adapter.name, files[adapter.name])
                engine.activate({adapter.name: adapter.scale})
                parity = _compare(model, adapter, engine)
            parities[adapter.name] = parity
            progress.say(f"  {adapter.name}: mean KL {parity.kl:.1e}, {parity.top1:.1%} of top tokens agree")
            check(parity, adapter.name, quantization, dtype=adapter.dtype, merged=adapter.merged)
        engine.activate({})
        rows = [row for adapter in adapters for row in adapter.probes[:2]]
        plain = compare(logits_of(model), engine, rows)
        progress.say(f"  base after switching back: mean KL {plain.kl:.1e}, {plain.top1:.1%} of top tokens agree")
        check(plain, "base", quantization)
    return parities


def _compare(model: PreTrainedModel, adapter: Trained, engine: GgufEngine) -> Parity:
    """The engine against the PEFT checkpoint in float32, with the adapter's scale on both sides."""
    from peft import PeftModel  # noqa: PLC0415 - slow to import
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    try:
        peft = PeftModel.from_pretrained(model, str(adapter.folder))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompatibleError(f"PEFT cannot load {adapter.folder}: {reason}", "save the adapter again") from error
    peft.eval()
    if adapter.scale != 1.0:
        for module in peft.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(adapter.scale)
    prompts = [
        row[:length] for row, length in zip(adapter.probes[:PARITY_PROMPTS], adapter.prompt_lengths, strict=False)
    ]
    try:
        return compare(logits_of(peft), engine, adapter.probes, prompts=prompts, max_tokens=PARITY_ANSWER_TOKENS)
    finally:
        peft.unload()


def logits_of(model: Any) -> Callable[[list[int]], Floats]:  # noqa: ANN401 - with or without PEFT around it
    """A function from token ids to the model's logits after each, float32 [tokens, vocabulary]."""
    import torch  # noqa: PLC0415

    def logits(tokens: list[int]) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(input_ids=torch.tensor([tokens])).logits[0].float().numpy(), np.float32)

    return logits


def _base_entry(base: Base, file: str) -> BaseEntry:
    metadata, arch = base.header.metadata, base.header.architecture
    return BaseEntry(
        name=base.name if "/" not in base.name else Path(base.name).name,
        fingerprint=base.fingerprint,
        architecture=arch,
        quantization=describe_quantization(base.header),
        parameters=sum(int(np.prod(tensor.shape)) for tensor in base.header.tensors.values()),
        context_length=base_context_length(base.header),
        layers=int(metadata[f"{arch}.block_count"]),
        kv_bytes_per_token=kv_bytes_per_token(base.header),
        tokenizer_sha256=digest_of_tokenizer(base.header),
        chat_template_sha256=digest_of_chat_template(base.header),
        files={BACKEND: file},
    )


def base_context_length(header: GgufHeader) -> int:
    """Tokens that the base was trained for."""
    return int(header.metadata[f"{header.architecture}.context_length"])


def _versions() -> dict[str, str]:
    names = ("edgetune", "edgetune-runtime", "llama-cpp-python", "torch", "transformers", "peft")
    return {name: importlib.metadata.version(name) for name in names}

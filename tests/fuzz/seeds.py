"""Makes the valid files that are mutated: tiny bundles in both formats, and each other kind of file that is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from edgetune_export.adapters.shapes import Prefix
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.prefix import write_prefix
from edgetune_runtime import Runtime
from edgetune_runtime.answer_log.answers import line_of
from edgetune_runtime.answer_log.log import AnswerLog
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import GENERATE, AdapterEntry, Scope, read_manifest, sha256_of
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.decoding.drafts import DRAFT_FILE, DraftTable, write_table
from edgetune_runtime.formats.gguf_adapter import cache_shape
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from edgetune_runtime.inference.similarity import SIMILARITY_FILE, TrainingPrompts, compared_tokens, write_prompts
from edgetune_runtime.store.acknowledgement import RunReport, begin
from edgetune_runtime.tools.calls import ToolCall, answer_text
from edgetune_runtime.update.report import DeviceReport
from edgetune_runtime.update.state import write_state
from edgetune_runtime.update.update import UpdateSource, check
from kits import KitMaker
from kits import write_bundle as write_signable
from repositories import add_part, make_keys, open_keys, publish, with_adapters
from runtime.bundles import Adapter, add_router, low_rank, write_both, write_bundle, write_manifest
from runtime.gguf_files import with_first_tokens

from edgetune.common.progress import Progress
from edgetune.delivery.oci.transfer import open_store, push
from edgetune.delivery.publish.key_folder import BUNDLES
from edgetune.delivery.publish.publish import sign

from .layouts import TAG
from .names import (
    ADAPTERS,
    AUTHORED,
    DEVICE,
    KEYS,
    KIT,
    LAYOUT,
    LOG,
    LORA,
    MODEL,
    ONNX,
    OTHER_BASES,
    PARTED,
    PEFT,
    PLAIN,
    PREFIX,
    QUESTION,
    RECIPE,
    RELEASED,
    REPORT,
    REPOSITORY,
    RUN,
    SESSION,
    SIGNED,
    STATES,
)

_TOKENS = 512
SYSTEM = "answer in one word and play " * 6
_RECIPE = """\
name: home
base: smollm2-135m
device: pi-4
context_length: 512
training: {epochs: 2, learning_rate: 1e-3}
adapters:
  command:
    data: {train: rows.jsonl, held_out: 0.1}
    system: Home command to JSON.
    method: {name: lora, r: 16, alpha: 32, target_modules: [q_proj, v_proj]}
    output: auto
"""


def make_seeds(folder: Path) -> Path:
    """Write all files to `folder`, which must not exist, from a tiny base made for it."""
    import torch  # noqa: PLC0415 - seconds, which `make fuzz` with seeds that are there does not need
    from edgetune_export.base_file.convert import convert_folder  # noqa: PLC0415
    from tiny import make_folder, make_tokenizer  # noqa: PLC0415

    from edgetune.bases import Base, load_torch  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokenizer = make_tokenizer(work)
        paths = {name: work / f"{name}.gguf" for name in ("llama", *OTHER_BASES)}
        for name, file in paths.items():
            convert_folder(make_folder(name, work / name, tokenizer), file, dtype="f16")
        path = paths.pop("llama")
        base = Base("llama", path, sha256_of(path), read_header(path))
        source = Source(path, base.fingerprint, load_torch(base, torch.float32), work / "onnx")
        return write_seeds(folder, source, work / "llama", paths)


def write_seeds(folder: Path, source: Source, model: Path, others: Mapping[str, Path]) -> Path:
    """Write all files to `folder`, which must not exist; `model` is the Hugging Face folder of the base `source`.

    `others` are the GGUF files of OTHER_BASES.
    """
    work = folder.with_name(f".{folder.name}.part")
    work.mkdir(parents=True)
    small = work / "small.gguf"
    for name, path in {PLAIN: source.path, **others}.items():
        # With more, each case would be read for a fifth of a second.
        write_bundle(work / name, with_first_tokens(path, small, _TOKENS), {})
    small.unlink()
    adapters = {LORA: Adapter(low_rank(source.path, seed=1), system=SYSTEM)}
    write_bundle(work / ADAPTERS, source.path, adapters)
    _add_parts(work / ADAPTERS, source)
    _onnx_bundle(work / ONNX, source, adapters)
    _states(work)
    _log(work)
    (work / KIT).write_text(_kit(), encoding="utf-8")
    _peft(work / PEFT, source)
    _copy(model, work / MODEL)
    (work / RECIPE).write_text(_RECIPE, encoding="utf-8")
    _repository(work, folder)
    _part(work)
    _layouts(work)
    _reports(work)
    work.rename(folder)
    return folder


def _add_parts(bundle: Path, source: Source) -> None:
    """Give the bundle an adapter that is a prefix, and the LoRA a draft table and a scope; and a router of both."""
    manifest = read_manifest(bundle)
    base = bundle / manifest.base.files["gguf"]
    file = f"adapters/{PREFIX}/prefix.gguf"
    (bundle / file).parent.mkdir()
    write_prefix(_prefix(base), base, bundle / file, dtype="f16", base_fingerprint=source.fingerprint)
    draft = f"adapters/{LORA}/{DRAFT_FILE}"
    entries = {number * 7919: (number % 300, 0.5) for number in range(1, 40)}
    write_table(bundle / draft, DraftTable.of(entries, [0.5] * 6, manifest.base.tokenizer_sha256))
    similarity = f"adapters/{LORA}/{SIMILARITY_FILE}"
    tokens = len(compared_tokens(len(read_header(base).metadata["tokenizer.ggml.tokens"])))
    logits = np.random.default_rng(0).normal(size=(3, tokens)).astype(np.float32)
    write_prompts(
        bundle / similarity, TrainingPrompts.of(np.eye(tokens, 8), zip(("red", "green", "red"), logits, strict=True))
    )
    lora = replace(
        manifest.adapters[LORA],
        draft=draft,
        similarity=similarity,
        labels=("red", "green"),
        scope={"gguf": Scope("green", -1.0, 0.0, 0.0)},
    )
    prefix = AdapterEntry(
        PREFIX, "prefix", {"gguf": "prefix"}, {"gguf": file}, manifest.base.fingerprint, prefix_tokens=3
    )
    router = add_router(bundle, {GENERATE: {LORA: "light", PREFIX: "heat"}})
    write_manifest(bundle, manifest.base, {LORA: lora, PREFIX: prefix}, router=router)


def _prefix(base: Path) -> Prefix:
    shape = cache_shape(read_header(base))
    size = (shape.layers, shape.heads, 3, shape.key_size)
    keys, values = np.random.default_rng(3).normal(0, 1, (2, *size)).astype(np.float32)
    return Prefix(PREFIX, "prefix", keys, values)


def _onnx_bundle(bundle: Path, source: Source, adapters: Mapping[str, Adapter]) -> None:
    """The LoRA in ONNX, without the GGUF files that the graph was made from."""
    write_both(bundle, source, adapters)
    manifest = read_manifest(bundle)
    for file in (manifest.base.files["gguf"], *(entry.files["gguf"] for entry in manifest.adapters.values())):
        (bundle / file).unlink()
    entries = {
        name: replace(entry, files={"onnx": entry.files["onnx"]}, shapes={"onnx": entry.shapes["onnx"]})
        for name, entry in manifest.adapters.items()
    }
    write_manifest(bundle, replace(manifest.base, files={"onnx": manifest.base.files["onnx"]}), entries)


def _log(work: Path) -> None:
    """A log of one answer, corrected before it was read."""
    log = AnswerLog(work / LOG, read_manifest(work / ADAPTERS))
    call = ToolCall("light", {"state": "on"})
    chat = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "tool_calls": [call.to_message()]},
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
        {"role": "user", "content": "again"},
    ]
    tools = [{"name": "light", "parameters": {"type": "object", "properties": {"state": {"enum": ["on", "off"]}}}}]
    log.answered(chat, "", calls=[call], tools=tools, adapter=LORA, confidence=0.5)
    (entry,) = read_answer_log(log.path, read_manifest(work / ADAPTERS))
    right = answer_text("", [("light", {"state": "off"})])
    log.path.write_text(line_of(entry.with_correction(right)), encoding="utf-8")


def _states(work: Path) -> None:
    """The saved state of the LoRA's prompt, a past answer, and a session."""
    with Runtime.open(work / ADAPTERS, contexts=1, cache_folder=work / STATES, learn_drafts="disk") as runtime:
        runtime.warm([LORA])
        runtime.generate(QUESTION, adapter=LORA, unconstrained=True, max_tokens=4)
        session = runtime.session(LORA)
        session.send(QUESTION, max_tokens=4)
        session.save(work / SESSION)


def _kit() -> str:
    with tempfile.TemporaryDirectory() as name:
        return (KitMaker(Path(name))("answer") / KIT).read_text(encoding="utf-8")


def _repository(work: Path, folder: Path) -> None:
    """A signed repository that will be in `folder`, and what a device remembers that has looked at it."""
    keys = make_keys(work / KEYS)
    (work / SIGNED).mkdir()
    # Large enough to be listed in pieces.
    (work / SIGNED / "README.md").write_text("".join(f"line {number}\n" for number in range(2000)), encoding="utf-8")
    repo, bundle = work / REPOSITORY, write_signable(work / SIGNED, "answer")
    release = publish(bundle, repo, keys, expires_days=36_500).release
    source = UpdateSource(str(repo), root=work / KEYS / "1.root.json")
    found = check(work / DEVICE, source)
    remembered = {
        "floors": {SIGNED: 1},
        "failures": {release.bundle: 1},
        "refused": {"ab" * 32: "it was marked as bad"},
    }
    write_state(work / DEVICE, replace(found.state, repo=str(folder / REPOSITORY), **remembered))


def _part(work: Path) -> None:
    """A signed bundle with a part of an adapter's author."""
    keys = open_keys(work / KEYS)
    keys.add(f"bundles/{PARTED}/{AUTHORED}")
    bundle = with_adapters(work / PARTED, AUTHORED)
    sign(bundle, keys)
    add_part(bundle, keys, chosen_adapter(read_manifest(bundle), bundle, AUTHORED))
    read_signed_manifest(bundle, keys.trusted_keys(BUNDLES))


def _layouts(work: Path) -> None:
    for name, repo in ((LAYOUT, None), (RELEASED, work / REPOSITORY)):
        with open_store(f"oci-layout:{work / name}:{TAG}", None, insecure=False) as store:
            push(work / SIGNED, store, Progress(quiet=True), repo=repo)


def _reports(work: Path) -> None:
    """The reports of a device and of a server's run, and the note that its version is not acknowledged."""
    path, version = work / REPORT, "ab" * 8
    about = DeviceReport(path.stem, "home", "stable", 1, "ab" * 32, "0.1.0", "2026-01-01T00:00:00+00:00", True)
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")
    (work / RUN).write_text(json.dumps(asdict(RunReport(version, answers=1))), encoding="utf-8")
    begin(work / DEVICE, version, golden_prompts=2)


def _peft(out: Path, source: Source) -> None:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow to import

    model = source.model
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(out)
    tuned.unload()


def _copy(model: Path, out: Path) -> None:
    out.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (out / name).write_bytes((model / name).read_bytes())

"""The kinds of files: which seed each mutates, the form of its edits, and how the product opens the changed file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import AUTO, MANIFEST_NAME, read_manifest
from edgetune_runtime.bundle.parts import part_path
from edgetune_runtime.bundle.signatures import SIGNATURE_NAME
from edgetune_runtime.cli.main import make_parser
from edgetune_runtime.inference.routing.classifier import ROUTER_FILE
from edgetune_runtime.inference.similarity import SIMILARITY_FILE

from . import fragments, layouts, updates
from .forms.gguf_file import GgufForm, read
from .forms.json_file import Checked, Json, Safetensors
from .forms.protobuf import Protobuf
from .forms.raw import Bytes, Form
from .forms.text import Text
from .names import (
    ADAPTERS,
    AUTHORED,
    DEVICE,
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

Open = Callable[[bytes], None]
"""Opens a changed file, as an app does; it may raise an EdgetuneError and no other error."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: `seed` is its path below the folder of seeds; `opener` gets a private copy of that folder."""

    seed: str
    form: Form
    opener: Callable[[Path], Open]
    read: Callable[[Path], bytes] = field(default=Path.read_bytes)


def _answer(bundle: Path, adapter: str | None = None, **opening: Any) -> None:  # noqa: ANN401 - of `Runtime.open`
    with Runtime.open(bundle, contexts=1, **{"threads": 1, "disk_mb": 0, **opening}) as runtime:
        # Written token by token, with drafts, also by an adapter with labels.
        runtime.generate(QUESTION, adapter=adapter, unconstrained=True, max_tokens=3)


def _classify(bundle: Path, adapter: str | None) -> None:
    with Runtime.open(bundle, contexts=1, threads=1, disk_mb=0) as runtime:
        runtime.classify(QUESTION, adapter=adapter)


def _replace(path: Path, data: bytes) -> None:
    """Put a new file there: a runtime that is still open may have mapped the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _in_bundle(bundle: str, file: str, adapter: str | None, ask: Callable[..., None], folder: Path) -> Open:
    """Opens a bundle with a changed file, whose digest is in the manifest."""
    root = folder / bundle
    manifest = json.loads((root / MANIFEST_NAME).read_text(encoding="utf-8"))

    def open_changed(data: bytes) -> None:
        _replace(root / file, data)
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][file] = {"sha256": digest, "bytes": len(data)}
        if file == manifest["base"]["files"].get("gguf"):
            manifest["base"]["fingerprint"] = digest
        (root / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
        ask(root, adapter)

    return open_changed


def _manifest(folder: Path) -> Open:
    root = folder / ADAPTERS
    info = make_parser().parse_args(["info", str(root)])

    def open_changed(data: bytes) -> None:
        _replace(root / MANIFEST_NAME, data)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            info.run(info)
        if "\x1b" in out.getvalue():
            raise AssertionError("info prints control characters")
        with Runtime.open(root, contexts=1, disk_mb=0) as runtime:
            for name in (None, *runtime.adapters):
                runtime.generate(QUESTION, adapter=name, max_tokens=3)

    return open_changed


def _template(folder: Path) -> Open:
    base = f"{PLAIN}/base/model.gguf"
    valid, form = (folder / base).read_bytes(), GgufForm()
    opened = _in_bundle(PLAIN, "base/model.gguf", None, _answer, folder)

    def open_changed(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        opened(form.applied(valid, [["value", "tokenizer.chat_template", 8, text]]))

    return open_changed


def _template_of(base: Path) -> bytes:
    """The chat template in a base."""
    values = {key: value for key, _, value in read(base.read_bytes()).metadata}
    return str(values["tokenizer.chat_template"]).encode()


def _replacing(file: Path, open_it: Callable[[], object]) -> Open:
    def open_changed(data: bytes) -> None:
        _replace(file, data)
        open_it()

    return open_changed


def _kept(pattern: str, opening: dict[str, Any], folder: Path) -> Open:
    """Answers after the only file of that pattern in the folder of states was changed."""
    (file,) = (folder / STATES).glob(pattern)
    return _replacing(file, partial(_answer, folder / ADAPTERS, LORA, cache_folder=folder / STATES, **opening))


def _only(pattern: str, folder: Path) -> bytes:
    (file,) = folder.glob(pattern)
    return file.read_bytes()


def _session(folder: Path) -> Open:
    def load() -> None:
        with Runtime.open(folder / ADAPTERS, contexts=1, threads=1, disk_mb=0) as runtime:
            runtime.load_session(folder / SESSION).send(QUESTION, max_tokens=3)

    return _replacing(folder / SESSION, load)


def _kit(folder: Path) -> Open:
    from edgetune_runtime.store.kit import parse_kit  # noqa: PLC0415 - each worker imports what its kind needs

    def open_changed(data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError):
            kit = parse_kit(data.decode())
            # They become lines of a system unit, arguments and paths.
            texts = (kit.board, kit.machine, kit.python, *kit.engines, *(file.path for file in kit.files))
            if not all(text.isprintable() for text in texts):
                raise AssertionError("a kit has control characters")

    return open_changed


def _peft(file: str, folder: Path) -> Open:
    import torch  # noqa: PLC0415 - as above

    from edgetune import bases, methods  # noqa: PLC0415
    from edgetune.common.progress import Progress  # noqa: PLC0415
    from edgetune.methods.common.base import Checkpoint  # noqa: PLC0415

    torch.set_num_threads(1)
    gguf = folder / PLAIN / "base/model.gguf"
    quiet = Progress(quiet=True)
    base = bases.resolve(str(gguf), folder=folder, quantization=None, work=folder, progress=quiet, converter=None)
    model = bases.load_torch(base, torch.float32)

    def open_changed(data: bytes) -> None:
        _replace(folder / PEFT / file, data)
        method = methods.of_folder(folder / PEFT)
        options = method.options()
        shape = methods.shape_for(method, options, "gguf", ("low_rank", "prefix", "merged"), merged=False)
        checkpoint = Checkpoint("a", folder / PEFT, model, options)
        method.fold(checkpoint, shape)
        # For the comparison with torch.
        with method.loaded(checkpoint):
            pass

    return open_changed


def _model(file: str, folder: Path) -> Open:
    from edgetune_export import architectures  # noqa: PLC0415 - as above

    from edgetune.bases.folder_header import predict_header  # noqa: PLC0415

    return _replacing(folder / MODEL / file, lambda: architectures.of(predict_header(folder / MODEL)))


def _recipe(folder: Path) -> Open:
    from edgetune.recipe.model import Recipe  # noqa: PLC0415 - as above

    return _replacing(folder / RECIPE, partial(Recipe.from_file, folder / RECIPE))


def _log(folder: Path) -> Open:
    from edgetune.recipe.data import DataSpec  # noqa: PLC0415
    from edgetune.recipe.parts import AdapterSpec  # noqa: PLC0415
    from edgetune.recipe.training import TrainingSpec  # noqa: PLC0415
    from edgetune.retraining.learning.rows import learned_rows, source_of  # noqa: PLC0415 - as above
    from edgetune.tasks.data import read_rows  # noqa: PLC0415
    from edgetune.tasks.task import Task  # noqa: PLC0415

    manifest = read_manifest(folder / ADAPTERS)
    task = Task(LORA, AdapterSpec(data=DataSpec(train=LOG)), TrainingSpec(), [], [], (), "exact", [])

    def open_changed(data: bytes) -> None:
        # A line per answer.
        _replace(folder / LOG, b" ".join(data.splitlines()) + b"\n")
        entries = [entry for entry in read_answer_log(folder / LOG, manifest) if entry.correction is not None]
        for entry in entries:
            others = [dataclasses.replace(entry, id=str(n), messages=_asked(n)) for n in range(4)]
            read_rows(source_of(LORA, learned_rows(task, [*others, entry]).train))

    return open_changed


def _asked(number: int) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"{QUESTION} {number}"},)


def _bundle_kind(
    bundle: str, file: str, form: Form, adapter: str | None = None, ask: Callable[..., None] = _answer
) -> Kind:
    return Kind(f"{bundle}/{file}", form, partial(_in_bundle, bundle, file, adapter, ask))


_GRAPH = "base/onnx"
KINDS = {
    "gguf-adapter": _bundle_kind(ADAPTERS, f"adapters/{LORA}/adapter.gguf", GgufForm(), LORA),
    "gguf-prefix": _bundle_kind(ADAPTERS, f"adapters/{PREFIX}/prefix.gguf", GgufForm(), PREFIX),
    "gguf-base": _bundle_kind(PLAIN, "base/model.gguf", GgufForm()),
    **{f"gguf-{name}": _bundle_kind(name, "base/model.gguf", GgufForm()) for name in OTHER_BASES},
    "onnx-graph": _bundle_kind(ONNX, f"{_GRAPH}/model.onnx", Protobuf(), LORA),
    "onnx-adapter": _bundle_kind(ONNX, f"adapters/{LORA}/adapter.onnx_adapter", Bytes(), LORA),
    "tokenizer": _bundle_kind(ONNX, f"{_GRAPH}/tokenizer.json", Json(), LORA),
    "tokenizer-config": _bundle_kind(ONNX, f"{_GRAPH}/tokenizer_config.json", Json(), LORA),
    "onnx-config": _bundle_kind(ONNX, f"{_GRAPH}/genai_config.json", Json(), LORA),
    "draft": _bundle_kind(ADAPTERS, f"adapters/{LORA}/draft.bin", Checked(), LORA),
    "similarity": _bundle_kind(ADAPTERS, f"adapters/{LORA}/{SIMILARITY_FILE}", Checked(), LORA, _classify),
    "router": _bundle_kind(ADAPTERS, f"adapters/{ROUTER_FILE}", Checked(), AUTO),
    "state": Kind(STATES, Checked(), partial(_kept, "*.kv", {"disk_mb": 100}), partial(_only, "*.kv")),
    "past-answers": Kind(
        STATES,
        Checked(),
        partial(_kept, "past-answers/*.bin", {"learn_drafts": "disk"}),
        partial(_only, "past-answers/*.bin"),
    ),
    "session": Kind(SESSION, Checked(), _session),
    "manifest": Kind(f"{ADAPTERS}/{MANIFEST_NAME}", Json(), _manifest),
    "template": Kind(f"{PLAIN}/base/model.gguf", Text(fragments.TEMPLATE), _template, _template_of),
    "kit": Kind(KIT, Json(), _kit),
    "peft-config": Kind(f"{PEFT}/adapter_config.json", Json(), partial(_peft, "adapter_config.json")),
    "peft-weights": Kind(
        f"{PEFT}/adapter_model.safetensors", Safetensors(), partial(_peft, "adapter_model.safetensors")
    ),
    "model-config": Kind(f"{MODEL}/config.json", Json(), partial(_model, "config.json")),
    "model-weights": Kind(f"{MODEL}/model.safetensors", Safetensors(), partial(_model, "model.safetensors")),
    "answer-log": Kind(LOG, Json(), _log),
    "recipe": Kind(RECIPE, Text(fragments.RECIPE), _recipe),
    **{
        f"tuf-{role}": Kind(f"{REPOSITORY}/metadata/{file}", Json(), partial(updates.metadata, role, file))
        for role, file in updates.METADATA.items()
    },
    "release": Kind(REPOSITORY, Json(), updates.release, updates.only_release),
    "signature": Kind(f"{SIGNED}/{SIGNATURE_NAME}", Json(), partial(updates.signature, f"{SIGNED}/{SIGNATURE_NAME}")),
    "trusted-keys": Kind(updates.TRUSTED_KEYS, Json(), partial(updates.signature, updates.TRUSTED_KEYS)),
    "part": Kind(f"{PARTED}/{part_path(AUTHORED)}", Json(), updates.part),
    "update-state": Kind(f"{DEVICE}/{updates.STATE}", Json(), updates.state),
    "device-report": Kind(REPORT, Json(), updates.report),
    "start-note": Kind(updates.NOTE, Json(), partial(updates.start, updates.NOTE)),
    "run-report": Kind(RUN, Json(), partial(updates.start, RUN)),
    "oci-artifact": Kind(LAYOUT, Json(), layouts.artifact, partial(layouts.read, layouts.only_artifact)),
    "oci-index": Kind(f"{LAYOUT}/{layouts.INDEX}", Json(), layouts.index),
    **{
        f"oci-{name}": Kind(RELEASED, Json(), partial(layouts.released, find), partial(layouts.read, find))
        for name, find in (("referrers", layouts.referrers), ("release", layouts.release_metadata))
    },
}


def opener(name: str, seeds: Path, work: Path) -> tuple[bytes, Open]:
    """The valid file of a kind, and what opens a changed one in `work`, which gets a copy of the seeds."""
    kind = KINDS[name]
    shutil.copytree(seeds, work, dirs_exist_ok=True)
    return kind.read(seeds / kind.seed), kind.opener(work)

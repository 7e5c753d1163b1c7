"""The manifest of a bundle, and the check of its files: the contract between the build host and the board.

A bundle is a folder of plain files and `manifest.json`, which lists each file with its digest and ties the adapters to
the base that they were trained on. Standard library only, so that a board can read it before an engine is installed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, first_of, printable

from .errors import IncompatibleError, NotFoundError, VerificationError
from .type_checks import dataclass_of

MANIFEST_NAME = "manifest.json"
STATES_FOLDER = "states"
"""Folder in the bundle with the states that ship with it."""
SCHEMA_VERSION = 2
SHAPES = ("low_rank", "prefix", "tensors", "merged")
GENERATION = "text-generation"
CLASSIFICATION = "text-classification"
TASKS = (GENERATION, CLASSIFICATION)
LONGEST_MANIFEST = 1 << 26
AUTO = "auto"
"""In place of an adapter's name: the adapter that the bundle's router chooses."""
BASE, ERROR = "base", "error"
"""What can answer a prompt of none of the router's tasks, besides an adapter."""
MARK, ASK, DEFER = "mark", "ask", "defer"
"""What can become of an unsure answer, besides BASE, ERROR and an adapter."""
GENERATE, CLASSIFY = "generate", "classify"
"""The kinds of calls that a router tells apart."""


@dataclass(frozen=True)
class FileEntry:
    """Digest and size of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class BaseEntry:
    """The base model that all adapters of the bundle belong to.

    `fingerprint` is the sha256 of the GGUF file whose weights the adapters were trained on. `quantization` is what the
    recipe or its board requested for this file (`formats/quantization.py` lists the names; f32 or int8 for the graph of
    an encoder), None if the file is unchanged. `files` maps a backend to the base's path in the bundle, and
    `values_by_type` to the number of values that this file has in each type: tensor types in GGUF; f32, f16, int8 and
    int4 in ONNX. `trained_context_length` is the longest context that the base was trained for, in tokens, and
    `kv_values_per_token` the numbers in the keys and values that one token adds over all layers. `parity` maps a
    backend to the distance of its base from the trained one, and `gguf/onnx` to the distance between the two. `domain`
    has the figures of continued pretraining: how the base was trained, and its perplexity before and after.
    """

    name: str
    fingerprint: str
    architecture: str
    quantization: str | None
    parameters: int
    trained_context_length: int
    layers: int
    kv_values_per_token: int
    tokenizer_sha256: str
    chat_template_sha256: str
    files: Mapping[str, str]
    values_by_type: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    domain: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_decoder(self) -> bool:
        """Whether the base generates text; an encoder has no keys and values."""
        return self.kv_values_per_token > 0


@dataclass(frozen=True)
class GoldenAnswer:
    """A prompt of an adapter's task and the greedy answer of one format's files, to compare with on another machine.

    `prompt` is chat messages, or a text that the answer continues; `tools` are the functions that it offers. `answer`
    has at most `max_tokens` tokens; with labels it is the most likely one. `margin` is the lead (nats) of the best
    token, or label, over the second at the step where it is smallest; None where no step had a choice.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    answer: str
    max_tokens: int
    margin: float | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Scope:
    """Which texts `classify` finds to be out of scope with an adapter's labels in one format.

    These get `label`: because it is the likeliest, or because the `score` of the likeliest is below `threshold`.
    `refused` is the share of the validation rows with other labels that got it, and `found` that of texts which the
    build made of none of them. `odds_spread` and `similarity_spread` are the standard deviations of both parts of the
    score over these validation rows.
    """

    label: str
    threshold: float
    refused: float
    found: float
    odds_spread: float = 1.0
    similarity_spread: float = 1.0

    def score(self, log_odds: float, similarity: float) -> float:
        """How sure it is that a text is in scope: from the log odds of its label, and how similar its prompt is."""
        return log_odds / self.odds_spread - (1 - similarity) / self.similarity_spread


@dataclass(frozen=True)
class ConfidenceCurve:
    """The probability that answers of one kind are right: the logistic function of `slope` x log odds + `offset`.

    Fitted on `rows` validation rows, of whose answers the share `right` was right; `slope` is None if they were too
    few. `error` is the expected calibration error of rows that were left out of the fit in turn, `error_if_exact` what
    it would be on average if the confidence were exactly right, and `bins` has their mean confidence, the share that
    was right, and how many, for each part of the range that has some.
    """

    rows: int
    right: float
    slope: float | None = None
    offset: float = 0.0
    error: float | None = None
    error_if_exact: float | None = None
    bins: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class UnsureRule:
    """What becomes of answers whose confidence is below `min_confidence`, or not known.

    `then` says what answers instead: `ask` (the text `question`), `base`, an adapter, `error` (none), or `defer` (the
    bigger model whose address the runtime was given; without one, the answer is marked). With `mark`, the answer is
    only marked.
    """

    min_confidence: float
    then: str = MARK
    question: str = ""


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter: its file and shape per backend, how it was trained, and how to run it.

    `error` is the relative error of a low-rank approximation of the trained update. `prefix_tokens` is the number of
    context positions that a prefix occupies. An adapter with `invocation` tokens is active from their last occurrence
    on. `modules_by_rank` counts the changed modules of each rank. `scale` is used when a caller gives none; the weights
    of a merged model include it. `metric` names the score that `edgetune evaluate` computes. `quantization`
    is that of a merged model, None for other shapes and if a merged model keeps the types of an unchanged base.
    `values_by_type` is as in `BaseEntry`, of the adapter's files. `parity` maps a backend to `kl`, `top1`, … . `draft`
    is the file of its draft table (see `decoding.drafts`); `output` constrains its answers (see `decoding.output`).
    `similarity` is the file that tells how similar a prompt is to the training prompts (see `inference.similarity`).
    `golden` has a golden answer per backend, unless the recipe leaves it out; `scope` is by backend too. `confidence`
    maps a backend to a curve per kind of answer (see `inference.confidence`), and `unsure` is the rule for answers that
    are not sure enough.
    """

    name: str
    method: str
    shapes: Mapping[str, str]
    files: Mapping[str, str]
    base_fingerprint: str
    modules_by_rank: Mapping[int, int] = field(default_factory=dict)
    error: float = 0.0
    prefix_tokens: int = 0
    invocation: tuple[int, ...] = ()
    scale: float = 1.0
    system: str | None = None
    metric: str = "exact"
    labels: tuple[str, ...] = ()
    draft: str | None = None
    similarity: str | None = None
    output: Mapping[str, Any] | None = None
    quantization: str | None = None
    values_by_type: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    golden: Mapping[str, GoldenAnswer] = field(default_factory=dict)
    scope: Mapping[str, Scope] = field(default_factory=dict)
    confidence: Mapping[str, Mapping[str, ConfidenceCurve]] = field(default_factory=dict)
    unsure: UnsureRule | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module_count(self) -> int:
        """How many linear modules it changes."""
        return sum(self.modules_by_rank.values())

    @property
    def shared_files(self) -> list[str]:
        """Its files that are for all formats."""
        return [file for file in (self.draft, self.similarity) if file is not None]

    def is_merged(self, engine: str) -> bool:
        """Whether the adapter is a full model for this engine."""
        return self.shapes.get(engine) == "merged"


class NewAdapter(NamedTuple):
    """An adapter to add: its entry, and the folder in which it has these files."""

    entry: AdapterEntry
    files: Mapping[str, FileEntry]
    folder: Path


@dataclass(frozen=True)
class RoutedCall:
    """How prompts of one kind of call are routed: to one of `adapters`, if it is likely enough.

    A prompt is of none of their tasks if no task has the probability `threshold`. `right` is the share of the
    validation rows of each adapter that it got, and `none_found` that of prompts of other tasks, and of none, that no
    adapter got.
    """

    adapters: tuple[str, ...]
    threshold: float
    right: Mapping[str, float]
    none_found: float


@dataclass(frozen=True)
class RouterEntry:
    """The router of a bundle: its file, and for each kind of call (`generate`, `classify`) how prompts are routed.

    `below` answers prompts of none of the tasks: `base`, an adapter, or `error`.
    """

    file: str
    calls: Mapping[str, RoutedCall]
    below: str = BASE


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. `context_length` (tokens) and `threads` are the defaults of `Runtime.open`.

    `task` is text-generation, or text-classification for an encoder with a classification head per adapter. With
    `warms`, a server computes the states of all fixed prompts when it starts. `plan` has the decisions and predictions
    of the build that are nowhere else in the manifest; it is empty for exports of adapters trained elsewhere.
    """

    name: str
    base: BaseEntry
    adapters: Mapping[str, AdapterEntry]
    files: Mapping[str, FileEntry]
    context_length: int
    threads: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    task: str = GENERATION
    warms: bool = False
    router: RouterEntry | None = None
    schema: int = SCHEMA_VERSION

    def adapter(self, name: str) -> AdapterEntry:
        """The adapter called `name`; NotFoundError lists the adapters of the bundle."""
        if name not in self.adapters:
            names = first_of([*self.adapters], 20, ", ") or "none"
            raise NotFoundError(f"no adapter {name!r} in bundle {self.name!r}", f"choose one of: {names}")
        return self.adapters[name]

    def to_json(self) -> str:
        """The text of manifest.json."""
        # Little indented: an update of one adapter of many downloads it all.
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/manifest.json`; opens no other file.

    Raises NotFoundError when `bundle` is not a bundle, VerificationError when the manifest is invalid, has another
    schema or names paths outside the bundle, and IncompatibleError when an adapter was trained on another base.
    """
    path = bundle / MANIFEST_NAME
    if path.exists() and (not path.is_file() or path.stat().st_size > LONGEST_MANIFEST):
        raise VerificationError(f"{path} is no regular file of up to {LONGEST_MANIFEST} bytes", COPY_BUNDLE_AGAIN)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "give the folder that `edgetune build --out` wrote"
        raise NotFoundError(f"{bundle} is not a bundle: it has no {MANIFEST_NAME}", remedy) from error
    except OSError as error:
        raise VerificationError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    return with_present_formats(parse_manifest(data, path), lambda name: (bundle / name).exists())


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`, which was read from `path`; errors as those of `read_manifest` for a wrong one."""
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path} is not JSON: {error}", COPY_BUNDLE_AGAIN) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
        raise VerificationError(f"{path} has no schema number", COPY_BUNDLE_AGAIN)
    if raw["schema"] != SCHEMA_VERSION:
        message = f"{path} has schema {raw['schema']}, this runtime reads {SCHEMA_VERSION}"
        remedy = "build the bundle again" if raw["schema"] < SCHEMA_VERSION else "update edgetune-runtime"
        raise VerificationError(message, remedy)
    manifest = _parse(raw, path)
    _check_names(manifest, path)
    _check_references(manifest, path)
    return manifest


def verify_files(bundle: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare size and sha256 of `names` (default: all files) with the manifest; VerificationError if one differs."""
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise VerificationError(f"the manifest has no digest for {name}", COPY_BUNDLE_AGAIN)
        entry = manifest.files[name]
        path = resolve(bundle, name)
        if not path.is_file():
            raise VerificationError(f"{name} is missing from bundle {bundle}", COPY_BUNDLE_AGAIN)
        size = path.stat().st_size
        if size != entry.bytes:
            message = f"{name} has {size} bytes, the manifest says {entry.bytes}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        if sha256_of(path) != entry.sha256:
            raise VerificationError(f"{name} does not match its digest in the manifest", COPY_BUNDLE_AGAIN)


@contextmanager
def unchanged(bundle: Path, names: Iterable[str]) -> Iterator[None]:
    """VerificationError if one of the files is another one, or was written to, by the end of the block.

    The engines open files by their paths, also those that were compared with their digests before.
    """
    before = {name: _identity(bundle / name) for name in names}
    yield
    for name, identity in before.items():
        if _identity(bundle / name) != identity:
            raise VerificationError(f"{name} was changed while it was read from {bundle}", "open the bundle again")


class VerifiedFiles:
    """Remembers which files match their digests, until they are written to or replaced. Thread-safe."""

    def __init__(self) -> None:
        self._identities: dict[tuple[Path, str], tuple[int, ...]] = {}

    @contextmanager
    def reading(self, bundle: Path, manifest: Manifest, name: str) -> Iterator[Path]:
        """The path of a file that the block reads; VerificationError if it is not, or not to the end, as its digest."""
        path, key = resolve(bundle, name), (bundle / name, manifest.files[name].sha256)
        with unchanged(bundle, [name]):
            identity = _identity(path)
            if identity is None or self._identities.get(key) != identity:
                verify_files(bundle, manifest, [name])
            yield path
        if identity is not None:
            self._identities[key] = identity


def _identity(path: Path) -> tuple[int, ...] | None:
    """What differs between two files, and of one file after it was written to or renamed; None for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def files_of(manifest: Manifest, entry: AdapterEntry) -> list[str]:
    """The files of an adapter: those that it names, and all in the folders of its merged models."""
    named = {*entry.files.values(), *entry.shared_files}
    folders = {PurePosixPath(file).parent for engine, file in entry.files.items() if entry.is_merged(engine)}
    return [name for name in manifest.files if name in named or PurePosixPath(name).parent in folders]


def without_adapter(manifest: Manifest, name: str) -> Manifest:
    """The manifest without an adapter, without the files that only it uses, and without a router that chooses it."""
    gone, router = {*files_only_of(manifest, manifest.adapter(name))}, manifest.router
    if router is not None and (name == router.below or any(name in call.adapters for call in router.calls.values())):
        gone, router = {*gone, router.file}, None
    adapters = {other: entry for other, entry in manifest.adapters.items() if other != name}
    files = {file: entry for file, entry in manifest.files.items() if file not in gone}
    return replace(manifest, adapters=adapters, files=files, router=router)


def of_formats(manifest: Manifest, formats: Iterable[str]) -> Manifest:
    """The manifest with these formats, and without the files that only the others use."""
    kept, unwanted = [*formats], [name for name in manifest.base.files if name not in {*formats}]
    used = {file for name in kept for file in files_of_format(manifest, name)}
    gone = {file for name in unwanted for file in files_of_format(manifest, name)} - used

    def only(by_format: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in by_format.items() if name not in unwanted}

    return replace(
        manifest,
        base=replace(manifest.base, files=only(manifest.base.files)),
        adapters={
            name: replace(entry, files=only(entry.files), shapes=only(entry.shapes))
            for name, entry in manifest.adapters.items()
        },
        files={file: entry for file, entry in manifest.files.items() if file not in gone},
    )


def with_present_formats(manifest: Manifest, is_present: Callable[[str], bool]) -> Manifest:
    """The manifest without the formats of which no file is present, as a device may have one format only.

    All formats if no file of any is. A format with some of its files is damaged, and not left out.
    """
    present = [
        name
        for name, file in manifest.base.files.items()
        if is_present(file) or any(map(is_present, files_of_format(manifest, name)))
    ]
    return of_formats(manifest, present) if 0 < len(present) < len(manifest.base.files) else manifest


def files_of_format(manifest: Manifest, name: str) -> list[str]:
    """The files of a format: the base's and the adapters', and the files beside one of them that nothing else names."""
    by_format = [manifest.base.files, *(adapter.files for adapter in manifest.adapters.values())]
    named = [files[name] for files in by_format if name in files]
    others = {file for files in by_format for other, file in files.items() if other != name}
    others |= {file for adapter in manifest.adapters.values() for file in adapter.shared_files}
    shared = {str(folder) for file in others for folder in PurePosixPath(file).parents}
    folders = {str(PurePosixPath(file).parent) for file in named} - shared
    beside = [file for file in manifest.files if folders & {str(folder) for folder in PurePosixPath(file).parents}]
    return list(dict.fromkeys([*named, *beside]))


def files_beside(manifest: Manifest, file: str) -> list[str]:
    """All files in the folder of a model and below it, which are all that the model can have."""
    folder = "".join(file.rpartition("/")[:2])
    return [name for name in manifest.files if name.startswith(folder)]


def files_only_of(manifest: Manifest, entry: AdapterEntry) -> list[str]:
    """The files of an adapter that nothing else in the bundle uses."""
    others = [other for other in manifest.adapters.values() if other is not entry]
    used = {file for other in others for file in (*other.files.values(), *other.shared_files)}
    used |= {*manifest.base.files.values()}
    folders = {PurePosixPath(file).parent for file in used}
    named = {*entry.files.values(), *entry.shared_files}
    return [
        name
        for name in files_of(manifest, entry)
        if name not in used and (name in named or PurePosixPath(name).parent not in folders)
    ]


def pinned(bundle: Path) -> Path:
    """The bundle's own folder, where its path leads through a link that a switch of versions changes."""
    return bundle.resolve() if bundle.parent.is_symlink() else bundle


def resolve(bundle: Path, name: str) -> Path:
    """The path of file `name` in the bundle; VerificationError when it points outside, even through a symbolic link."""
    root = bundle.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise VerificationError(f"{name} points outside the bundle {bundle}", "do not use this bundle")
    return path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(raw: Mapping[str, Any], path: Path) -> Manifest:
    try:
        adapters = {name: _adapter(value) for name, value in raw["adapters"].items()}
        files = {name: dataclass_of(FileEntry, value) for name, value in raw["files"].items()}
        entry = raw["base"]
        # Manifests used to have the bytes of these values in f16.
        before = {"kv_values_per_token": entry["kv_bytes_per_token"] // 2} if "kv_bytes_per_token" in entry else {}
        base = dataclass_of(BaseEntry, {**before, **entry})
        router = None if raw.get("router") is None else _router(raw["router"])
        return dataclass_of(Manifest, {**raw, "base": base, "adapters": adapters, "files": files, "router": router})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VerificationError(f"{path} is not a manifest: {error}", COPY_BUNDLE_AGAIN) from error


def _adapter(raw: Mapping[str, Any]) -> AdapterEntry:
    golden = {backend: dataclass_of(GoldenAnswer, value) for backend, value in raw.get("golden", {}).items()}
    scope = {backend: dataclass_of(Scope, value) for backend, value in raw.get("scope", {}).items()}
    curves = {
        backend: {kind: dataclass_of(ConfidenceCurve, curve) for kind, curve in kinds.items()}
        for backend, kinds in raw.get("confidence", {}).items()
    }
    unsure = None if raw.get("unsure") is None else dataclass_of(UnsureRule, raw["unsure"])
    # Manifests used to have the rank of each module by its name.
    counts = raw["modules_by_rank"] if "modules_by_rank" in raw else Counter(raw.get("ranks", {}).values())
    ranks = {int(rank): count for rank, count in counts.items()}
    parsed = {"golden": golden, "scope": scope, "confidence": curves, "unsure": unsure, "modules_by_rank": ranks}
    return dataclass_of(AdapterEntry, {**raw, **parsed})


def _router(raw: Mapping[str, Any]) -> RouterEntry:
    calls = {call: dataclass_of(RoutedCall, value) for call, value in raw["calls"].items()}
    return dataclass_of(RouterEntry, {**raw, "calls": calls})


def _check_names(manifest: Manifest, path: Path) -> None:
    """Names reach terminals, logs and paths, so they have no control characters."""
    base, adapters = manifest.base, manifest.adapters
    names = [manifest.name, base.name, base.architecture, *base.files, *manifest.files, *adapters]
    for adapter in adapters.values():
        names += [adapter.name, adapter.method, adapter.metric, *adapter.files]
    text = "".join(names)
    if text != printable(text):
        name = next(name for name in names if name != printable(name))
        message = f"{path} has the name {name[:80]!r}, with characters that control a terminal"
        raise VerificationError(message, "do not use this bundle")


def _check_references(manifest: Manifest, path: Path) -> None:
    named = [*manifest.base.files.values(), *(f for a in manifest.adapters.values() for f in a.files.values())]
    named += [file for adapter in manifest.adapters.values() for file in adapter.shared_files]
    named += [] if manifest.router is None else [manifest.router.file]
    for name in {*manifest.files, *named}:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise VerificationError(f"{path} names {name!r}, which is outside the bundle", "do not use this bundle")
    for name in named:
        if name not in manifest.files:
            raise VerificationError(f"{path} has no digest for {name!r}", COPY_BUNDLE_AGAIN)
    if manifest.task not in TASKS:
        raise VerificationError(f"{path} has the unknown task {manifest.task!r}", "update edgetune-runtime")
    for name, adapter in manifest.adapters.items():
        if adapter.name != name:
            message = f"{path} has adapter {adapter.name!r} under the name {name!r}"
            raise VerificationError(message, COPY_BUNDLE_AGAIN)
        unknown = [shape for shape in adapter.shapes.values() if shape not in SHAPES]
        if unknown or adapter.shapes.keys() != adapter.files.keys():
            message = f"adapter {adapter.name!r} has unknown shapes {unknown}, or a file without a shape"
            raise VerificationError(message, "update edgetune-runtime")
        curves = [curve for kinds in adapter.confidence.values() for curve in kinds.values()]
        if not all(math.isfinite(value) for curve in curves for value in (curve.slope or 0, curve.offset)):
            raise VerificationError(f"adapter {name!r} has a confidence curve without numbers", COPY_BUNDLE_AGAIN)
        if adapter.base_fingerprint != manifest.base.fingerprint:
            message = f"adapter {adapter.name!r} was made for another base than the one in bundle {manifest.name!r}"
            raise IncompatibleError(message, "build the bundle again")
    if manifest.router is not None:
        _check_router(manifest.router, manifest.adapters, path)


def _check_router(router: RouterEntry, adapters: Mapping[str, AdapterEntry], path: Path) -> None:
    """The router names adapters of the bundle, and leaves no doubt who answers."""
    calls = router.calls.values()
    problems = [f"the call {call!r}" for call in router.calls if call not in (GENERATE, CLASSIFY)]
    problems += [f"the adapter {name!r}" for call in calls for name in call.adapters if name not in adapters]
    problems += [f"the threshold {call.threshold}" for call in calls if not 0 < call.threshold < 1]
    problems += [f"below: {router.below!r}"] if router.below not in (BASE, ERROR, *adapters) else []
    problems += [f"an adapter called {name!r}" for name in (AUTO, BASE, ERROR) if name in adapters]
    problems += [] if all(call.adapters for call in calls) else ["no adapters to choose from"]
    if problems:
        raise VerificationError(f"{path} has a router with {problems[0]}", "build the bundle again")

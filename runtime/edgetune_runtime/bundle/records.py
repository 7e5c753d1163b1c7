"""The records of a bundle's manifest: the contract between the build host and the board."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_runtime.errors import NotFoundError
from edgetune_runtime.wording import first_of

MANIFEST_NAME = "manifest.json"
STATES_FOLDER = "states"
"""Folder in the bundle with the states that ship with it."""
SCHEMA_VERSION = 2
SHAPES = ("low_rank", "prefix", "tensors", "merged")
GENERATION = "text-generation"
CLASSIFICATION = "text-classification"
TASKS = (GENERATION, CLASSIFICATION)
LONGEST_MANIFEST = 1 << 26
AUTHOR_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}"
"""The form of names of adapters with authors: they are part of names of files and roles."""
MOST_AUTHORS = 64
"""Keys of authors in a bundle."""
AUTO = "auto"
"""Stands for an adapter's name: the adapter that the bundle's router chooses."""
BASE, ERROR = "base", "error"
"""What can answer a prompt of none of the router's tasks, besides an adapter."""
ROUTER_WORDS = (AUTO, BASE, ERROR)
"""No adapter of a bundle with a router has one of these names."""
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

    def types_in(self, backend: str) -> str:
        """A file's quantization and the type of most values, such as `q8_0` or `q4_k_m (mostly q4_k)`."""
        values = self.values_by_type.get(backend, {})
        most = max(values, key=values.__getitem__, default=self.quantization or "types not recorded")
        return most if self.quantization in (None, most) else f"{self.quantization} (mostly {most})"


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

    These get `label`: because it is the likeliest, or because the log odds that they are in scope are below `threshold`
    (see `inference.similarity`). `refused` is the share of the validation rows with other labels that got it, and
    `found` that of texts which the build made of none of them.
    """

    label: str
    threshold: float
    refused: float
    found: float


@dataclass(frozen=True)
class ConfidenceCurve:
    """The probability that answers of one kind are right: the logistic function of `slope` x log odds + `offset`, but
    at most (n + 1) / (n + 2) after n right ones.

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
    bigger model whose address the runtime was given). With `mark`, without that address, and where the adapter is not
    in the bundle, the answer is only marked.
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
        """The adapter's files that are for all formats."""
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
    of the build that are nowhere else in the manifest; it is empty for exports of adapters trained elsewhere. `authors`
    has the public keys, by their ids, of those who may replace an adapter (see `bundle.parts`).
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
    authors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def adapter(self, name: str) -> AdapterEntry:
        """The adapter called `name`; NotFoundError lists the adapters of the bundle."""
        if name not in self.adapters:
            names = first_of([*self.adapters], 20, ", ") or "none"
            raise NotFoundError(f"no adapter {name!r} in bundle {self.name!r}", f"choose one of: {names}")
        return self.adapters[name]

    def to_json(self) -> str:
        """The text of manifest.json."""
        # In lines, of which an update of one adapter of many downloads few, and little indented.
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

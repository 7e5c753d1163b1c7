"""The records of a plan: the base, each adapter, the board, what the build needs, and the build as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune_devices.fit import Fit
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import AdapterSize

from edgetune import methods
from edgetune.bases import BaseSource
from edgetune.methods import MethodOptions, TrainedModules
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.recipe.training import TrainingSpec
from edgetune.tasks.task import Task, Texts
from edgetune.training.device import CPU, TrainingDevice
from edgetune.training.duration import TrainingTime

from .quantization import Candidate

# What the recipe has of an adapter, and what `BoardPlan` sums up.
_LEFT_OUT = ("name", "spec", "trained", "training", "memory")
# What the manifest has in the entry of an adapter, and what is only for whoever builds it.
_NOT_IN_PLAN = ("doubts", "method", "shapes", "scale", "system", "metric", "labels", "output")


@dataclass(frozen=True)
class BasePlan:
    """The base and what the build does with it, such as `("convert", "quantize to q8_0")`.

    `quantization` None: the file ships unchanged. `candidates` are the quantizations to measure first; until then,
    `quantization` is the largest of them. `parameters` are None and `bytes_by_format`, its sizes in the bundle, empty
    for an encoder, and like `architecture` and `trained_context_length` (tokens) for a base that must be downloaded
    first.
    """

    name: str
    quantization: str | None
    steps: tuple[str, ...] = ()
    architecture: str | None = None
    trained_context_length: int | None = None
    parameters: int | None = None
    bytes_by_format: Mapping[str, int] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    @property
    def gguf_bytes(self) -> int | None:
        """The size of its GGUF file, if known."""
        return self.bytes_by_format.get(gguf.NAME)

    def bytes_in(self, target: str) -> int:
        """Its size in a format; for one whose engine predicts none, that of its GGUF file, and 0 if it is unknown."""
        return self.bytes_by_format.get(target, self.gguf_bytes or 0)


@dataclass(frozen=True)
class RowsPlan:
    """The data of an adapter: numbers of rows, and optimizer steps.

    `longest_tokens` and `mean_tokens` are high estimates of the tokens of a training row, the mean without those of the
    chat template. Of these, all rows begin with about `shared_tokens`, which a step computes once.
    """

    train: int
    validation: int
    longest_tokens: int
    mean_tokens: float
    shared_tokens: int
    steps: int


@dataclass(frozen=True)
class AdapterPlan:
    """What is decided about an adapter before it is trained; `shapes` and `dtypes` are by format.

    `spec` is its section of the recipe, in which the build completes the options of the method. `target_modules` is
    None for a method that does not tune linear modules; with `auto` the build chooses them and a rank of at most
    `rank`, the highest one in the files. `memory` is by engine, without those where it is a merged model.

    `on_grid`: it is trained through the rounding to the base's grid, so that the merged model keeps the base's types.

    Without the base's header, `trained` and `trainable_parameters` are None and all sizes are missing. The rows decide
    `metric`, `labels`, `output`, `rows` and what `training: auto` stands for, with `training_reason`. `doubts` say what
    is odd about them.
    """

    name: str
    spec: AdapterSpec
    shapes: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    rank: int = 0
    on_grid: bool = False
    trained: TrainedModules | None = None
    trainable_parameters: int | None = None
    bytes_by_format: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, AdapterSize] = field(default_factory=dict)
    metric: str = "exact"
    labels: tuple[str, ...] = ()
    output: OutputSpec | None = None
    training: TrainingSpec = field(default_factory=TrainingSpec)
    training_reason: str = ""
    rows: RowsPlan | None = None
    doubts: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.spec.method.name

    @property
    def options(self) -> MethodOptions:
        """The options of the method."""
        return self.spec.method.options

    @property
    def start(self) -> Path | None:
        """The folder of the adapter that its training starts from."""
        return None if self.spec.start_from is None else Path(self.spec.start_from)

    @property
    def guesses_rank(self) -> bool:
        """Whether the trained change decides the rank, and with it the sizes."""
        return methods.load(self.method).guesses_rank(self.options) and "low_rank" in self.shapes.values()

    @property
    def trainings(self) -> int:
        """How many trainings on all rows take as long as its own and those without a fold."""
        return self.spec.confidence_folds or 1

    @property
    def has_draft(self) -> bool:
        """Whether a draft table is made for it; labels are not decoded."""
        return self.spec.draft and not self.labels

    @property
    def takes_grid(self) -> bool:
        """Whether it is to be merged and can be trained on a grid; what is trained has scale 1."""
        return self.spec.merged and self.spec.scale == 1.0 and methods.load(self.method).trains_on_grid

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, without the name, and without the options, which the recipe has."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in _LEFT_OUT}
        spec, modules = self.spec, self.target_modules
        return {
            "method": self.method,
            **values,
            "scale": spec.scale,
            "system": spec.system,
            "merged": spec.merged,
            "drafts": self.has_draft,
            "golden": spec.golden,
            "target_modules": list(modules) if isinstance(modules, tuple) else modules,
            "modules": 0 if self.trained is None else len(self.trained.modules),
            # Without rows it is an adapter of a bundle, whose manifest has its metric.
            "metric": None if self.rows is None else self.metric,
            "labels": list(self.labels),
            "output": None if self.output is None else self.output.kind,
            "rows": None if self.rows is None else asdict(self.rows),
        }


@dataclass(frozen=True)
class BoardPlan:
    """Why the settings were chosen for the recipe's board, and the prediction for it in each engine."""

    name: str
    reason: str
    fits: tuple[Fit, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"name": self.name, "reason": self.reason, "fits": [fit.to_json() for fit in self.fits]}


@dataclass(frozen=True)
class BuildNeeds:
    """What a build needs, in 10^6 bytes.

    Memory: `training_mb` and `export_mb`; at least `min_training_mb` with the smallest forward passes, and
    `min_export_mb` with the base's float32 weights, `weights_mb`, mapped from disk.

    Disk: up to `disk_mb` at a time, of which the bundle is `bundle_mb`; at least `min_disk_mb`. `extra_formats_mb` is
    the part of the bundle that all formats but the first add.
    """

    parameters: int
    weights_mb: float
    training_mb: float
    min_training_mb: float
    export_mb: float
    min_export_mb: float
    bundle_mb: float
    disk_mb: float
    min_disk_mb: float
    extra_formats_mb: float

    @property
    def memory_mb(self) -> float:
        """The memory of the largest stage."""
        return max(self.training_mb, self.export_mb)

    def to_json(self) -> dict[str, int]:
        """The figures as JSON values, in whole MB."""
        return {key: math.ceil(value) for key, value in {"memory_mb": self.memory_mb, **asdict(self)}.items()}


@dataclass(frozen=True)
class Room:
    """What this machine has for a build: free memory (None if the system does not report it) and free disk space of
    `folder`, in 10^6 bytes, the training device, the cores, and the instruction sets by the names of boards.

    The work folder of an earlier build of the same bundle counts as free, because it is reused.
    """

    folder: Path
    memory_mb: float | None
    disk_mb: float
    device: TrainingDevice = CPU
    cores: int = 1
    instruction_sets: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NeedsReport:
    """What a build needs, what this machine has free, and warnings where that is little.

    `training_time` is None where no speed was measured: see `needs.training_time`.
    """

    needs: BuildNeeds
    room: Room
    warnings: tuple[str, ...] = ()
    training_time: TrainingTime | None = None

    @property
    def summary(self) -> str:
        """What is needed and what is free, in one line."""
        needs, room = self.needs, self.room
        free = "" if room.memory_mb is None else f" ({mb(room.memory_mb)} free)"
        device = f" on {room.device}" if room.device.has_memory else ""
        smallest = ""
        if needs.min_training_mb < needs.training_mb:
            smallest = f" ({mb(needs.min_training_mb)} with the smallest forward passes)"
        return (
            f"memory about {mb(needs.training_mb)} for training{smallest}{device} and {mb(needs.export_mb)} for "
            f"export{free}; "
            f"disk up to {mb(needs.disk_mb)}, the bundle {mb(needs.bundle_mb)} of it ({mb(room.disk_mb)} free)"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, in whole MB and seconds."""
        room, time = self.room, self.training_time
        return {
            "summary": self.summary,
            **self.needs.to_json(),
            "free_memory_mb": None if room.memory_mb is None else math.ceil(room.memory_mb),
            "free_disk_mb": math.ceil(room.disk_mb),
            "min_training_s": None if time is None else math.ceil(time.min_s),
            "max_training_s": None if time is None else math.ceil(time.max_s),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class BuildPlan:
    """Everything that a build decides or predicts before any work.

    `recipe` has the choices for the board. `source` is the base that was found, None if it must be downloaded first;
    then, and for encoders, there are no `board` and no `needs`. `domain` describes the text of continued pretraining,
    `training_device` is what trains.
    """

    recipe: Recipe
    source: BaseSource | None
    base: BasePlan
    adapters: Mapping[str, AdapterPlan]
    board: BoardPlan | None = None
    domain: str | None = None
    needs: NeedsReport | None = None
    training_device: TrainingDevice = CPU

    @property
    def width(self) -> int | None:
        """The width of the base's layers; None if it is not known yet, and for encoders."""
        shape = None if self.source is None else self.source.shape
        return None if shape is None else shape.hidden

    @property
    def warnings(self) -> list[str]:
        """What may be wrong with the rows of each adapter, and where this machine has little for the build."""
        doubts = [f"{name}: {doubt}" for name, adapter in self.adapters.items() for doubt in adapter.doubts]
        return [*doubts, *(() if self.needs is None else self.needs.warnings)]

    def with_adapters(self, adapters: Mapping[str, AdapterPlan]) -> BuildPlan:
        """The plan with these adapters in place of its own, and with the options of their methods in the recipe."""
        adapters = {**self.adapters, **adapters}
        specs = {name: adapters[name].spec for name in self.recipe.adapters}
        return replace(self, adapters=adapters, recipe=self.recipe.model_copy(update={"adapters": specs}))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, with what is free on this machine."""
        recipe = self.recipe
        return {
            "name": recipe.name,
            "task": recipe.task,
            "base": {**asdict(self.base), "gguf_bytes": self.base.gguf_bytes, "steps": list(self.base.steps)},
            "formats": list(recipe.targets),
            "context_length": recipe.context_length,
            "threads": recipe.threads,
            "board": None if self.board is None else self.board.to_json(),
            "domain": self.domain,
            "training_device": {"name": self.training_device.name, "title": self.training_device.title},
            "router": None if recipe.route is None else recipe.route.model_dump(mode="json"),
            "adapters": {name: adapter.to_json() for name, adapter in self.adapters.items()},
            "needs": None if self.needs is None else self.needs.to_json(),
        }

    def for_manifest(self) -> dict[str, Any]:
        """The decisions and predictions that the rest of the manifest lacks, without those about this machine."""
        values = self.to_json()
        adapters = {
            name: {key: value for key, value in adapter.items() if key not in _NOT_IN_PLAN}
            for name, adapter in values["adapters"].items()
        }
        needs = None if self.needs is None else self.needs.needs.to_json()
        return {key: values[key] for key in ("formats", "board", "domain")} | {
            "steps": values["base"]["steps"],
            "gguf_bytes": self.base.gguf_bytes,
            "adapters": adapters,
            "needs": needs,
        }


@dataclass(frozen=True)
class PlannedBuild:
    """A plan with the data that it was made from: the rows of each task, and the texts of continued pretraining."""

    plan: BuildPlan
    tasks: Sequence[Task]
    texts: Texts | None = None


def mb(value: float) -> str:
    """A size as text, rounded up to whole MB."""
    return f"{math.ceil(value):,} MB"

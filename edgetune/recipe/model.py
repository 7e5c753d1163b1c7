"""The recipe model: read a recipe file, validate it and report all its problems at once, each with its line."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from edgetune_export import backends
from edgetune_export.backends.format import OptionsByFormat
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import (
    DEFAULT,
    FLOATS,
    HEAD_TYPES,
    QUANTIZATIONS,
    TENSOR_TYPES,
    quantization_named,
)
from edgetune_runtime.wording import suggestion
from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from edgetune import methods
from edgetune.common.files import expanded

from . import task_types
from .part import OrSwitch, RecipePart, Text
from .parts import AdapterSpec, DomainSpec, MethodSpec, Name, QuantizationSpec, Target, TaskName
from .problems import AUTO, Document, Loc, explain, override, read_document, value_at
from .routing import RouteSpec
from .rows import Rows, plain_recipe
from .task_files import with_task_files
from .task_types import TaskType
from .training import TrainingSpec

_GPUS = {"cuda", "gpu", "mps"}
"""What is no board, but may be meant for `training.device`; `cuda:1` too."""


class Recipe(RecipePart):
    """A base, its tasks and a board: everything that `edgetune build` needs."""

    name: Name
    """Name of the bundle: a-z, 0-9, _ and -."""
    task: TaskName = GENERATION
    """text-generation: the base is a decoder. text-classification: the base is an encoder, each adapter trains its own
    classification head, and targets is [onnx] (docs/encoders.md)."""
    base: Text
    """The base model: an alias such as smollm2-135m, a .gguf file, a Hugging Face folder or a hub id. For
    text-classification: the alias all-minilm-l6-v2, or the folder or hub id of a BERT-type model."""
    targets: tuple[Target, ...] = Field(default=(backends.DEFAULT,), min_length=1)
    """Formats to export: gguf for llama.cpp, onnx for onnxruntime. The runtime opens the first one by default."""
    quantization: str | QuantizationSpec | None = None
    """Quantization of the base (q4_0, q4_k_m, q5_k_m, q6_k, q8_0, f16 …), applied before training. null: q8_0 for a
    folder or a hub id; a .gguf file is used as it is. ONNX stores q4_0 and q8_0 exactly and at the same size. q4_0+q5_0
    is q4_0 with the output layer in q5_0. auto, or keys such as budget_mb: the build measures some and chooses
    (docs/explanation/quantization.md)."""
    imatrix: Literal["auto"] | None = None
    """Importance matrix for `quantization`. auto: from the training rows of all adapters, so that weights with large
    inputs there are rounded with smaller errors. Size and speed stay the same; it changes nothing at 8 bits or more."""
    merged_quantization: str | None = None
    """Quantization of merged models. null: that of the base, for which lora, rslora and loraplus are trained with
    rounded weights; for other methods q8_0 if the base has fewer bits, since rounding them again loses most of what
    was trained."""
    states: Literal["first_use", "start", "ship"] = "first_use"
    """Where the states of the adapters' system prompts are computed. first_use: on the device, at the first call.
    start: on the device, when `edgetune-run serve` starts. ship: by the build, which adds them to the bundle; they work
    with this version of the engine only. A state of SmolLM2 takes 23 kB per token, twice that in ONNX."""
    onnx: OnnxOptions = OnnxOptions()
    """How the ONNX graph stores the base's weights."""
    device: str | None = None
    """The board that the bundle must fit; `edgetune devices list` shows the names."""
    context_length: int = Field(default=1024, ge=16)
    """Maximum number of tokens of prompt and answer together, in training and on the device. Without it: what fits on
    the board, or 1024, or what the base was trained for."""
    threads: PositiveInt | None = None
    """Number of threads on the device. null: one per core of the board, or without a board one per core, at most 8."""
    training: TrainingSpec = TrainingSpec()
    """Training options for all adapters."""
    domain: DomainSpec | None = None
    """Continued pretraining of the base on your own text, before the adapters are trained."""
    adapters: dict[Name, AdapterSpec] = Field(min_length=1)
    """The tasks, one adapter each, by name (a-z, 0-9, _ and -). `from` adds the adapters of files: a pattern, such as
    tasks/*.yaml, or a list of patterns. Such a file has the keys of one adapter; its name is that of the file, or the
    key `name`, and its paths are relative to the file."""
    route: OrSwitch[RouteSpec] = None
    """A router, which chooses the adapter of a prompt (`adapter="auto"`): true, or a mapping of options."""

    _folder: Path = PrivateAttr(default=Path())
    _files: tuple[Path, ...] = PrivateAttr(default=())
    _others: dict[str, AdapterSpec] = PrivateAttr(default_factory=dict)

    @classmethod
    def from_file(
        cls, path: str | Path, settings: Mapping[str, Any] | None = None, flags: Mapping[str, str] | None = None
    ) -> Recipe:
        """Read and validate a recipe file; paths in it are relative to its folder.

        `settings` maps dotted keys, such as `adapters.command.method.r`, to values that replace those in the file;
        texts are parsed as YAML. `flags` names the options that set some of these keys; the others are called settings.

        Raises NotFoundError if the file does not exist, and UsageError with all problems, one per line.
        """
        document = read_document(Path(path))
        return _validated(document, Path(path).parent, settings or {}, flags or {})

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        folder: str | Path = "",
        settings: Mapping[str, Any] | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> Recipe:
        """Validate a recipe that is written in Python, with the keys of a recipe file; paths are relative to `folder`.
        `settings` and `flags` are those of `from_file`.

        `train` and `validation` can also be rows: a list or iterator of mappings, a pandas DataFrame or a
        datasets.Dataset. They are read once, here.

        Raises UsageError with all problems, one per line, or with the number of a row that cannot be read.
        """
        return _validated(Document(plain_recipe(values)), Path(folder), settings or {}, flags or {})

    @property
    def folder(self) -> Path:
        """The folder of the recipe file; relative paths in the recipe start here."""
        return self._folder

    @property
    def default_out(self) -> Path:
        """The bundle's folder if the command line names none."""
        return Path("build") / self.name

    @property
    def task_type(self) -> TaskType:
        """The facts of its task."""
        return task_types.load(self.task)

    @property
    def quantization_spec(self) -> QuantizationSpec | None:
        """What to choose among quantizations that the build measures; None if it measures none."""
        return self.quantization if isinstance(self.quantization, QuantizationSpec) else None

    @property
    def format_options(self) -> OptionsByFormat:
        """The options of the formats, by their names."""
        return {"onnx": self.onnx}

    @model_validator(mode="before")
    @classmethod
    def _targets_of_task(cls, values: object) -> object:
        if isinstance(values, dict):
            fit = backends.of_task(str(values.get("task", GENERATION)))
            if fit and backends.DEFAULT not in fit:
                return {"targets": list(fit), **values}
        return values

    @field_validator("targets")
    @classmethod
    def _once(cls, targets: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        task = _task_of(info)
        fit = backends.of_task(task)
        if not set(targets) <= set(fit):
            base = task_types.load(task).base
            raise ValueError(f"[{', '.join(targets)}] does not work for {base}; use [{', '.join(fit)}]")
        return tuple(dict.fromkeys(targets))

    @field_validator("quantization", "imatrix", "merged_quantization", "device", "domain")
    @classmethod
    def _fits_task(cls, value: object, info: ValidationInfo) -> object:
        reason = task_types.load(_task_of(info)).refused_keys.get(str(info.field_name))
        if value is not None and reason is not None:
            shown = value.model_dump(exclude_none=True) if isinstance(value, QuantizationSpec) else value
            raise ValueError(reason.format(value=shown))
        return value

    @field_validator("quantization", mode="before")
    @classmethod
    def _chosen_by_default(cls, quantization: object) -> object:
        if not isinstance(quantization, str | dict | QuantizationSpec | None):
            raise ValueError(
                f"{quantization!r} is not a quantization; use q4_0, auto, or a mapping such as {{budget_mb: 90}}"
            )
        return QuantizationSpec() if quantization == AUTO else quantization

    @field_validator("quantization", "merged_quantization")
    @classmethod
    def _known_quantization(cls, quantization: str | QuantizationSpec | None) -> str | QuantizationSpec | None:
        if isinstance(quantization, str):
            body, _, head = quantization.partition("+")
            _one_of(body, sorted(QUANTIZATIONS), "quantization")
            if "+" in quantization:
                _one_of(head, sorted(HEAD_TYPES), "type of the output layer")
                if body in FLOATS:
                    raise ValueError(f"{body} has no other type of the output layer; use {body}")
        return quantization

    @field_validator("imatrix")
    @classmethod
    def _rounds_coarsely(cls, imatrix: str | None, info: ValidationInfo) -> str | None:
        quantization = info.data.get("quantization")
        if imatrix is not None and "quantization" in info.data and not gains_from_matrix(quantization):
            raise ValueError(f"it changes nothing with quantization: {quantization or 'null'}; use q4_0, or remove it")
        return imatrix

    @field_validator("onnx")
    @classmethod
    def _weights_of_task(cls, onnx: OnnxOptions, info: ValidationInfo) -> OnnxOptions:
        refused = task_types.load(_task_of(info)).refused_weights
        if onnx.weights in refused:
            raise ValueError(refused[onnx.weights])
        return onnx

    @field_validator("onnx")
    @classmethod
    def _keeps_quantization(cls, onnx: OnnxOptions, info: ValidationInfo) -> OnnxOptions:
        quantization, targets = info.data.get("quantization"), info.data.get("targets", ())
        chooses_size = isinstance(quantization, QuantizationSpec) and (
            quantization.budget_mb is not None or quantization.optimize == "size"
        )
        if chooses_size and targets == ("onnx",) and onnx.weights in ("fp32", "int4"):
            raise ValueError(
                f"weights: {onnx.weights} has one size for all quantizations; leave it out, or name a quantization"
            )
        return onnx

    @field_validator("device")
    @classmethod
    def _known_board(cls, device: str | None) -> str | None:
        if device is None:
            return None
        from edgetune_devices import boards  # noqa: PLC0415 - rarely needed

        if device.partition(":")[0] in _GPUS:
            gpu = device.replace("gpu", "cuda")
            raise ValueError(f"no board {device!r}; to train on a GPU, set training.device to {gpu}")
        return _one_of(device, boards.names_with_sizes(), "board")

    @field_validator("adapters")
    @classmethod
    def _adapters_of_task(cls, adapters: dict[str, AdapterSpec], info: ValidationInfo) -> dict[str, AdapterSpec]:
        task_type = task_types.load(_task_of(info))
        problems = [f"{name}: {problem}" for name, spec in adapters.items() for problem in spec.unfit_for(task_type)]
        if problems:
            raise ValueError("; ".join(problems))
        return adapters

    @field_validator("route")
    @classmethod
    def _routes_adapters(cls, route: RouteSpec | None, info: ValidationInfo) -> RouteSpec | None:
        if route is not None and "adapters" in info.data:
            generates = _task_of(info) == GENERATION
            problems = route.problems(str(info.data.get("name")), info.data["adapters"], generates=generates)
            if problems:
                raise ValueError("; ".join(problems))
        return route

    @model_validator(mode="after")
    def _keep_folder(self, info: ValidationInfo) -> Recipe:
        context = info.context or {}
        self._folder, self._files = context.get("folder", Path()), context.get("files", ())
        return self

    def only(self, names: Collection[str]) -> Recipe:
        """The recipe with only these adapters to train; the rows of the others are still rows of other tasks."""
        copy = self.model_copy(update={"adapters": {name: self.adapters[name] for name in names}})
        copy._others = {**self._others, **{name: spec for name, spec in self.adapters.items() if name not in names}}
        return copy

    def others(self, name: str) -> dict[str, AdapterSpec]:
        """The adapters besides `name`, also those that are not to be trained."""
        return {other: spec for other, spec in {**self.adapters, **self._others}.items() if other != name}

    def check_adapter(self, name: str) -> None:
        """UsageError if the recipe has no adapter of this name."""
        if name not in self.adapters:
            raise UsageError(f"no adapter {name!r} in the recipe", suggestion(name, list(self.adapters)))

    def resolved(self) -> dict[str, Any]:
        """The recipe with all defaults filled in, as JSON values that can be read as a recipe again.

        Paths inside the recipe's folder are relative to it. Other absolute paths are cut to their last part, so that
        the bundle does not reveal where it was built.
        """
        values = self.model_dump(mode="json")
        paths: list[Loc] = [("base",), *(loc for loc, _ in self.sources())]
        paths += [("adapters", name, "start_from") for name, spec in self.adapters.items() if spec.start_from]
        sources: dict[Loc, str] = {}
        for *parents, key in paths:
            section = value_at(tuple(parents), values)
            path = self._portable(source := section[key])
            # Files of the same name in two folders stay two.
            is_other = sources.setdefault((*parents, path), source) != source
            section[key] = f"{key}-{path}" if is_other else path
        return values

    def sources(self) -> Iterator[tuple[Loc, str | Rows]]:
        """The data files, hub ids and rows, each with its path, such as adapters, command, data, train."""
        parts: list[tuple[Loc, AdapterSpec | DomainSpec]]
        parts = [(("adapters", name), spec) for name, spec in self.adapters.items()]
        parts += [(("domain",), self.domain)] if self.domain is not None else []
        for loc, part in parts:
            for section, values in (("data", part.data), ("method", part.method.options)):
                for key in ("train", "validation", "confidence", "document"):
                    source = getattr(values, key, None)
                    if source is not None:
                        yield (*loc, section, key), source

    def files(self) -> list[str]:
        """What is read for it: its file and those of its adapters, the base, and data files; also hub ids and rows."""
        base = self._folder / expanded(self.base)
        return [*map(str, (*self._files, base)), *(str(source) for _, source in self.sources())]

    def _portable(self, source: str) -> str:
        inside = source.removeprefix(f"{self._folder}{os.sep}")
        return Path(inside).name if Path(inside).is_absolute() else inside


def gains_from_matrix(quantization: str | QuantizationSpec | None) -> bool:
    """Whether an importance matrix changes a base of this quantization, or one of those to choose from.

    True for text that names no quantization, such as `auto`.
    """
    if not isinstance(quantization, str) or quantization.partition("+")[0] not in QUANTIZATIONS:
        return quantization is not None
    parts = quantization_named(quantization)
    return any(TENSOR_TYPES[name].bits < TENSOR_TYPES[DEFAULT].bits for name in (parts.most, parts.some, parts.head))


def _task_of(info: ValidationInfo) -> str:
    """The task of the recipe being validated, the default for an unknown one; `task` is validated first."""
    return str(info.data.get("task", GENERATION))


def _validated(document: Document, folder: Path, settings: Mapping[str, Any], flags: Mapping[str, str]) -> Recipe:
    document = with_task_files(document, folder)
    values = copy.deepcopy(document.values)
    named = {key: flags.get(key, f"setting {key}") for key in settings}
    found = ((key, override(values, key, value, model_at)) for key, value in settings.items())
    problems = [f"{named[key]}: {problem}" for key, problem in found if problem]
    try:
        recipe = Recipe.model_validate(values, context={"folder": folder, "files": document.files})
    except ValidationError as error:
        problems += explain(error, values, document, named, model_at)
    if problems:
        raise UsageError("\n".join(problems))
    return recipe


TEMPLATE = Path(__file__).with_name("template_recipe.yaml").read_text(encoding="utf-8")
"""The commented recipe that `edgetune init` writes without data of the user."""
TEMPLATE_DATA = Path(__file__).with_name("template_data")
"""The folder with its data."""


def _one_of(value: str, choices: list[str], kind: str) -> str:
    if value not in choices:
        raise ValueError(f"no {kind} {value!r}; {suggestion(value, choices)}")
    return value


def model_at(loc: Loc, values: dict[str, Any]) -> type[BaseModel] | None:
    """The model that validates the mapping at `loc`; None if its keys are not fixed."""
    if not loc:
        return Recipe
    if loc[0] == "adapters" and len(loc) <= 2:
        return AdapterSpec if len(loc) == 2 else None
    parent = model_at(loc[:-1], values)
    field = parent.model_fields.get(str(loc[-1])) if parent is not None else None
    choices = () if field is None else (field.annotation, *get_args(field.annotation))
    model = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return _options_model(value_at(loc, values)) if model is MethodSpec else model


def _options_model(method: object) -> type[BaseModel] | None:
    default = MethodSpec.model_fields["name"].default
    name = method.get("name", default) if isinstance(method, dict) else method or default
    return methods.load(name).options if name in methods.names() else None

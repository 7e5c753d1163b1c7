"""The nested sections of a recipe: data, method, training, adapters and domain.

The text under a field describes its key. The JSON schema and docs/recipe.md are generated from these texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgetune_export import backends
from edgetune_runtime.bundle import ASK, MARK, UnsureRule
from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from edgetune import methods, task_types
from edgetune.methods.lora import LoraOptions
from edgetune.task_types import TaskType

from .augment import AugmentSpec
from .output import AUTO, OutputOption
from .part import RecipePart, Text
from .problems import FileMapping, other_names, shown
from .rows import Rows

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]*")
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?|mps")
SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def _check_name(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name; use a-z, 0-9, _ and -, starting with a letter or a digit")
    return name


Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN.pattern}$"})]
if TYPE_CHECKING:
    TaskName = str
else:
    # As pydantic and the reference list its values.
    TaskName = Literal[tuple(task_types.names())]


def _check_target(name: str) -> str:
    error = backends.unknown(name)
    if error is not None:
        raise ValueError(str(error))
    return name


Target = Annotated[
    str,
    AfterValidator(_check_target),
    Field(json_schema_extra=lambda schema: schema.update(enum=backends.names())),
]
"""The name of a format for which there is a backend."""
Metric = Literal["auto", "exact", "json", "label", "rouge_l", "chrf", "perplexity"]


def _check_device(key: str) -> str:
    if not _DEVICE.fullmatch(key):
        raise ValueError(f"{key!r} is not a device; use auto, cpu, cuda, cuda:N (N from 0) or mps")
    return key


DeviceKey = Annotated[
    str, AfterValidator(_check_device), Field(json_schema_extra={"pattern": f"^({_DEVICE.pattern})$"})
]


class TrainingSpec(RecipePart):
    """Training options. At the top of a recipe they apply to all adapters, under an adapter to that one.

    `training: auto` is short for `training: {auto: true}`.
    """

    auto: bool = False
    """Choose the options that the recipe does not set by the number of training rows and the width of the base
    (docs/how-to/few-rows.md)."""
    epochs: PositiveFloat = 3.0
    """Passes over the training rows; may be a fraction."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps, even before the last epoch ends."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate, reached at the end of the warmup."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    seed: int = Field(default=0, ge=0)
    """Random seed for the held-out split, the order of the rows and the adapter's initial weights."""
    evals: PositiveInt = 8
    """Validation passes per training run; there is at least one per epoch."""
    patience: PositiveInt | None = 3
    """Early stopping: stop after this many validation passes without a lower loss. null: train to the end."""
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    """Number format of the base's weights in training. auto: bf16 if the hardware computes it fast, otherwise fp32.
    int8: 1.2 to 1.6 times as fast as fp32 on x86 CPUs without bf16 arithmetic, but with a higher loss, because products
    with frozen weights are rounded; it uses 6 bytes per weight instead of 4, and validation stays in fp32."""
    device: DeviceKey = "auto"
    """Device for training (docs/how-to/gpu.md): auto (the first GPU that torch finds, otherwise the CPU), cpu, cuda (an
    NVIDIA or AMD GPU), cuda:1 (the second one), or mps (Apple silicon). One for all trainings of a build."""
    memory_mb: PositiveInt | None = None
    """Memory limit of the training process in MB; on a GPU, the limit of GPU memory. null: all free memory. Forward
    passes are made small enough for the limit, with activation checkpointing if a single row does not fit; the result
    is the same."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str) and value != AUTO:
            raise ValueError(f"{shown(value)} is not a mapping of options; write one, or auto")
        return {"auto": True} if value == AUTO else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": AUTO}, handler(core)]}

    @model_serializer(mode="wrap")
    def _values(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """All values; as JSON for keys and manifests, without those that depend on the machine: another can resume."""
        values: dict[str, Any] = dump(self)
        if info.mode == "json":
            for key in ("device", "memory_mb"):
                values.pop(key, None)
            if not self.auto:
                values.pop("auto", None)
        return values

    def under(self, overrides: TrainingSpec) -> TrainingSpec:
        """These options, overridden by those that are set in `overrides`."""
        return self.model_copy(update={name: getattr(overrides, name) for name in overrides.model_fields_set})


def _set_values(training: TrainingSpec, info: SerializationInfo) -> dict[str, Any]:
    # A plan sets all options of an adapter if it chooses some; only the recipe can have the device.
    return training.model_dump(mode=info.mode, exclude_unset=True, exclude={"device"})


def _without_device(training: TrainingSpec) -> TrainingSpec:
    if "device" in training.model_fields_set:
        raise ValueError("device is one for all trainings of a build; set it under training at the top of the recipe")
    return training


OwnTraining = Annotated[TrainingSpec, AfterValidator(_without_device), PlainSerializer(_set_values)]
"""Training options that override those of the recipe; unset ones stay unset."""


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like a hub id: owner/name without a file suffix such as .jsonl."""
    match = HUB_ID.fullmatch(source)
    return match is not None and not SUFFIX.search(match["id"])


def _beside_the_recipe(value: object, text: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str | Rows:
    if isinstance(value, Rows):
        return value
    source: str = text(value)
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return source
    path = folder / Path(source).expanduser()
    return source if is_hub_id(source) and not path.exists() else str(path)


def _from_the_recipe(value: object, text: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str:
    folder: Path = (info.context or {}).get("folder", Path())
    return str(folder / Path(text(value)).expanduser())


def _without_rows(source: str | Rows) -> str:
    return source.summary if isinstance(source, Rows) else source


if TYPE_CHECKING:
    Data = str | Rows
else:
    # Only Python code can give rows, so schema and messages know texts alone.
    Data = Annotated[Text, WrapValidator(_beside_the_recipe), PlainSerializer(_without_rows)]
    """A data file, a hub id, or rows from memory."""

Folder = Annotated[Text, WrapValidator(_from_the_recipe)]
"""A folder, relative to that of the recipe."""


class Columns(RecipePart):
    """Which columns of the data have other names: prompt and completion, or messages and tools, or text."""

    prompt: Text | None = None
    """Column of the prompt."""
    completion: Text | tuple[Text, ...] | None = None
    """Column of the completion, or a list of columns, which become one JSON object."""
    messages: Text | None = None
    """Column of the conversation."""
    tools: Text = "tools"
    """Column of a conversation's tools."""
    text: Text | None = None
    """Column of plain text."""
    weight: Text = "weight"
    """Column of a row's weight in training, from 0 to 1, where rows have one."""

    @field_validator("completion")
    @classmethod
    def _some(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("the list is empty; name at least one column")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        named = [key for key in ("prompt", "completion", "messages", "text") if getattr(self, key) is not None]
        if named not in (["prompt", "completion"], ["messages"], ["text"]):
            problem = f"{' and '.join(named)} do not make a form of rows" if named else "names no column"
            raise ValueError(f"{problem}; name prompt and completion, or messages, or text")
        return self


class DataSpec(RecipePart):
    """The rows of one task: JSONL, CSV or TSV files, or a hub id.

    A row has one of four forms: `messages`, ending with an assistant message; `prompt` and `completion`; `text` and
    `label`; or only `text`, all of which is learned. A completion that is an object or a list is learned as JSON.
    Messages may have `tool_calls` and results of the role `tool`; the row's `tools` define the tools. A `weight` from 0
    to 1 in a row multiplies its loss in training.
    A hub id is `owner/name`, `owner/name:config` or `owner/name:config@split`; the default split is `train`.
    """

    train: Data
    """Training rows: a file (path relative to the recipe) or a hub id such as owner/name:config@split."""
    validation: Data | None = None
    """Validation rows, given like `train`. null: part of the training rows is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that is held out for validation if `validation` is not given."""
    confidence: Data | None = None
    """Rows on which the confidence of answers is fitted, given like `train`; none may be a training row. null: every
    second validation row, which then does not choose the checkpoint; all of them if there are fewer than 200."""
    rows: PositiveInt | None = None
    """Train on at most this many of the training rows, chosen by the seed. null: all."""
    columns: Columns | None = None
    """Names of the columns; not needed for rows in one of the four standard forms."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss: those of the completions, or all."""
    augment: AugmentSpec | None = None
    """Changed copies of the training rows: true, or a mapping of options."""

    @field_validator("augment", mode="before")
    @classmethod
    def _with_defaults(cls, augment: object) -> object:
        return {True: {}, False: None}[augment] if isinstance(augment, bool) else augment


class MethodSpec(RecipePart):
    """A method and its options, written as the method's name or as a mapping of `name` and the options."""

    name: str = "lora"
    """The method's name."""
    options: SerializeAsAny[methods.MethodOptions]
    """The options of the method, with all defaults filled in."""

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, cls):
            return value
        mapping = {"name": value} if isinstance(value, str) else value
        if not isinstance(mapping, dict):
            raise ValueError(f"{shown(value)} is not a method; write a name, or a mapping of name and options")
        name = mapping.get("name", cls.model_fields["name"].default)
        error = methods.unknown(str(name))
        if error is not None:
            raise ValueError(str(error))
        options = {key: option for key, option in mapping.items() if key != "name"}
        return {"name": name, "options": methods.load(name).options.model_validate(options, context=info.context)}

    @model_serializer
    def _as_written(self, info: SerializationInfo) -> dict[str, Any]:
        return {"name": self.name, **self.options.model_dump(mode="json", exclude_unset=info.exclude_unset)}

    @property
    def is_auto(self) -> bool:
        """Whether the build chooses the target modules."""
        return isinstance(self.options, LoraOptions) and self.options.is_auto

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: object, _handler: object) -> dict[str, Any]:
        return {"title": "Method", "description": cls.__doc__, "oneOf": [{"enum": methods.names()}, *_method_schemas()]}


class OutOfScopeSpec(RecipePart):
    """How a classification task learns texts that none of its labels fits. `out_of_scope: true` has all defaults."""

    label: Text = "out_of_scope"
    """The label of such texts. Training rows may have it too, where you know what people ask."""
    refused: float = Field(default=0.1, gt=0, lt=1)
    """Share of the validation rows that may get this label wrongly: a text gets it if the likeliest of the other labels
    is less likely than for the rest of these rows."""


class AdapterSpec(RecipePart):
    """One task: its data, and how its adapter is trained, exported and scored."""

    data: DataSpec
    """The task's rows."""
    system: Text | None = None
    """System prompt, added to each conversation that has none, in training and on the device."""
    labels: tuple[Text, ...] | None = None
    """The possible answers of a classification task. null: those of the training rows, if these have a `label` or the
    metric is label."""
    out_of_scope: OutOfScopeSpec | None = None
    """A label for texts that none of the others fits: true, or a mapping of options. The build makes rows of it."""
    metric: Metric = "auto"
    """How answers are scored. auto: chosen by the form of the rows."""
    output: OutputOption | None = None
    """Output constraint of the answers: auto (inferred from the training rows), or a mapping with `schema` (a JSON
    schema or a file), `choices` (a list of texts), `regex`, or `grammar` (Lark or a .lark file), and for a schema
    `spacing` (spaced, compact or any)."""
    draft: bool = True
    """Ship a draft table, made from the training rows, with which several tokens are decoded per step."""
    golden: bool = True
    """Put the prompt of one validation row and the adapter's answer to it into the manifest, with which
    `edgetune-run check` compares the answers of a device. false: no prompt of a row is in the bundle."""
    confidence: bool = True
    """Let the runtime answer validation rows at the end of the build, to fit how likely each answer is right. Answers
    scored by rouge_l or chrf, which are not right or wrong, have no confidence."""
    min_confidence: float | None = Field(default=None, gt=0, lt=1)
    """Answers with a lower confidence are unsure, and so are those whose confidence is not known."""
    unsure: Text = MARK
    """What becomes of an unsure answer: mark (it is marked), ask (the question `ask` comes back in its place), base or
    the name of another adapter (that one answers), defer (a bigger model answers, whose address the runtime is given),
    or error."""
    ask: Text | None = None
    """The question back; sets `unsure: ask`."""
    method: MethodSpec = Field(default_factory=lambda: MethodSpec.model_validate("lora"))
    """The tuning method: its name, or a mapping of `name` and options."""
    start_from: Folder | None = None
    """The folder of an adapter that training starts from, saved by PEFT or by a build (`OUT.work/train/NAME/adapter`),
    with lora, rslora and loraplus. The method must have the options of that adapter."""
    scale: float = 1.0
    """Scale of the adapter if the caller gives none."""
    merged: bool = False
    """Ship a full model with the adapter merged in, as large as the base, instead of an adapter file."""
    dtype: Literal["f16", "q8_0", "f32"] = "f16"
    """Number format of the adapter's GGUF file; q8_0 applies only to matrices whose rows fit its blocks."""
    onnx_dtype: Literal["f32", "f16"] = "f32"
    """Number format of the adapter's .onnx_adapter file. f16 halves the file, but onnxruntime-genai loads f32 only."""
    training: OwnTraining = TrainingSpec()
    """Training options of this adapter; they override those of the recipe."""

    @field_validator("out_of_scope", mode="before")
    @classmethod
    def _with_defaults(cls, out_of_scope: object) -> object:
        return {True: {}, False: None}[out_of_scope] if isinstance(out_of_scope, bool) else out_of_scope

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(labels) < 2:
            remedy = "add some, or remove labels to use those of the training rows"
            raise ValueError(f"{shown(list(labels))} has fewer than 2 labels; {remedy}")
        twice = sorted({label for label in labels or () if (labels or ()).count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} appears twice; keep one")
        return labels

    @model_validator(mode="wrap")
    @classmethod
    def _paths_from_its_file(
        cls, value: object, read: ModelWrapValidatorHandler[AdapterSpec], info: ValidationInfo
    ) -> AdapterSpec:
        if not isinstance(value, FileMapping) or info.context is None:
            return read(value)
        outer = info.context["folder"]
        info.context["folder"] = value.folder
        try:
            return read(value)
        finally:
            info.context["folder"] = outer

    @model_validator(mode="after")
    def _unsure_answers(self) -> AdapterSpec:
        if self.min_confidence is None and (self.unsure != MARK or self.ask is not None):
            raise ValueError("unsure and ask need min_confidence; set it, such as 0.8")
        if self.min_confidence is not None and not self.confidence:
            raise ValueError("min_confidence needs confidence: true; remove one of them")
        if self.unsure == ASK and self.ask is None:
            raise ValueError("unsure is ask, but there is no question; write it as ask")
        if self.ask is not None and self.unsure not in (MARK, ASK):
            raise ValueError(f"unsure is {self.unsure}, and ask is given too; keep one")
        return self

    @property
    def unsure_rule(self) -> UnsureRule | None:
        """What the manifest says of unsure answers."""
        if self.min_confidence is None:
            return None
        return UnsureRule(self.min_confidence, self.unsure if self.ask is None else ASK, self.ask or "")

    @model_validator(mode="after")
    def _auto_stays_apart(self) -> AdapterSpec:
        if self.merged and self.method.is_auto:
            raise ValueError("target_modules: auto does not work with merged: true; name the modules")
        return self

    @model_validator(mode="after")
    def _starts_with_its_modules(self) -> AdapterSpec:
        if self.start_from is None:
            return self
        if not methods.load(self.method.name).takes_start:
            raise ValueError(f"start_from does not work with {self.method.name}; use lora, or remove it")
        if self.method.is_auto:
            raise ValueError("target_modules: auto does not work with start_from; name the modules")
        return self

    def unfit_for(self, task_type: TaskType) -> list[str]:
        """The settings that do not work for this task, each with the remedy."""
        used = {
            "merged": self.merged,
            "system": self.system is not None,
            "metric": self.metric not in ("auto", task_type.metric),
            "target_modules": self.method.is_auto,
            "output": self.output is not None,
            "start_from": self.start_from is not None,
        }
        refused = task_type.refused_adapter_keys
        return [refused[key].format(value=self.metric) for key, is_set in used.items() if is_set and key in refused]


class TextSpec(RecipePart):
    """Plain text: a .txt file (one text), or JSONL, CSV or TSV files or a hub id with a column `text` (one text per
    row)."""

    train: Data
    """Training text: a file (path relative to the recipe) or a hub id."""
    validation: Data | None = None
    """Validation text, given like `train`. null: the end of the training text is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training text that is held out if `validation` is not given."""


class DomainSpec(RecipePart):
    """Continued pretraining of the base before the adapters are trained (docs/domain.md).

    The result has the base's quantization and replaces the base in the rest of the build.
    """

    data: TextSpec
    """The text to train on."""
    method: MethodSpec = Field(default_factory=lambda: MethodSpec.model_validate("full"))
    """The tuning method; it must be one that can be merged, such as full, last_layers or lora."""
    window: int | None = Field(default=None, ge=16)
    """Longer texts are cut into windows of this many tokens. null: `context_length`."""
    training: OwnTraining = TrainingSpec()
    """Training options of this stage; they override those of the recipe, and auto has no effect. A row is a window."""

    @field_validator("method")
    @classmethod
    def _can_be_merged(cls, method: MethodSpec) -> MethodSpec:
        shapes = methods.load(method.name).shapes(method.options)
        if "merged" not in shapes:
            raise ValueError(f"{method.name} cannot be merged into the base; use full, last_layers or lora")
        if method.is_auto:
            raise ValueError("target_modules: auto does not work here, because the result is merged; name the modules")
        return method


def _method_schemas() -> list[dict[str, Any]]:
    """The schema of each method's mapping form, including the aliases of its options."""
    schemas = []
    for name in methods.names():
        options = methods.load(name).options
        schema = options.model_json_schema(by_alias=False)
        properties = {"name": {"const": name, "description": "The method's name."}, **schema["properties"]}
        for key in options.model_fields:
            properties |= dict.fromkeys(other_names(key, options), properties[key])
        required = [] if name == MethodSpec.model_fields["name"].default else ["name"]
        schemas.append({**schema, "properties": properties, "required": [*required, *schema.get("required", [])]})
    return schemas

"""The sections of a recipe for methods, adapters, the quantization and the domain.

The text under a field describes its key. The JSON schema and docs/recipe.md are generated from these texts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgetune_export import backends
from edgetune_runtime.bundle import ASK, MARK, UnsureRule
from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializationInfo,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgetune import methods
from edgetune.methods.common.peft import ALL_LINEAR, AUTO, TargetOptions
from edgetune.methods.lora import LoraOptions

from . import task_types
from .data import DataSpec, Folder, TextSpec
from .output import OutputOption
from .part import Label, OrSwitch, RecipePart, Text
from .problems import FileMapping, other_names, shown
from .task_types import TaskType
from .training import OwnTraining, TrainingSpec

NAME_LENGTH = 100
"""Most characters of a name."""
NAME_PATTERN = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,{NAME_LENGTH - 1}}}")


def _check_name(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        remedy = f"use up to {NAME_LENGTH} of a-z, 0-9, _ and -, the first a-z or 0-9"
        raise ValueError(f"{name!r} is not a valid name; {remedy}")
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

    @model_validator(mode="after")
    def _chooses_modules_of_lora(self) -> MethodSpec:
        targets = self.options.target_modules if isinstance(self.options, TargetOptions) else None
        if targets == AUTO and not self.is_auto:
            raise ValueError(f"{self.name} has no target_modules: auto; list modules or use {ALL_LINEAR}")
        return self

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

    label: Label = "out_of_scope"
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
    labels: tuple[Label, ...] | None = None
    """The possible answers of a classification task. null: those of the training rows, if these have a `label` or the
    metric is label."""
    out_of_scope: OrSwitch[OutOfScopeSpec] = None
    """A label for texts that none of the others fits: true, or a mapping of options. The build makes rows of it."""
    metric: Metric = "auto"
    """How answers are scored. auto: chosen by the form of the rows."""
    output: OutputOption | None = None
    """Output constraint of the answers: auto (inferred from the training and validation rows), or a mapping with
    `schema` (a JSON schema or a file), `choices` (a list of texts), `regex`, or `grammar` (Lark or a .lark file), and
    for a schema `spacing` (spaced, compact or any)."""
    draft: bool = True
    """Ship a draft table, made from the training rows, with which several tokens are decoded per step; adapters with
    labels need none."""
    golden: bool = True
    """Put the prompt of one validation row and the adapter's answer to it into the manifest, with which
    `edgetune-run check` compares the answers of a device. false: no prompt of a row is in the bundle."""
    confidence: bool = True
    """Let the runtime answer validation rows at the end of the build, to fit how likely each answer is right. Answers
    scored by rouge_l or chrf, which are not right or wrong, have no confidence."""
    confidence_folds: int | None = Field(default=None, ge=2, le=20)
    """Fit the confidence, and what is out of scope, on training rows too, for tasks with few rows: so many more
    adapters are trained, each without one part of the rows, whose answers it gives. 5 take five times the training."""
    min_confidence: float | None = Field(default=None, gt=0, lt=1)
    """Answers with a lower confidence are unsure, and so are those of a kind that has none. Does not count for calls
    with an output constraint, labels or a scale of their own."""
    unsure: Text = MARK
    """What becomes of an unsure answer: mark (it is marked), ask (the question `ask` comes back in its place), base or
    the name of another adapter (that one answers), defer (a bigger model answers, whose address the runtime is given),
    or error."""
    ask: Text | None = None
    """The clarifying question that is returned instead; sets `unsure: ask`."""
    method: MethodSpec = Field(default_factory=lambda: MethodSpec.model_validate("lora"))
    """The tuning method: its name, or a mapping of `name` and options."""
    start_from: Folder | None = None
    """The folder of an adapter that training starts from, saved by PEFT or by another build
    (`OTHER.work/train/NAME/adapter`), with lora, rslora and loraplus. The method must have the options of that
    adapter."""
    scale: float = Field(default=1.0, gt=0, le=100)
    """Scale of the adapter if the caller gives none."""
    merged: bool = False
    """Ship a full model with the adapter merged in, as large as the base, instead of an adapter file."""
    dtype: Literal["auto", "f16", "q8_0", "f32"] = "auto"
    """Number format of the adapter's GGUF file: auto is what llama.cpp multiplies fastest, q8_0 from rank 16 on, and
    for smaller ranks f16 for A and f32 for B. q8_0 applies only to matrices whose rows fit its blocks."""
    onnx_dtype: Literal["f32", "f16"] = "f32"
    """Number format of the adapter's .onnx_adapter file. f16 halves the file, but onnxruntime-genai loads f32 only."""
    training: OwnTraining = TrainingSpec()
    """Training options of this adapter; they override those of the recipe."""

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
        if self.confidence_folds is not None and not self.confidence:
            raise ValueError("confidence_folds needs confidence: true; remove one of them")
        if self.unsure == ASK and self.ask is None:
            raise ValueError("unsure is ask, but there is no question; write it as ask")
        if self.ask is not None and self.unsure not in (MARK, ASK):
            raise ValueError(f"unsure is {self.unsure}, and ask is given too; keep one")
        return self

    @property
    def learns_from_others(self) -> bool:
        """Whether rows are made from the training rows of the recipe's other adapters."""
        augment = self.data.augment
        return self.out_of_scope is not None or (augment is not None and augment.negatives is not None)

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
        if self.confidence_folds is not None:
            message = "confidence_folds does not work with start_from, an adapter that may know all rows"
            raise ValueError(f"{message}; remove one of them")
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


class QuantizationSpec(RecipePart):
    """The build measures quantizations of the base on your rows and chooses one; `auto` has all defaults.

    It measures how far each is from the base before quantization: the mean KL divergence of the next token, on
    validation rows. `edgetune plan` shows which it will measure; the bundle's recipe has the one that was chosen.
    """

    budget_mb: float | None = Field(default=None, gt=0)
    """Most bytes of the base in the bundle, in 10^6: of its GGUF file, or without `gguf` in `targets`, of the first
    format. Adapters and other formats do not count. null: no limit but that of `device`. ONNX alone has one size in
    fp32 and one in int4 (`onnx.weights`), so there it is refused."""
    optimize: Literal["score", "size", "speed"] = "score"
    """score: the lowest KL within the budget. size: the smallest with a KL of at most 0.2. speed: among these, the one
    that decodes fastest on this machine."""


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

"""The parts of a recipe below its top: data, method, training, adapters, the domain and the ONNX weights.

What a key means is written once, under its field: the JSON schema and docs/recipe.md are made from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from edgetune_export import backends
from edgetune_runtime.wording import suggestion
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgetune import methods
from edgetune.methods.lora import LoraOptions

from .problems import other_names, shown

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]*")
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def _check_name(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"the name {name!r} must be of a-z, 0-9, _ and -, and begin with a letter or a digit")
    return name


Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN.pattern}$"})]
Text = Annotated[str, StringConstraints(min_length=1)]


def _check_target(name: str) -> str:
    if name not in backends.names():
        raise ValueError(f"no format {name!r}; {suggestion(name, backends.names())}")
    return name


Target = Annotated[
    str,
    AfterValidator(_check_target),
    Field(json_schema_extra=lambda schema: schema.update(enum=list(backends.names()))),
]
"""A format that there is a backend for."""
Metric = Literal["auto", "exact", "json", "label", "rouge_l", "chrf", "perplexity"]


class RecipePart(BaseModel):
    """Base of the recipe's parts: frozen, unknown keys refused, a field's meaning is the text under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TrainingSpec(RecipePart):
    """How adapters are trained. At the top of a recipe it holds for all adapters; under an adapter, for that one."""

    epochs: PositiveFloat = 3.0
    """Passes over the training rows; a fraction is allowed."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps, whatever `epochs` says."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate, reached after the warmup."""
    batch_size: PositiveInt = 16
    """Rows a step."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are cut to this norm."""
    seed: int = Field(default=0, ge=0)
    """Seed of the held-out split, the order of the rows and the adapter's first weights."""
    evals: PositiveInt = 8
    """Validation passes in a run; there is at least one an epoch."""
    patience: PositiveInt | None = 3
    """Stop after so many validation passes without a better loss; null trains to the end."""
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    """Number format of the base's weights in training; auto takes bf16 where the hardware multiplies it fast, else
    fp32. int8 is 1.2 to 1.6 times as fast as fp32 on x86 CPUs without bf16 arithmetic, for a higher loss: it
    rounds in the products with frozen weights, and takes 6 bytes per weight instead of 4. Validation stays in fp32."""
    memory_mb: PositiveInt | None = Field(default=None, exclude=True)
    """Most memory that a training's process may take, in MB (of a GPU, where there is one); null takes what is free.
    Forward passes are made as small as it needs, with activation checkpointing where a row alone does not fit; the
    result is the same."""

    def under(self, own: TrainingSpec) -> TrainingSpec:
        """These options with those that `own` sets put over them."""
        return self.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


OwnTraining = Annotated[TrainingSpec, PlainSerializer(lambda own: own.model_dump(mode="json", exclude_unset=True))]
"""Training options over those of the recipe: what is not set stays unset."""


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a hub id: owner/name, without a suffix such as .jsonl, which means a file."""
    match = HUB_ID.fullmatch(source)
    return match is not None and not SUFFIX.search(match["id"])


def _beside_the_recipe(value: str, info: ValidationInfo) -> str:
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    return value if is_hub_id(value) and not path.exists() else str(path)


Data = Annotated[Text, AfterValidator(_beside_the_recipe)]
"""A data file or a hub id."""


class Columns(RecipePart):
    """Which columns of the data are the prompt and the completion, when they are named otherwise."""

    prompt: Text
    """Column of the prompt."""
    completion: Text | tuple[Text, ...]
    """Column of the completion, or a list of columns, which are put together in one JSON object."""

    @field_validator("completion")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("the list is empty; name at least one column")
        return value


class DataSpec(RecipePart):
    """The rows of one task: JSONL, CSV or TSV files, beside the recipe, or a hub id.

    A row holds `messages`, which end with the assistant's; or `prompt` and `completion`; or `text` and `label`; or
    `text` alone, which is learned whole. A completion that is an object or a list is learned as JSON. A hub id is
    `owner/name`, `owner/name:config` or `owner/name:config@split`; the split is `train` unless given.
    """

    train: Data
    """Training rows: a file, relative to the recipe, or a hub id such as owner/name:config@split."""
    validation: Data | None = None
    """Validation rows, like `train`; without them some training rows are held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows held out for validation when `validation` is not given."""
    columns: Columns | None = None
    """Which columns are the prompt and the completion; not needed for rows of messages, prompt and completion, text
    and label, or text."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completions only, or the whole text."""


class MethodSpec(RecipePart):
    """A method's name and its options; written as the name alone, or as a mapping of `name` and the options."""

    name: str = "lora"
    """The method."""
    options: SerializeAsAny[methods.MethodOptions]
    """The options of that method, complete with its defaults."""

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, cls):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict):
            raise ValueError(f"{shown(value)} is not a method; write its name, or a mapping of name and options")
        name = given.get("name", cls.model_fields["name"].default)
        if name not in methods.names():
            raise ValueError(f"no method {name!r}; {suggestion(str(name), methods.names())}")
        options = {key: option for key, option in given.items() if key != "name"}
        return {"name": name, "options": methods.load(name).options.model_validate(options, context=info.context)}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"name": self.name, **self.options.model_dump(mode="json")}

    @property
    def is_auto(self) -> bool:
        """Whether the modules to adapt are still to be chosen."""
        return isinstance(self.options, LoraOptions) and self.options.is_auto

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: object, _handler: object) -> dict[str, Any]:
        return {"title": "Method", "description": cls.__doc__, "oneOf": [{"enum": methods.names()}, *_method_schemas()]}


class AdapterSpec(RecipePart):
    """One task: its data, and how its adapter is trained, exported and scored."""

    data: DataSpec
    """The task's rows."""
    system: Text | None = None
    """System prompt, put before each conversation that brings none, in training and on the device."""
    labels: tuple[Text, ...] | None = None
    """The answers to choose from; taken from the training rows when the metric is label and none are given."""
    metric: Metric = "auto"
    """How answers are scored; auto looks at the rows."""
    method: MethodSpec = Field(default_factory=lambda: MethodSpec.model_validate("lora"))
    """The tuning method: a name, or a mapping of name and options."""
    scale: float = 1.0
    """Factor on the adapter when the caller names none."""
    merged: bool = False
    """Ship a whole model with the adapter merged in, as large as the base, instead of an adapter file."""
    dtype: Literal["f16", "q8_0", "f32"] = "f16"
    """Number format of the adapter's GGUF file; q8_0 where the rows allow it."""
    onnx_dtype: Literal["f32", "f16"] = "f32"
    """Number format of the adapter's .onnx_adapter file; f16 halves it, but onnxruntime-genai loads f32 alone."""
    training: OwnTraining = TrainingSpec()
    """Training options of this adapter alone, over those of the recipe."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(labels) < 2:
            raise ValueError("needs at least 2 labels; leave it out to take them from the training rows")
        twice = sorted({label for label in labels or () if (labels or ()).count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} is there twice; keep one")
        return labels

    @model_validator(mode="after")
    def _auto_stays_apart(self) -> AdapterSpec:
        if self.merged and self.method.is_auto:
            raise ValueError("a merged adapter slows nothing down; name target_modules instead of auto")
        return self

    def dtype_in(self, target: str) -> str:
        """Number format of the adapter's file in a format."""
        found: str = getattr(self, backends.format_of(target).dtype_key)
        return found

    def unfit_for_encoder(self) -> list[str]:
        """What an adapter of an encoder cannot be, with the way out."""
        problems = []
        if self.merged:
            problems.append("a merged encoder is not made; leave merged out")
        if self.system is not None:
            problems.append("an encoder takes no system prompt; leave system out")
        if self.metric not in ("auto", "label"):
            problems.append(f"an encoder's metric is label, not {self.metric}")
        if self.method.is_auto:
            problems.append("target_modules: auto is for bases that write text; name the modules of an encoder")
        return problems


class TextSpec(RecipePart):
    """Plain text: a .txt file, which is one text, or JSONL, CSV or TSV rows of `text` or a hub id, of which each row is
    one."""

    train: Data
    """The text to learn: a file, relative to the recipe, or a hub id."""
    validation: Data | None = None
    """Text for validation, like `train`; without it the last part of the training text is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training text, its end, held out when `validation` is not given."""


class DomainSpec(RecipePart):
    """Text that the base is continued on before the adapters are trained (docs/domain.md).

    The result, at the base's own quantization, is the base of everything after.
    """

    data: TextSpec
    """The text of the domain."""
    method: MethodSpec = Field(default_factory=lambda: MethodSpec.model_validate("full"))
    """How the base is tuned: a method that can be merged, such as full (the default), last_layers or lora."""
    window: int | None = Field(default=None, ge=16)
    """Tokens that a longer text is cut into; null takes `context_length`."""
    training: OwnTraining = TrainingSpec()
    """Training options of this stage alone, over those of the recipe; a row is a window."""

    @field_validator("method")
    @classmethod
    def _can_be_merged(cls, method: MethodSpec) -> MethodSpec:
        shapes = methods.load(method.name).shapes(method.options)
        if "merged" not in shapes:
            what = f"what {method.name} trains ({', '.join(shapes)}) cannot be merged into the base"
            raise ValueError(f"{what}; take full, last_layers or lora")
        if method.is_auto:
            raise ValueError("what is merged slows nothing down; name target_modules instead of auto")
        return method


class OnnxSpec(RecipePart):
    """How an ONNX graph holds the base's weights, which are those of the GGUF base."""

    weights: Literal["auto", "fp32", "int8", "int4"] = "auto"
    """auto keeps q4_0 and q8_0 blocks as they are, requantizes other types to 8 bits and keeps floats; int8 rounds
    floats too; fp32 dequantizes all; int4 requantizes all to 4 bits by `method`."""
    method: Literal["rtn", "k_quant", "gptq"] = "rtn"
    """How int4 rounds: to nearest, or by one of ONNX Runtime's other methods; gptq takes rows of the tasks."""


def _method_schemas() -> list[dict[str, Any]]:
    """The schema of each method's mapping form, with the options' other names."""
    schemas = []
    for name in methods.names():
        options = methods.load(name).options
        schema = options.model_json_schema(by_alias=False)
        properties = {"name": {"const": name, "description": "The method."}, **schema["properties"]}
        for key in options.model_fields:
            properties |= dict.fromkeys(other_names(key, options), properties[key])
        required = [] if name == MethodSpec.model_fields["name"].default else ["name"]
        schemas.append({**schema, "properties": properties, "required": [*required, *schema.get("required", [])]})
    return schemas

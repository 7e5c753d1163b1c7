"""The architectures that can be trained, with formats and methods, and published weights of them with their sizes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_devices.needs import row_type
from edgetune_export import architectures, backends
from edgetune_export.architectures.base import OUTPUT_LAYER, Architecture
from edgetune_runtime.bundle import CLASSIFICATION, GENERATION
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import QUANTIZATIONS

from edgetune import methods
from edgetune.methods.common.peft import TargetOptions, check_targets
from edgetune.recipe.targets import misfit, supported_shapes

WEIGHTS = Path(__file__).with_name("weights.toml")
SIZES_IN = ("q4_0", "q8_0")
"""The quantizations for which sizes are listed."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights on the hub. Their architecture has a file of this name; `tried` are formats, `figures` places in docs/.

    `parameters_m` is in millions. The output layer has `width` columns and `vocabulary` rows; of the other parameters,
    `per_layer_m` are an embedding for the inputs of each layer, which llama.cpp stores like the output layer.
    """

    hub_id: str
    architecture: str
    license: str
    parameters_m: float
    width: int
    vocabulary: int
    per_layer_m: float = 0.0
    alias: str | None = None
    gated: bool = False
    tried: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()

    def mb_in(self, quantization: str) -> float:
        """Approximate size of the GGUF file in MB, 10^6 bytes, without the tokenizer."""
        kind, head = QUANTIZATIONS[quantization], self.width * self.vocabulary + self.per_layer_m * 1e6
        body = self.parameters_m * 1e6 - head
        sizes = (row_type(name, self.width).bytes_per_value for name in (kind.most, kind.head))
        return sum(values * size for values, size in zip((body, head), sizes, strict=True)) / 1e6

    def to_json(self) -> dict[str, Any]:
        """All facts as JSON values, with the sizes."""
        return {**asdict(self), "mb": {name: round(self.mb_in(name)) for name in SIZES_IN}}


@dataclass(frozen=True)
class ArchitectureFacts:
    """An architecture, and the methods that each format that supports it can hold.

    `without_defaults` are methods that need a list of target modules, because it lacks those of the method's default.
    """

    title: str
    methods: Mapping[str, tuple[str, ...]]
    without_defaults: tuple[str, ...] = ()

    def held_in(self, target: str) -> str:
        """The methods that a format can hold, in words."""
        if target not in self.methods:
            return "-"
        held = self.methods[target]
        others = [name for name in methods.names() if name not in held]
        words = "all" if not others else f"all but {', '.join(others)}"
        if len(others) > len(held):
            words = f"only {', '.join(held)}"
        listed = [name for name in self.without_defaults if name in held]
        return f"{words}; {', '.join(listed)} with listed target_modules" if listed else words


def published() -> list[PublishedWeights]:
    """The weights in weights.toml."""
    table = tomllib.loads(WEIGHTS.read_text(encoding="utf-8"))
    lists = ("tried", "figures")
    return [
        PublishedWeights(hub_id, **{**values, **{key: tuple(values.get(key, ())) for key in lists}})
        for hub_id, values in table.items()
    ]


def decoders() -> dict[str, ArchitectureFacts]:
    """The architectures of bases that generate text, by their names."""
    return {name: _facts(name, architecture) for name, architecture in architectures.known().items()}


def encoders() -> ArchitectureFacts:
    """The architectures of bases that classify."""
    formats = backends.of_task(CLASSIFICATION)
    held = tuple(name for name in methods.names() if methods.load(name).takes_encoders)
    return ArchitectureFacts("encoders", dict.fromkeys(formats, held))


def _facts(name: str, architecture: Architecture) -> ArchitectureFacts:
    formats = tuple(target for target in backends.of_task(GENERATION) if target not in architecture.refusals)
    shapes = {method: supported_shapes(formats, method) for method in methods.names()}
    shapes = {method: kinds for method, kinds in shapes.items() if not misfit(method, kinds, architecture)}
    held = {target: tuple(method for method in shapes if target in shapes[method]) for target in formats}
    without = tuple(method for method in shapes if not _has_modules(architecture, method))
    return ArchitectureFacts(architectures.title_of(name), held, without)


def _has_modules(architecture: Architecture, method: str) -> bool:
    """Whether the architecture has the modules that the method tunes by default."""
    options = methods.load(method).options()
    if isinstance(options, TargetOptions):
        names = [module.name for module in architecture.linear_modules]
        try:
            check_targets([*names, OUTPUT_LAYER], options.target_modules)
        except UsageError:
            return False
    return True

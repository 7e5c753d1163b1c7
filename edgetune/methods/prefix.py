"""Prefix tuning, through PEFT: Li and Liang 2021, arXiv:2101.00190."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .common.base import TrainedModules, dense_parameters, rate_factor
from .common.prompt import CacheMethod, InitializedOptions

if TYPE_CHECKING:
    from peft import PeftModel


class PrefixOptions(InitializedOptions):
    """Options of prefix tuning, named as in PEFT."""

    prefix_projection: bool = Field(
        False, description="Train a small network that generates the keys and values; only its output is shipped."
    )
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="Hidden size of that network. null: the size of a layer's keys."
    )
    init_weights: Literal["states", "random", "zero"] = Field(
        "states",
        description="Initialization of the keys and values. states: those that the base computes for a text; random,"
        " zero: as in PEFT. With prefix_projection, states means random.",
    )
    learning_rate_factor: float = rate_factor(10.0, "; 1 with prefix_projection")

    @model_validator(mode="before")
    @classmethod
    def _slow_projection(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("prefix_projection") is True:
            return {"learning_rate_factor": 1.0, **values}
        return values


class Prefix(CacheMethod[PrefixOptions]):
    """Trained keys and values before those of every layer: use it for a small file that slows no layer down."""

    options = PrefixOptions
    peft_type = "PREFIX_TUNING"

    def trained_parameters(self, trained: TrainedModules, options: PrefixOptions) -> int:
        """The keys and values, or an embedding per virtual token and the network that generates them."""
        if not options.prefix_projection:
            return super().trained_parameters(trained, options)
        size = options.encoder_hidden_size or trained.base.keys
        network = dense_parameters(trained.base.keys, size) + dense_parameters(size, trained.base.kv_values_per_token)
        return options.num_virtual_tokens * trained.base.keys + network

    def peft_settings(self, options: PrefixOptions) -> Mapping[str, Any]:
        """PEFT's own initialization; `initialize` sets states."""
        return {"init_weights": "zero" if options.init_weights == "zero" else None}

    def initialize(self, peft: PeftModel, options: PrefixOptions) -> None:
        """Initialize from the base's KV cache of tokens; with random values, training takes far longer."""
        if options.init_weights == "states" and not options.prefix_projection:
            self.initialize_from(peft, options.init_tokens, options.num_virtual_tokens)


METHOD = Prefix()

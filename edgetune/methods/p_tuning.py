"""P-tuning, through PEFT: Liu et al. 2021, arXiv:2103.10385."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .common.base import TrainedModules, dense_parameters
from .common.prompt import PromptOptions, TokenMethod


class PTuningOptions(PromptOptions):
    """Options of P-tuning, named as in PEFT."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="The network that generates the virtual tokens in training; only its output is shipped."
    )
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="Hidden size of that network. null: the base's hidden size."
    )
    encoder_num_layers: PositiveInt = Field(2, description="Number of LSTM layers.")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate between LSTM layers.")


class PTuning(TokenMethod[PTuningOptions]):
    """Prompt tuning with a small network that generates the tokens: use it when prompt tuning does not converge."""

    options = PTuningOptions
    peft_type = "P_TUNING"

    def trained_parameters(self, trained: TrainedModules, options: PTuningOptions) -> int:
        """The embeddings, and the network that changes them."""
        width, size = trained.base.hidden, options.encoder_hidden_size or trained.base.hidden
        embeddings = super().trained_parameters(trained, options)
        if options.encoder_reparameterization_type == "MLP":
            layers = ((width, size), (size, size), (size, width))
            return embeddings + sum(dense_parameters(*layer) for layer in layers)
        # Of an LSTM, each of two directions has four gates, which read the layer's inputs and its state.
        inputs = (width, *[2 * size] * (options.encoder_num_layers - 1))
        lstm = sum(2 * 4 * (dense_parameters(count, size) + dense_parameters(size, size)) for count in inputs)
        return embeddings + lstm + dense_parameters(2 * size, 2 * size) + dense_parameters(2 * size, width)


METHOD = PTuning()

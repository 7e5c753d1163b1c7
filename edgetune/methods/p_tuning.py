"""P-tuning, through PEFT: Liu et al. 2021, arXiv:2103.10385."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from .common.prompt import PromptOptions, TokenMethod

if TYPE_CHECKING:
    from peft import PromptEncoderConfig
    from transformers import PreTrainedModel


class PTuningOptions(PromptOptions):
    """Options of P-tuning, by PEFT's names."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="The network that makes the soft tokens in training; only these are kept."
    )
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="Width of that network; null takes the base's own width."
    )
    encoder_num_layers: PositiveInt = Field(2, description="Layers of an LSTM.")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between an LSTM's layers.")


class PTuning(TokenMethod[PTuningOptions]):
    """Soft tokens that a small network makes in training; take it where prompt tuning does not settle."""

    options = PTuningOptions
    peft_type = "P_TUNING"

    def config(self, base: PreTrainedModel, options: PTuningOptions) -> PromptEncoderConfig:
        """PEFT's configuration."""
        from peft import PromptEncoderConfig  # noqa: PLC0415 - torch only when training

        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.num_virtual_tokens,
            encoder_reparameterization_type=options.encoder_reparameterization_type,
            encoder_hidden_size=options.encoder_hidden_size,
            encoder_num_layers=options.encoder_num_layers,
            encoder_dropout=options.encoder_dropout,
        )


METHOD = PTuning()

"""The `quantization` key of a recipe as a mapping: what the build looks for among quantizations that it measures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .part import RecipePart

AUTO = "auto"
"""Stands for all defaults."""


class QuantizationSpec(RecipePart):
    """The build measures quantizations of the base on your rows and chooses one; `auto` has all defaults.

    It measures how far each is from the base before quantization: the mean KL divergence of the next token, on
    validation rows. `edgetune plan` shows which it will measure; the bundle's recipe has the one that was chosen.
    """

    budget_mb: float | None = Field(default=None, gt=0)
    """Most bytes of the base in the bundle, in 10^6: of its GGUF file, or without `gguf` in `targets`, of the first
    format. Adapters and other formats do not count. null: no limit but that of `device`."""
    optimize: Literal["score", "size", "speed"] = "score"
    """score: the lowest KL within the budget. size: the smallest with a KL of at most 0.2. speed: among these, the one
    that decodes fastest on this machine."""

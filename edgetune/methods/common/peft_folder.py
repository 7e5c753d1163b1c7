"""Checks a PEFT folder, which may come from elsewhere, before PEFT reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.fold import CONFIG_NAME, SAVE_CONVERTED, changes_base, find_weights, read_config
from edgetune_export.adapters.patterns import matching, of_key
from edgetune_runtime.errors import IncompatibleError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAVE_AGAIN = "save or copy the adapter again"
# PEFT imports a module that the first names; the others change the base, or name files and models to load.
_REFUSED = (
    "megatron_config",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "arrow_config",
)


def check_peft_folder(folder: Path, base: PreTrainedModel) -> None:
    """Raise what `read_config` and `find_weights` raise.

    Also IncompatibleError for options that make PEFT load something else or change the base, or that no method here
    has, and for regular expressions that do not end on the names of the base; VerificationError for an invalid regular
    expression.
    """
    config = read_config(folder)
    find_weights(folder)
    for key in _REFUSED:
        if config.get(key):
            message = f"{folder / CONFIG_NAME} has {key}, which is not supported"
            raise IncompatibleError(message, f"train without {key}")
    if changes_base(config):
        message = f"{folder / CONFIG_NAME} has init_lora_weights: {config['init_lora_weights']}, which changes the base"
        raise IncompatibleError(message, SAVE_CONVERTED)
    names = [name for name, _ in (*base.named_modules(), *base.named_parameters())]
    for expressions, whole in ((_whole(config), True), (_beginnings(config), False)):
        matches = matching(expressions, names, str(folder / CONFIG_NAME), whole=whole)
        for expression, matched in zip(expressions, matches, strict=True):
            if matched is None:
                message = f"{folder / CONFIG_NAME}: {expression[:80]!r} is not a regular expression"
                raise VerificationError(message, _SAVE_AGAIN)


def _whole(config: Mapping[str, Any]) -> list[str]:
    """What PEFT compares whole names of modules with."""
    keys = ("target_modules", "exclude_modules", "feedforward_modules")
    return [config[key] for key in keys if isinstance(config.get(key), str)]


def _beginnings(config: Mapping[str, Any]) -> list[str]:
    """What PEFT compares the beginnings of names with (check_target_module_exists in peft/tuners/tuners_utils.py)."""
    keys = [key for name in ("rank_pattern", "alpha_pattern") for key in _listed(config.get(name))]
    layers = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in _listed(config.get("layers_pattern"))]
    return [*map(of_key, keys), *layers]


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(map(str, value)) if isinstance(value, list | dict) else []

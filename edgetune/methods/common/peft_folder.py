"""Loads a PEFT folder, which may come from elsewhere, and checks it before PEFT changes the base or uses memory."""

from __future__ import annotations

from collections.abc import Container, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.fold import (
    CONFIG_NAME,
    MERGE,
    SAVE_AGAIN,
    WEIGHTS_NAME,
    find_weights,
    peft_tensors,
    read_config,
    unsupported_options,
)
from edgetune_export.adapters.patterns import matching, of_key
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import first_line, first_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_PROMPT = "prompt_embeddings"
"""The tensor of virtual tokens, which PEFT loads but reports as unexpected."""


def load_peft_folder(folder: Path, base: PreTrainedModel) -> PeftModel:
    """PEFT's model of the folder on the base.

    Raises what `check_peft_folder` and `peft_tensors` raise. IncompatibleError for tensors that would change the base's
    own values, that PEFT would not load, that PEFT lacks, or that do not fit the base; the base is unchanged then.
    """
    import torch

    check_peft_folder(folder, base)
    tensors = {name: torch.from_numpy(values) for name, values in peft_tensors(folder).items()}
    try:
        # The same without memory first: the sizes in adapter_config.json may be any.
        copy = _without_memory(base)
        base_values = {id(values) for values in chain(copy.parameters(), copy.buffers())}
        with torch.device("meta"):
            model = _loaded(folder, copy, {name: values.to("meta") for name, values in tensors.items()})
        _check_changes(model, base_values, tensors, folder / WEIGHTS_NAME)
        return _loaded(folder, base, tensors)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise IncompatibleError(f"PEFT cannot load {folder}: {_reason(error)}", "save the adapter again") from error


def _loaded(folder: Path, base: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> PeftModel:
    """PEFT's model with these values. IncompatibleError if they are not all of the adapter's values and no others."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = _config(folder)
    # As PeftModel.from_pretrained, which does not return what set_peft_model_state_dict finds.
    model: PeftModel = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(base, config)
    result: Any = set_peft_model_state_dict(model, tensors)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    problems = [f"it lacks {key[:200]}" for key in result.missing_keys if prefix and prefix in key]
    known = {_PROMPT} if config.is_prompt_learning else set()
    problems += [f"{key[:200]} is unknown" for key in result.unexpected_keys if key not in known]
    if problems:
        message = f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME} and the base: {first_of(problems)}"
        raise IncompatibleError(message, f"use the base that the adapter was trained on, or {SAVE_AGAIN}")
    return model


def _config(folder: Path) -> Any:  # noqa: ANN401 - PEFT carries no types
    """PEFT's configuration of the folder, for inference."""
    import torch
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    if config.peft_type == "ADALORA":
        # The ranks that are kept, as masks: PEFT makes them of lists too, but on the meta device they have no values.
        ranks = (config.rank_pattern or {}).items()
        config.rank_pattern = {name: torch.tensor(kept, dtype=torch.bool, device="cpu") for name, kept in ranks}
    return config


def _check_changes(model: PeftModel, base_values: Container[int], names: Container[str], path: Path) -> None:
    """IncompatibleError if tensors of these names are of `base_values`, or if a layer is not linear."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    values = model.state_dict(keep_vars=True)
    if changed := [name for name, tensor in values.items() if name in names and id(tensor) in base_values]:
        message = f"{path} has trained values of the base: {first_of(changed)}"
        raise IncompatibleError(message, f"train without biases, embeddings and modules_to_save, or {MERGE}")
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer.get_base_layer(), torch.nn.Linear):
            message = f"{path} changes {name.removeprefix('base_model.model.')}, which is not a linear layer"
            raise IncompatibleError(message, f"train only linear layers, or {MERGE}")


def _without_memory(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the base whose values are on the meta device."""
    import torch

    buffers = {id(values): values.to("meta") for values in base.buffers()}
    parameters = {
        id(values): torch.nn.Parameter(values.to("meta"), requires_grad=False) for values in base.parameters()
    }
    return deepcopy(base, {**buffers, **parameters})


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's heading."""
    first, *others = str(error).splitlines() or [""]
    return others[0].strip() if others and first.startswith("Error(s) in loading") else first_line(error)


def check_peft_folder(folder: Path, base: PreTrainedModel) -> None:
    """Raise what `read_config` and `find_weights` raise.

    Also IncompatibleError for options that make PEFT load something else or change the base, or that no method here
    has, and for regular expressions that do not end on the names of the base; VerificationError for an invalid regular
    expression.
    """
    config = read_config(folder)
    find_weights(folder)
    for option, remedy in unsupported_options(config).items():
        message = f"{folder / CONFIG_NAME} has {option}, which is not supported"
        raise IncompatibleError(message, f"{remedy}, or {MERGE}")
    names = [name for name, _ in (*base.named_modules(), *base.named_parameters())]
    for expressions, whole in ((_whole(config), True), (_beginnings(config), False)):
        matches = matching(expressions, names, str(folder / CONFIG_NAME), whole=whole)
        for expression, matched in zip(expressions, matches, strict=True):
            if matched is None:
                message = f"{folder / CONFIG_NAME}: {expression[:80]!r} is not a regular expression"
                raise VerificationError(message, SAVE_AGAIN)


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

"""Folds a PEFT LoRA folder into a LowRank adapter with PEFT's scaling in B, without loading the base.

PEFT computes W + s·B·A with the scaling s = alpha / r, or alpha / sqrt(r) for rsLoRA; r and alpha may differ per
module. Here s is multiplied into B, so that later steps need not know it; a recipe's `scale` is another factor, applied
at run time. The folder is not trusted: options that a GGUF LoRA does not support and inconsistent files are refused
with the option or module at fault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, VerificationError, parsing
from edgetune_runtime.formats.regular_file import read_up_to
from edgetune_runtime.wording import first_line, first_of
from safetensors import SafetensorError, deserialize, safe_open

from .patterns import matching, of_key
from .shapes import Delta, Floats, LowRank, Merged

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

MERGE = "merge it with PEFT's merge_and_unload(), save the full model and use that folder as the base"
"""What helps for any adapter that is not supported."""
SAVE_AGAIN = "save or copy the adapter again"

_SAVE_CONVERTED = "save it again with save_pretrained(path_initial_model_for_weight_conversion=…)"
_LONGEST_CONFIG = 1 << 20
# Options that no method here has, with the remedy for each. Some train more than linear layers, or change the base.
_REFUSED_OPTIONS = {
    "lora_bias": "train with lora_bias: false",
    "modules_to_save": "train without modules_to_save",
    "trainable_token_indices": "train without new tokens",
    "layer_replication": "train on the base's own layers",
    "fan_in_fan_out": "train with fan_in_fan_out: false",
    "target_parameters": "use target_modules instead",
    "use_qalora": "train with use_qalora: false",
    "use_bdlora": "train without use_bdlora",
    "kasa_config": "train without kasa_config",
    "arrow_config": "train without arrow_config",
    "monteclora_config": "train without monteclora_config",
    "megatron_config": "train without megatron_config",
}
# These initializations also change the base's weights, so their B·A is meaningless on the original base.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PEFT_PREFIX = "base_model.model."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_LANGUAGE_LAYER = re.compile(r"(?:model\.language_model\.|language_model\.model\.|model\.)?(?P<rest>layers\.\d+\..+)")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class _Scaling:
    """The part of adapter_config.json that sets rank and scaling; `ranks` and `alphas` are those of single modules."""

    r: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scaling that PEFT uses for a module, by its name in the trained model."""
        rank, alpha = self.ranks.get(module, self.r), self.alphas.get(module, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rslora else alpha / rank


def fold_peft(folder: Path, name: str, method: str = "lora") -> LowRank:
    """Read the PEFT LoRA or activated LoRA adapter in `folder` and fold its scaling into B.

    Raises NotFoundError if a file is missing, VerificationError if files are damaged or contradict each other, and
    IncompatibleError, with a remedy, for options that a GGUF LoRA does not support.
    """
    config = read_config(folder)
    _refuse_unsupported(config, name)
    invocation = _read_invocation(config, folder / CONFIG_NAME)
    pairs = _pair(_read_tensors(folder), name)
    config_scaling = _read_scaling(config, folder / CONFIG_NAME, list(pairs))
    modules: dict[str, Delta] = {}
    problems: list[str] = []
    for module, (a, b) in pairs.items():
        rank, scaling = config_scaling.of(module)
        problem = _mismatch(module, a, b, rank)
        if problem:
            problems.append(problem)
        else:
            modules[_canonical(module)] = Delta(a, (b * np.float64(scaling)).astype(np.float32))
    _raise_all(VerificationError, f"adapter {name!r} is damaged", problems, SAVE_AGAIN)
    if len(modules) != len(pairs):
        raise VerificationError(f"adapter {name!r} has two LoRAs for the same module", SAVE_AGAIN)
    return LowRank(name, method, dict(sorted(modules.items())), invocation)


def merge(adapter: LowRank, weight_of: Callable[[str], Floats], scale: float = 1.0) -> Merged:
    """Merge `scale` times the adapter into the base; `weight_of` returns the weights of a module.

    IncompatibleError if the adapter has invocation tokens: a merged model would also apply it before them.
    """
    if adapter.invocation:
        message = f"adapter {adapter.name!r} acts only after its invocation tokens and cannot be merged"
        raise IncompatibleError(message, "remove merged, or train it with lora")

    def merged(module: str, delta: Delta) -> Floats:
        weight, change = weight_of(module), delta.b @ delta.a
        if weight.shape != change.shape:
            sizes = "{}x{} in the adapter, {}x{} in the base".format(*change.shape, *weight.shape)
            message = f"adapter {adapter.name!r} does not fit this base: {module} is {sizes}"
            raise IncompatibleError(message, "use the base that the adapter was trained on")
        return weight + np.float32(scale) * change

    parameters = {f"{module}.weight": partial(merged, module, delta) for module, delta in adapter.modules.items()}
    return Merged(adapter.name, adapter.method, parameters)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The contents of adapter_config.json; NotFoundError if there is none, VerificationError if it is damaged."""
    path = folder / CONFIG_NAME
    try:
        with parsing(f"{path} is not JSON", SAVE_AGAIN):
            text = read_up_to(path, _LONGEST_CONFIG)
            if text is None:
                raise VerificationError(f"{path} has more than {_LONGEST_CONFIG} bytes", SAVE_AGAIN)
            config = json.loads(text.decode())
    except NotFoundError as error:
        remedy = "use a folder written by PEFT's save_pretrained"
        raise NotFoundError(f"{folder} is not a PEFT adapter: it has no {CONFIG_NAME}", remedy) from error
    if not isinstance(config, dict):
        raise VerificationError(f"{path} is not a JSON object", SAVE_AGAIN)
    return config


def unsupported_options(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of adapter_config.json that no method here has, each with its remedy."""
    found = {key: remedy for key, remedy in _REFUSED_OPTIONS.items() if config.get(key)}
    if config.get("bias", "none") != "none":
        found[f"bias: {str(config['bias'])[:80]}"] = "train with bias: none"
    initialization = config.get("init_lora_weights")
    # PEFT repeats the change of the base when it loads the adapter.
    if isinstance(initialization, str) and initialization.lower().startswith(_BASE_CHANGING):
        found[f"init_lora_weights: {initialization[:80]}"] = _SAVE_CONVERTED
    return found


def _refuse_unsupported(config: Mapping[str, Any], name: str) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        message = f"adapter {name!r} has peft_type {peft_type!r}, which a GGUF LoRA does not support"
        raise IncompatibleError(message, f"train it with lora, or {MERGE}")
    refused = {"use_dora": "train with use_dora: false"} if config.get("use_dora") else {}
    problems = [f"{option} ({remedy})" for option, remedy in {**refused, **unsupported_options(config)}.items()]
    summary = f"adapter {name!r} has options that a GGUF LoRA does not support"
    _raise_all(IncompatibleError, summary, problems, f"or {MERGE}")


def _read_scaling(config: Mapping[str, Any], path: Path, modules: Sequence[str]) -> _Scaling:
    problems: list[str] = []

    def number(key: str, value: object, kind: type[int] | type[float]) -> None:
        # An int also counts as a float, as in JSON; the bound rejects NaN, infinity and integers too large for a float.
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < 1e9
        if not fits or (kind is int and cast(int, value) < 1):
            problems.append(f"{key} is {value!r}")

    number("r", config.get("r"), int)
    number("lora_alpha", config.get("lora_alpha"), float)
    values: dict[str, dict[str, Any]] = {}
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key} is not a mapping")
            pattern = {}
        for expression, value in pattern.items():
            number(f"{key}.{expression}", value, kind)
        matches = matching([of_key(expression) for expression in pattern], modules, f"{key} in {path}")
        wrong = (expression for expression, names in zip(pattern, matches, strict=True) if names is None)
        problems += [f"{key}.{expression} is not a regular expression" for expression in wrong]
        # Like PEFT's get_pattern_key: the first match wins.
        by_module = zip(reversed(pattern.values()), reversed(matches), strict=True)
        values[key] = {name: value for value, names in by_module for name in names or ()}
    _raise_all(VerificationError, f"{path} is damaged", problems, SAVE_AGAIN)
    rslora = bool(config.get("use_rslora"))
    return _Scaling(config["r"], config["lora_alpha"], rslora, values["rank_pattern"], values["alpha_pattern"])


def _read_invocation(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    tokens = config.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise VerificationError(f"{path} is damaged: alora_invocation_tokens is {repr(tokens)[:80]}", SAVE_AGAIN)
    return tuple(tokens)


def find_weights(folder: Path) -> Path:
    """The file of the adapter's weights. NotFoundError if there is none, IncompatibleError if it is a pickle,
    VerificationError if it is damaged."""
    path = folder / WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, "np"):
                return path
        except SafetensorError as error:
            raise VerificationError(f"{path} is not a safetensors file: {first_line(error)}", SAVE_AGAIN) from error
    if (folder / "adapter_model.bin").exists():
        message = f"{folder} has adapter_model.bin, a pickle, which can run code when it is loaded"
        raise IncompatibleError(message, "save it as safetensors: save_pretrained(…, safe_serialization=True)")
    raise NotFoundError(f"{folder} has no {WEIGHTS_NAME}", SAVE_AGAIN)


def peft_tensors(folder: Path) -> dict[str, Floats]:
    """The trained tensors of any PEFT method, with the names that PEFT gives them on a text-only causal model.

    Raises what `find_weights` raises, IncompatibleError for types other than floats, and VerificationError for two
    tensors with the same name.
    """
    tensors: dict[str, Floats] = {}
    for key, values in _read_tensors(folder).items():
        name = _peft_name(key)
        if name in tensors:
            raise VerificationError(f"{folder / WEIGHTS_NAME} has two tensors for {name[:200]!r}", SAVE_AGAIN)
        if not _is_frozen_copy(name):
            tensors[name] = values
    return tensors


def _peft_name(key: str) -> str:
    match = _KEY.fullmatch(key)
    bare = _strip_wrappers(f"{match['module']}.lora_{match['side']}.weight" if match else key)
    # The embeddings of virtual tokens, and matrices that all layers share, are not of a module.
    is_shared = "." not in bare or bare.startswith("base_model.")
    return bare if is_shared else f"{_PEFT_PREFIX}{_canonical(bare)}"


def _is_frozen_copy(key: str) -> bool:
    """Whether the tensor is the copy of an adapted layer's own weights that PEFT saves with some adapters."""
    return key.endswith(".base_layer.weight")


def _read_tensors(folder: Path) -> dict[str, Floats]:
    path = find_weights(folder)
    return {key: _decode(key, value, path) for key, value in cast(Any, deserialize)(path.read_bytes())}


def _decode(key: str, value: Mapping[str, Any], path: Path) -> Floats:
    dtype = _DTYPES.get(value["dtype"])
    if dtype is None:
        supported = ", ".join(_DTYPES)
        raise IncompatibleError(f"{path}: {key} has dtype {value['dtype']}", f"save the adapter in one of: {supported}")
    values = np.frombuffer(value["data"], dtype).reshape(value["shape"])
    if value["dtype"] == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _pair(tensors: Mapping[str, Floats], name: str) -> dict[str, tuple[Floats, Floats]]:
    """Group tensors into (A, B) per module, with names as in the trained model."""
    sides: dict[str, dict[str, Floats]] = {}
    foreign: list[str] = []
    adapters: set[str] = set()
    for key, values in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            adapters.add(match["adapter"] or "default")
            sides.setdefault(_strip_wrappers(match["module"]), {})[match["side"]] = values
        elif not _is_frozen_copy(key):
            foreign.append(key)
    remedy = f"train only LoRA on linear layers, or {MERGE}"
    _raise_all(IncompatibleError, f"adapter {name!r} has tensors that a GGUF LoRA does not support", foreign, remedy)
    if len(adapters) > 1:
        message = f"adapter {name!r} contains several adapters: {', '.join(sorted(adapters))}"
        raise IncompatibleError(message, "save each adapter in a separate folder")
    if not sides:
        raise VerificationError(f"adapter {name!r} has no LoRA weights", SAVE_AGAIN)
    unpaired = [f"{module} has only lora_A or lora_B" for module, pair in sides.items() if len(pair) != 2]
    _raise_all(VerificationError, f"adapter {name!r} is damaged", unpaired, SAVE_AGAIN)
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _strip_wrappers(module: str) -> str:
    bare = ".".join(part for part in module.split(".") if part not in _WRAPPERS)
    return bare.removeprefix("module.").removeprefix(_PEFT_PREFIX)


def _canonical(module: str) -> str:
    """The module's name in a text-only causal model; multimodal classes have the same layers in a language_model."""
    match = _LANGUAGE_LAYER.fullmatch(module)
    return f"model.{match['rest']}" if match else module.removeprefix("language_model.")


def _mismatch(module: str, a: Floats, b: Floats, rank: int) -> str:
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] != b.shape[1]:
        return f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not match"
    if a.shape[0] != rank:
        return f"{module}: lora_A has rank {a.shape[0]}, but {CONFIG_NAME} has {rank}"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return f"{module}: has values that are not finite"
    return ""


def _raise_all(error: type[EdgetuneError], summary: str, problems: Sequence[str], remedy: str) -> None:
    if problems:
        raise error(f"{summary}: {first_of(problems)}", remedy)

"""Finds a recipe's encoder, reads its sizes and loads its weights into torch.

Sizes come from optimum's NormalizedConfigManager, under the same names for all architectures. Of optimum 2.3 only this
is of use here: TasksManager knows no model types until an exporter registers some, and optimum's ONNX exporter needs
transformers below 5.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.fold import CONFIG_NAME as ADAPTER_CONFIG
from edgetune_export.hf_folder import read_config
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.wording import first_of

from edgetune import bases
from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"

_SAVE_AGAIN = "save it with save_pretrained of transformers"
# The config must not choose the attention: it may name a kernel to download.
_FROM_FOLDER: Mapping[str, Any] = {
    "trust_remote_code": False,
    "local_files_only": True,
    "attn_implementation": "sdpa",
}


@dataclass(frozen=True)
class EncoderBase:
    """The encoder of a build: its name in the recipe, its folder, and the sizes from config.json.

    `fingerprint` is the sha256 of its weights file; `trained_context_length` is in tokens.
    """

    name: str
    folder: Path
    fingerprint: str
    architecture: str
    hidden_size: int
    layers: int
    trained_context_length: int

    @property
    def path(self) -> Path:
        """The file of its weights."""
        return self.folder / WEIGHTS


def find(recipe: Recipe, *, download: bool = False) -> BaseSource | None:
    """The recipe's encoder before its weights are read; None if it must be downloaded first, unless `download`.

    Raises NotFoundError if there is no such base or a file is missing, IncompatibleError if it is not a BERT-type
    encoder.
    """
    if recipe.base in bases.ALIASES:
        raise _no_encoder(recipe.base, "it writes text")
    if not (download or bases.is_at_hand(recipe.base, recipe.folder)):
        return None
    folder = bases.locate(recipe.base, recipe.folder, bases.ENCODERS)
    architecture = _checked(recipe.base, folder)
    return BaseSource(recipe.base, folder, architecture, _trained_context_length(read_config(folder), folder))


def make(source: BaseSource) -> EncoderBase:
    """The encoder with the digest and the sizes of its weights; VerificationError if a file is damaged."""
    name, folder = source.name, source.path
    fingerprint = sha256_of(folder / WEIGHTS)
    packaged = bases.ENCODERS.get(name)
    if packaged is not None and packaged.sha256 != fingerprint:
        message = f"{folder / WEIGHTS} is not the file that base {name!r} stands for"
        raise VerificationError(message, f"install {packaged.package} again, or give a folder")
    hidden_size, layers = _sizes(folder)
    return EncoderBase(
        name, folder, fingerprint, source.architecture, hidden_size, layers, source.trained_context_length
    )


def load_torch(base: EncoderBase, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder as a transformers model on the CPU, without the pooler of BERT's next-sentence task."""
    from transformers import AutoModel  # noqa: PLC0415 - torch only when training
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # transformers shows a progress bar of its own, even on a pipe.
        with redirect_stderr(io.StringIO()):
            model: PreTrainedModel
            model, info = AutoModel.from_pretrained(
                base.folder, dtype=dtype, output_loading_info=True, use_safetensors=True, **_FROM_FOLDER
            )
    except (ImportError, ValueError, KeyError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IncompatibleError(f"transformers cannot load base {base.name!r}: {reason}", _SAVE_AGAIN) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        message = f"base {base.name!r} has no weights for {first_of(missing, 1)}"
        raise IncompatibleError(message, _SAVE_AGAIN)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def _checked(name: str, folder: Path) -> str:
    """The architecture of the encoder in `folder`; raises the errors of `find`."""
    if not folder.is_dir():
        raise _no_encoder(name, "it is a file of a base that writes text")
    architecture = bases.encoder_type(folder)
    if architecture is None:
        model_type = read_config(folder).get("model_type")
        raise _no_encoder(name, f"its model_type is {model_type!r}")
    if (folder / ADAPTER_CONFIG).exists():
        message = f"base {name!r} has an {ADAPTER_CONFIG}, an adapter that transformers would load with it"
        raise IncompatibleError(message, "merge it with PEFT's merge_and_unload(), and save the result")
    for file in (WEIGHTS, TOKENIZER):
        if not (folder / file).is_file():
            raise NotFoundError(f"base {name!r} has no {file} in {folder}", f"{_SAVE_AGAIN}, with its fast tokenizer")
    return architecture


def _no_encoder(name: str, why: str) -> IncompatibleError:
    types = ", ".join(bases.ENCODER_TYPES)
    message = f"base {name!r} is not an encoder for task: text-classification: {why}"
    return IncompatibleError(
        message, f"give {', '.join(bases.ENCODERS)}, a folder or hub id of {types}, or leave task out"
    )


def _sizes(folder: Path) -> tuple[int, int]:
    """The hidden size and the number of layers."""
    from optimum.utils import NormalizedConfigManager  # noqa: PLC0415 - only where something is built
    from transformers import AutoConfig  # noqa: PLC0415 - as above

    try:
        config = AutoConfig.from_pretrained(folder, **_FROM_FOLDER)
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        return int(normalized.hidden_size), int(normalized.num_layers)
    # transformers raises classes of its validators for what cannot be.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VerificationError(f"{folder / 'config.json'} gives no sizes: {reason}", "get the model again") from error


def _trained_context_length(config: Mapping[str, Any], folder: Path) -> int:
    """The number of tokens that the base has positions for; RoBERTa's positions start after the padding token."""
    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    is_roberta = str(config.get("model_type")).endswith("roberta")
    length = positions - (padding + 1 if is_roberta else 0) if isinstance(positions, int) else 0
    if length < 1:
        raise VerificationError(f"{folder / 'config.json'} has no valid max_position_embeddings", "get the model again")
    return length

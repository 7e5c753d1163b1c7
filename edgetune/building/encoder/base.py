"""The encoder of a build: reads its sizes and loads its weights into torch.

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
from typing import Any

import torch
from edgetune_export.base_file.convert import MAX_LAYERS
from edgetune_export.hf_folder import CONFIG_NAME
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.onnx.tokenizers import encode, load_tokenizer
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME
from edgetune_runtime.wording import first_line, first_of
from optimum.utils import NormalizedConfigManager
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from edgetune import bases
from edgetune.bases import BaseSource
from edgetune.bases.weights import is_finite

_SAVE_AGAIN = "save it with save_pretrained of transformers"
# The config must not choose the attention: it may name a kernel to download. Chunks of the feed-forward layers save
# memory only, and need rows whose length is a multiple of theirs.
_FROM_FOLDER: Mapping[str, Any] = {
    "trust_remote_code": False,
    "local_files_only": True,
    "attn_implementation": "sdpa",
    "chunk_size_feed_forward": 0,
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
        return self.folder / bases.ENCODER_WEIGHTS

    @property
    def tokenizer(self) -> Path:
        """The file of its tokenizer."""
        return self.folder / TOKENIZER_NAME


def make(source: BaseSource) -> EncoderBase:
    """The encoder with the digest and the sizes of its weights.

    VerificationError if a file is damaged, IncompatibleError if its tokenizer has tokens without an embedding.
    """
    name, folder = source.name, source.path
    fingerprint = sha256_of(folder / bases.ENCODER_WEIGHTS)
    packaged = bases.ENCODERS.get(name)
    if packaged is not None and packaged.sha256 != fingerprint:
        message = f"{folder / bases.ENCODER_WEIGHTS} is not the file that base {name!r} stands for"
        raise VerificationError(message, f"install {packaged.package} again, or give a folder")
    hidden_size, layers, embeddings = _sizes(folder)
    _check_tokenizer(folder / TOKENIZER_NAME, embeddings, name)
    return EncoderBase(
        name, folder, fingerprint, source.architecture, hidden_size, layers, source.trained_context_length
    )


def load_torch(base: EncoderBase, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder as a transformers model on the CPU, without the pooler of BERT's next-sentence task.

    IncompatibleError if transformers cannot load it, VerificationError if a weight is NaN or infinite.
    """
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
        message = f"transformers cannot load base {base.name!r}: {first_line(error)}"
        raise IncompatibleError(message, _SAVE_AGAIN) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        message = f"base {base.name!r} has no weights for {first_of(missing, 1)}"
        raise IncompatibleError(message, _SAVE_AGAIN)
    if hasattr(model, "pooler"):
        model.pooler = None
    damaged = [key for key, parameter in model.named_parameters() if not is_finite(parameter.detach())]
    if damaged:
        message = f"base {base.name!r} has values that are NaN or infinite in {first_of(damaged, 1)}"
        raise VerificationError(message, "get the model again")
    return model


def _sizes(folder: Path) -> tuple[int, int, int]:
    """The hidden size, and the numbers of layers and of tokens with an embedding."""
    try:
        config = AutoConfig.from_pretrained(folder, **_FROM_FOLDER)
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        hidden_size, layers, embeddings = map(int, (normalized.hidden_size, normalized.num_layers, config.vocab_size))
    # transformers raises classes of its validators for what cannot be.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VerificationError(f"{folder / CONFIG_NAME} gives no sizes: {reason}", "get the model again") from error
    if not 0 < layers <= MAX_LAYERS:
        message = f"{folder / CONFIG_NAME} has {layers} layers, and an encoder has 1 to {MAX_LAYERS}"
        raise VerificationError(message, "get the model again")
    return hidden_size, layers, embeddings


def _check_tokenizer(path: Path, embeddings: int, name: str) -> None:
    """Check that each token has an embedding: ONNX Runtime computes with zeros for one that has none."""
    tokenizer = load_tokenizer(path)
    # The tokens that are added to each text need not be in the vocabulary.
    last = max([*tokenizer.get_vocab().values(), *encode(tokenizer, "", adds_special_tokens=True)], default=0)
    if last >= embeddings:
        message = f"base {name!r} has embeddings for {embeddings} tokens, and its tokenizer has tokens up to {last}"
        raise IncompatibleError(message, f"call model.resize_token_embeddings({last + 1}), and save it again")

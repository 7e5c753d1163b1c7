"""Reads what a base is before it is converted: its header, its sizes, and the modules that adapters may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_export import architectures
from edgetune_export.adapters.fold import CONFIG_NAME as ADAPTER_CONFIG
from edgetune_export.architectures.shape import BaseShape, SizedModule
from edgetune_export.hf_folder import CONFIG_NAME, read_config
from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.gguf_sizes import number
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME

from edgetune.recipe.model import Recipe

from .folder_header import encoder_modules, predict_header
from .locating import ALIASES, ENCODER_TYPES, ENCODERS, encoder_type, is_at_hand, is_encoder, is_gguf, locate

ENCODER_WEIGHTS = "model.safetensors"
_SAVE_AGAIN = "save it with save_pretrained of transformers, with its fast tokenizer"


@dataclass(frozen=True)
class BaseSource:
    """A base before the build changes it: its name in the recipe, its file or folder, and what is read of it.

    `header` is that of the file, predicted for a folder, and `shape` has its sizes; both are None for an encoder.
    `linear_modules` are those that an adapter may change.
    `trained_context_length` is in tokens.
    """

    name: str
    path: Path
    architecture: str
    trained_context_length: int
    is_folder: bool = True
    header: GgufHeader | None = None
    shape: BaseShape | None = None
    linear_modules: tuple[SizedModule, ...] = ()

    @property
    def file(self) -> Path | None:
        """The GGUF file, if there is one already."""
        return None if self.is_folder else self.path


def find(recipe: Recipe, *, download: bool = False) -> BaseSource | None:
    """The recipe's base, whose header is read, or predicted for a folder; of an encoder, the config. Converts nothing.

    None if it must be downloaded first, unless `download`. Raises the errors of `resolve` that can be found without
    conversion, and IncompatibleError for a target that does not support the base, or a base of the other kind.
    """
    name, folder = recipe.base, recipe.folder
    if recipe.task_type.has_encoders and name in ALIASES:
        raise _no_encoder(name, "it writes text")
    if not (download or is_gguf(name, folder) or is_at_hand(name, folder)):
        return None
    return _encoder(name, folder) if recipe.task_type.has_encoders else source_of(name, folder, recipe.targets)


def source_of(name: str, folder: Path, targets: Sequence[str] = ()) -> BaseSource:
    """The base `name` and its header; errors as in `architectures.of`, `check_base` and `BaseShape.of_header`."""
    if is_encoder(name, folder):
        message = f"base {name!r} is an encoder, which does not generate text"
        raise IncompatibleError(message, "choose another base, or build from a recipe with task: text-classification")
    path = locate(name, folder)
    header = predict_header(path) if path.is_dir() else read_header(path)
    architecture = architectures.of(header, name)
    if not path.is_dir():
        check_base(header, path)
    architecture.check_header(header, targets)
    length, shape = trained_context_length(header), BaseShape.of_header(header)
    return BaseSource(name, path, header.architecture, length, path.is_dir(), header, shape, shape.linear_modules)


def _encoder(name: str, folder: Path) -> BaseSource:
    """The encoder `name`; IncompatibleError if it is not an encoder, NotFoundError if one of its files is missing."""
    path = locate(name, folder, ENCODERS)
    if not path.is_dir():
        raise _no_encoder(name, "it is a file of a base that writes text")
    architecture = encoder_type(path)
    if architecture is None:
        raise _no_encoder(name, f"its model_type is {read_config(path).get('model_type')!r}")
    if (path / ADAPTER_CONFIG).exists():
        message = f"base {name!r} has an {ADAPTER_CONFIG}, an adapter that transformers would load with it"
        raise IncompatibleError(message, "merge it with PEFT's merge_and_unload(), and save the result")
    for file in (ENCODER_WEIGHTS, TOKENIZER_NAME):
        if not (path / file).is_file():
            raise NotFoundError(f"base {name!r} has no {file} in {path}", _SAVE_AGAIN)
    length, modules = _encoder_length(read_config(path), path), encoder_modules(path / ENCODER_WEIGHTS)
    return BaseSource(name, path, architecture, length, linear_modules=modules)


def _no_encoder(name: str, why: str) -> IncompatibleError:
    message = f"base {name!r} is not an encoder for task: text-classification: {why}"
    types = ", ".join(ENCODER_TYPES)
    return IncompatibleError(message, f"give {', '.join(ENCODERS)}, a folder or hub id of {types}, or leave task out")


def _encoder_length(config: Mapping[str, Any], folder: Path) -> int:
    """The number of tokens that an encoder has positions for; RoBERTa's positions start after the padding token."""
    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    before = padding if str(config.get("model_type")).endswith("roberta") else -1
    length = positions - before - 1 if isinstance(positions, int) and isinstance(before, int) else 0
    if length < 1:
        message = f"{folder / CONFIG_NAME} has max_position_embeddings {positions!r} and pad_token_id {padding!r}"
        raise VerificationError(message, "get the model again")
    return length


def trained_context_length(header: GgufHeader) -> int:
    """The context length that the base was trained for, in tokens; IncompatibleError if the header does not say it."""
    return number(header, "context_length")

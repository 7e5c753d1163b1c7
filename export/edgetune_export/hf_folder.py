"""Reads the config.json of a Hugging Face folder, and refuses a folder that brings code of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.formats.regular_file import read_up_to

CONFIG_NAME = "config.json"
_SETTINGS = "*config*.json"
"""The files that transformers takes settings from."""
_MAX_JSON_BYTES = 1 << 26
_REFUSED = {
    "auto_map": "which makes transformers run Python files of the folder",
    "configuration_files": "which makes transformers read another file instead",
}


def read_config(folder: Path) -> Mapping[str, Any]:
    """The contents of config.json.

    Raises NotFoundError if there is none, VerificationError if it is not a JSON object or the folder has a pipe or a
    device, and IncompatibleError if one of the folder's settings names code to run, or another file to read instead.
    """
    path = folder / CONFIG_NAME
    # transformers and llama.cpp's converter open many files by name, and a pipe would wait for a writer.
    for other in sorted(folder.glob("*")):
        if other.exists() and not (other.is_file() or other.is_dir()):
            raise VerificationError(f"{other} is not a regular file", "download the model again")
    if not path.is_file():
        remedy = "use a Hugging Face model folder, a .gguf file or a hub id"
        raise NotFoundError(f"{folder} has no {CONFIG_NAME}", remedy)
    for other in sorted(folder.glob(_SETTINGS)):
        if other.is_file():
            _refuse_code(other, read_json(other))
    config = read_json(path)
    if not isinstance(config, dict):
        raise VerificationError(f"{path} is not a JSON object", "download the model again")
    return config


def entries(value: object) -> Iterator[tuple[str, Any]]:
    """All keys of a JSON value with what they have, also of the objects within it."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _refuse_code(path: Path, settings: object) -> None:
    for key, _ in entries(settings):
        if key in _REFUSED:
            remedy = "use a model that transformers supports without code from its folder"
            raise IncompatibleError(f"{path} has {key}, {_REFUSED[key]}", remedy)


def read_json(path: Path) -> object:
    """The JSON in a file; VerificationError if it is not JSON, or too long."""
    text = read_up_to(path, _MAX_JSON_BYTES)
    if text is None:
        message = f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB, the most that is read of it"
        raise VerificationError(message, "download the model again")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path} is not JSON: {error}", "download the model again") from error

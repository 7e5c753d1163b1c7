"""Converts a Hugging Face folder to an unquantized GGUF file with llama.cpp's own converter.

The converter must match the llama.cpp version that reads the file. It is part of the source distribution of
llama-cpp-python, so pip downloads that of the installed version once; the converter stays in the user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError, parsing
from edgetune_runtime.formats.atomic import TEMPORARY
from edgetune_runtime.wording import shortened

from edgetune_export import architectures
from edgetune_export.architectures import Architecture
from edgetune_export.architectures.base import ENTRIES
from edgetune_export.hf_folder import CONFIG_NAME, entries, read_config, read_json

from .cache import cache_folder, make_in_cache
from .llama_cpp_source import download_source, unpack_source

SCRIPT = "convert_hf_to_gguf.py"
# The parts of vendor/llama.cpp that the converter needs.
PARTS = (SCRIPT, "conversion", "gguf-py/gguf", "LICENSE")
_PROGRAM = Path(__file__).with_name("run_converter.py")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
MAX_LAYERS = 1024
"""The most layers of a base that is read: a damaged number would take all memory."""
WEIGHT_FILES = "model*.safetensors"
"""The names of the files with weights."""
_CONVERTED = ("compressed-tensors", "fp8", "modelopt")
"""Quantizations of transformers that the converter reads, of weights in 8 bits."""
_PROGRESS = "Writing:"
"""The beginning of the converter's progress bar."""
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-(\d{1,6})\.safetensors")


def check_folder(folder: Path) -> Architecture:
    """The architecture of a Hugging Face model folder, before any work is done.

    Raises NotFoundError if the folder has no model, VerificationError if its config.json is damaged and
    IncompatibleError if the architecture or the quantization is not supported, or if the folder brings code of its own.
    """
    config, path = read_config(folder), folder / CONFIG_NAME
    if not isinstance(config.get("model_type"), str):
        raise VerificationError(f"{path} has no model_type", "download the model again")
    multimodal = {each.multimodal[0] for each in architectures.known().values()}
    within = config.get("text_config")
    if isinstance(within, dict) and config["model_type"] not in multimodal:
        # A file has only the text part, so that of another architecture is of no use either.
        architectures.of_model_type(str(within.get("model_type", config["model_type"])), str(folder))
        message = f"{folder} is a multimodal model ({config['model_type']}), of which only the text part can be a base"
        remedy = f"use its .gguf file: that of llama.cpp's {SCRIPT} has the text part"
        raise IncompatibleError(message, remedy)
    architecture = architectures.of_model_type(config["model_type"], str(folder))
    text = architecture.text_part(config)
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized and (method := quantized.get("quant_method")) not in _CONVERTED:
        message = f"{folder} is quantized with {shortened(str(method))}, which is not supported"
        raise IncompatibleError(message, "use the same model without this quantization, or its .gguf file")
    _check_sizes(text, path)
    with parsing(f"{path} is damaged", "download the model again"):
        architecture.check_config(text)
        entries = architecture.header_entries(text)
        wrong = [key for key, value in entries.items() if not _is_whole(value)]
        if wrong:
            raise ValueError(f"{wrong[0]} would be {entries[wrong[0]]!r}")
    _check_weights(folder)
    multimodal_type, multimodal_class = architecture.multimodal
    is_multimodal = config["model_type"] == multimodal_type
    _check_class(config, path, multimodal_class if is_multimodal else architecture.model_class)
    return architecture


def _is_whole(value: object) -> bool:
    """Whether a hyperparameter is a whole number from 1 on, or an array of such from 0 on."""
    if isinstance(value, tuple):
        return all(isinstance(item, int) and item >= 0 for item in value)
    return isinstance(value, int) and value > 0


def part_of(folder: Path) -> str:
    """The part of a folder that is converted, in words, after `check_folder` has accepted it."""
    is_multimodal = "text_config" in read_config(folder)
    return f"the text part of {folder.name}" if is_multimodal else folder.name


def weight_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder from which the converter takes the weights, in order."""
    return sorted(folder.glob(WEIGHT_FILES))


def _check_weights(folder: Path) -> None:
    """Check the .safetensors files: the converter reads all of them, whatever an index says, or pickles if none."""
    names = {path.name for path in weight_files(folder)}
    if not names:
        remedy = "download its .safetensors files, or save the model with save_pretrained, not as a pickle"
        raise NotFoundError(f"{folder} has no .safetensors file of a model", remedy)
    index = folder / _INDEX
    expected = _named_in(index) if index.exists() else _without_index(names)
    missing, others = expected - names, names - expected
    if missing and all(map(_SHARD.fullmatch, missing)):
        message = f"{folder} has {len(expected & names)} of the {len(expected)} .safetensors files of its model"
        raise VerificationError(message, "download the rest")
    if missing:
        message = f"{index} names {min(missing)[:80]!r}, which is not a .safetensors file of the folder"
        raise VerificationError(message, "download the model again")
    if others:
        message = f"{folder} has {min(others)[:80]!r}, which transformers does not read but llama.cpp's converter does"
        raise VerificationError(message, f"keep only {_WHOLE}, or the files that {_INDEX} names")


def _named_in(index: Path) -> set[str]:
    """The files that an index names."""
    weights = dict(entries(read_json(index))).get("weight_map")
    return set(map(str, weights.values())) if isinstance(weights, dict) else {str(weights)}


def _without_index(names: set[str]) -> set[str]:
    """The files of the model in a folder without an index: one file, or all parts of the set with the most."""
    totals = [match[1] for name in names if (match := _SHARD.fullmatch(name))]
    if _WHOLE in names or not totals:
        return names & {_WHOLE}
    total = max(totals, key=int)
    return {f"model-{part:0{len(total)}}-of-{total}.safetensors" for part in range(1, int(total) + 1)}


def _check_class(config: Mapping[str, Any], path: Path, model_class: str) -> None:
    """The converter goes by the class that config.json or a config within it names, whatever the model_type is."""
    named = [value for key, value in entries(config) if key == "architectures"]
    wrong = next((value for value in named or [None] if value != [model_class]), [model_class])
    if wrong != [model_class]:
        message = f"{path} has architectures {str(wrong)[:80]!r}; a {config['model_type']} has [{model_class!r}]"
        raise IncompatibleError(message, "save the model with save_pretrained of transformers")


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    for key in ENTRIES:
        value, maximum = config.get(key), MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if not (value is None or (type(value) is int and 0 < value <= maximum)):
            raise VerificationError(f"{path} has {key} {str(value)[:80]!r}", "download the model again")


def convert_folder(folder: Path, out: Path, *, dtype: str = "auto", converter: Path | None = None) -> None:
    """Convert the model in `folder` to the GGUF file `out`. `dtype` is f32, f16, bf16 or auto (closest to the source).

    `converter` is a llama.cpp checkout or its convert_hf_to_gguf.py; None downloads the matching one with pip.
    """
    architecture = check_folder(folder)
    changes = architecture.converter_entries(read_config(folder))
    script = find_converter(converter)
    # An empty entry would mean the working folder.
    path = os.pathsep.join(filter(None, [str(script.parent / "gguf-py"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **_OFFLINE, "PYTHONPATH": path}
    with _changed(folder, changes, out.parent) as source:
        # -P: none of the working folder's modules, or of those beside the program.
        command = [sys.executable, "-P", str(_PROGRAM), str(script), str(source)]
        command += ["--outfile", str(out), "--outtype", dtype, *architecture.converter_options]
        process = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, env=environment, check=False
        )
    if process.returncode != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        lines = [line for line in process.stderr.strip().splitlines() if not line.startswith(_PROGRESS)]
        reason = lines[-1] if lines else "no message"
        raise IncompatibleError(f"llama.cpp cannot convert {folder}: {reason}", "check the model's files and tokenizer")


@contextmanager
def _changed(folder: Path, changes: Mapping[str, Any], work: Path) -> Iterator[Path]:
    """The folder, or one of links to its files within `work` whose config.json has the `changes`."""
    if not changes:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=work) as temporary:
        # The converter writes the folder's name into the file.
        source = Path(temporary, folder.resolve().name)
        source.mkdir()
        for path in folder.iterdir():
            if path.name != CONFIG_NAME:
                (source / path.name).symlink_to(path.resolve())
        config = {**read_config(folder), **changes}
        (source / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        yield source


def llama_cpp_version() -> str:
    """The version of llama-cpp-python, of which the converter is a part unless another one is given."""
    return importlib.metadata.version("llama-cpp-python")


def find_converter(converter: Path | None = None) -> Path:
    """The path of convert_hf_to_gguf.py: the given one, the cached one, or a new download with pip."""
    if converter is not None:
        script = converter / SCRIPT if converter.is_dir() else converter
        if not script.is_file():
            raise NotFoundError(f"{converter} has no {SCRIPT}", "use a llama.cpp checkout")
        return script
    version = llama_cpp_version()
    cached = cache_folder() / f"llama-cpp-python-{version}"
    if not (cached / SCRIPT).is_file():
        _fetch(version, cached)
    return cached / SCRIPT


def _fetch(version: str, target: Path) -> None:
    """Download the source distribution, and keep the converter in `target`."""
    make_in_cache(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        archive = download_source(version, Path(folder), "give a llama.cpp checkout as the converter")
        unpacked = _extract(archive, Path(folder))
        try:
            unpacked.rename(target)
        except OSError:
            # Another process was faster; its copy is the same.
            if not (target / SCRIPT).is_file():
                raise


def _extract(archive: Path, folder: Path) -> Path:
    """Unpack the converter from a source distribution; returns the folder with the script."""
    within = "vendor/llama.cpp"
    unpacked = unpack_source(archive, folder, [f"{within}/{part}" for part in PARTS]) / within
    if not (unpacked / SCRIPT).is_file():
        raise VerificationError(f"{archive.name} has no {SCRIPT}", "give a llama.cpp checkout as the converter")
    return unpacked

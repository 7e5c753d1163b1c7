from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import forks
import gguf
import numpy as np
import pytest
import torch
from edgetune_export.base_file import run_converter
from edgetune_export.base_file.convert import find_converter
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError
from edgetune_runtime.formats.gguf_file import read_header
from ports import http_server
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaForCausalLM,
)

from edgetune import bases
from edgetune.bases import Base, making
from edgetune.bases.weights import GgufWeights


def test_a_gguf_file_ships_as_it_is(
    resolve: Callable[..., Base], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_gguf("qwen3")
    shutil.copy(path, tmp_path / "base.gguf")
    for name in ("base.gguf", str(tmp_path / "base.gguf")):
        base = resolve(name)
        assert (base.name, base.path, base.fingerprint) == (name, tmp_path / "base.gguf", sha256_of(path))
        assert base.header.architecture == "qwen3"
    assert not (tmp_path / "work").exists()


def test_a_gguf_file_is_quantized_anew_where_the_recipe_says_so(
    resolve: Callable[..., Base], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copy(tiny_gguf("llama"), tmp_path / "tiny.F16.gguf")
    base = resolve("tiny.F16.gguf", quantization="q4_0")
    assert base.path.name == "tiny.q4_0.gguf"
    assert base.header.main_type.name == "q4_0"
    assert base.fingerprint == sha256_of(base.path) != sha256_of(tmp_path / "tiny.F16.gguf")
    written = base.path.stat().st_mtime_ns
    assert resolve("tiny.F16.gguf", quantization="q4_0") == base
    assert base.path.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["a\\b.gguf", "a\tb.gguf", f"{'q' * 191}.gguf"])
def test_a_file_that_no_bundle_can_have_is_refused_before_any_work(
    assert_refused: Callable[..., None],
    name: str,
    resolve: Callable[..., Base],
    tiny_gguf: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / name).symlink_to(tiny_gguf("llama"))
    for quantization in (None, "q4_0"):
        message = "whose name is too long or has special characters; rename the base"
        assert_refused(UsageError, message, lambda quantization=quantization: resolve(name, quantization=quantization))  # type: ignore[misc]
    assert not (tmp_path / "work").exists()


def test_a_folder_whose_file_no_bundle_can_have_is_refused_before_it_is_converted(
    assert_refused: Callable[..., None],
    resolve: Callable[..., Base],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    name = "q" * 185
    (tmp_path / name).symlink_to(tiny_folder("llama"))
    assert_refused(UsageError, "whose name is too long", lambda: resolve(name))
    assert not (tmp_path / "work").exists()


def test_an_alias_names_the_package_that_is_missing(
    assert_refused: Callable[..., None], resolve: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(bases.ALIASES["smollm2-135m"], package="no_such_package")
    monkeypatch.setitem(bases.ALIASES, "smollm2-135m", absent)
    message = "is in the package no_such_package, which is not installed; run: pip install"
    assert_refused(NotFoundError, message, lambda: resolve("smollm2-135m"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-153m", "no base 'smollm2-153m'; did you mean 'smollm2-135m'? Or use one of smollm2-135m, a .gguf"),
        ("other.gguf", "no base 'other.gguf'; use one of smollm2-135m, a .gguf file, a Hugging Face folder or a hub"),
        ("./nowhere/model", "no base './nowhere/model'"),
    ],
)
def test_the_error_about_an_unknown_base_lists_the_bases(
    assert_refused: Callable[..., None], name: str, message: str, resolve: Callable[..., Base]
) -> None:
    assert_refused(NotFoundError, message, lambda: resolve(name))


def test_a_hub_id_without_network_is_one_line(
    assert_refused: Callable[..., None], resolve: Callable[..., Base]
) -> None:
    name = "edgetune-tests/no-such-model"
    message = f"cannot download base '{name}' from the hub: "
    assert_refused(NotFoundError, message, lambda: resolve(name))


class _Hub(BaseHTTPRequestHandler):
    """A hub with one repository, whose files are not to be had without access."""

    files: tuple[str, ...] = ("config.json",)

    def do_GET(self) -> None:
        entries = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
        about: object = entries if "/tree/" in self.path else {"id": "owner/name", "sha": "a" * 40, "siblings": []}
        self.answer(200, json.dumps(about).encode())

    def do_HEAD(self) -> None:
        self.answer(403, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _HubOfGguf(_Hub):
    files = ("model-q4_0.gguf", "README.md")


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (_Hub, "base 'owner/name' is gated: its owner gives access to those who ask for it; ask on its page"),
        (
            _HubOfGguf,
            "base 'owner/name' on the hub has no config.json; if it has .gguf files, get one with hf download",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    assert_refused: Callable[..., None],
    hub: type[_Hub],
    message: str,
    resolve: Callable[..., Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with http_server(hub) as address:
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        assert_refused(NotFoundError, message, lambda: resolve("owner/name"))


@pytest.mark.usefixtures("forked_converter")
def test_a_base_in_several_files_is_the_same(
    resolve: Callable[..., Base],
    tiny_folder: Callable[[str], Path],
    converted_gguf: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "parts", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(tiny_folder("llama")).save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = converted_gguf("llama"), resolve("parts", quantization="f16", converter=None)
    assert parts.header.tensors.keys() == read_header(whole).tensors.keys()
    assert all(
        np.array_equal(GgufWeights(whole).values(name), GgufWeights(parts.path).values(name))
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
    )


def test_the_text_part_of_a_multimodal_base_is_used_as_its_gguf_file(
    assert_refused: Callable[..., None],
    resolve: Callable[..., Base],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_folder("gemma3"), tmp_path / "both", ignore=shutil.ignore_patterns("*.safetensors"))
    text = Gemma3TextConfig.from_pretrained(folder).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    message = "is a multimodal model (gemma3), of which only the text part can be a base; use its .gguf file"
    assert_refused(IncompatibleError, message, lambda: resolve("both"))
    command = [sys.executable, "-P", str(run_converter.__file__), str(find_converter()), str(folder)]
    done = forks.run([*command, "--outfile", str(tmp_path / "text.gguf")])
    assert done.returncode == 0, done.stderr
    assert bases.load_torch(resolve("text.gguf"), torch.float32).config.model_type == "gemma3_text"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_unsupported_architecture_is_refused_by_name_before_any_work(
    assert_refused: Callable[..., None], kind: str, resolve: Callable[..., Base], tmp_path: Path
) -> None:
    if kind == "folder":
        (tmp_path / "base").mkdir()
        (tmp_path / "base/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        (tmp_path / "base/model.safetensors").touch()
    else:
        writer = gguf.GGUFWriter(tmp_path / "base", "gpt2")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    assert_refused(IncompatibleError, "architecture 'gpt2' of ", lambda: resolve("base"))
    assert not (tmp_path / "work").exists()


def test_a_folder_that_names_no_context_length_is_refused(
    assert_refused: Callable[..., None],
    resolve: Callable[..., Base],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base")) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["max_position_embeddings"]
    for keys in ({}, {"max_position_embeddings": None}):
        path.write_text(json.dumps({**config, **keys}), encoding="utf-8")
        assert_refused(IncompatibleError, "has no llama.context_length", lambda: resolve("base"))


@pytest.mark.usefixtures("forked_converter")
def test_a_folder_is_converted_once(
    assert_refused: Callable[..., None],
    resolve: Callable[..., Base],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")
    base = resolve("tiny", quantization="f16", converter=None)
    assert base.header.main_type.name == "f16"
    assert [path.name for path in (tmp_path / "work").iterdir()] == [base.path.name]
    # With a converter that does not exist, only what is kept can be taken.
    written = base.path.stat().st_mtime_ns
    assert resolve("tiny", quantization="f16") == base
    assert base.path.stat().st_mtime_ns == written
    assert_refused(NotFoundError, "no converter", lambda: resolve("tiny", quantization="q4_0"))
    for name, version in (("__version__", "99"), ("llama_cpp_version", lambda: "99")):
        with monkeypatch.context() as upgrade:
            upgrade.setattr(making, name, version)
            assert_refused(NotFoundError, "no converter", lambda: resolve("tiny", quantization="f16"))
    (folder / "config.json").touch()
    assert_refused(NotFoundError, "no converter", lambda: resolve("tiny", quantization="f16"))
    assert [path.name for path in (tmp_path / "work").iterdir()] == [base.path.name]

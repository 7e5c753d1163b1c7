from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import forks
import gguf
import numpy as np
import pytest
import torch
from edgetune_export import architectures
from edgetune_export.architectures.layout import base_columns
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.base_file import run_converter
from edgetune_export.base_file.convert import find_converter
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import read_header
from ports import http_server
from runtime.gguf_files import STRING, rewritten, scaled
from tiny import ARCHITECTURES, MODELS, make_folder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from edgetune import bases
from edgetune.bases import Base, load_torch
from edgetune.bases.weights import GgufWeights
from edgetune.common.progress import Progress
from edgetune.shipping.verify import logits_of


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., Base]:
    """`resolve(name, **changes)`: a base from tmp_path, with a converter that does not exist."""

    def call(name: str, **changes: Any) -> Base:  # noqa: ANN401 - of resolve's own types
        given: dict[str, Any] = {"folder": tmp_path, "quantization": None, "work": tmp_path / "work"}
        given |= {"progress": Progress(quiet=True), "converter": tmp_path / "no converter"}
        return bases.resolve(name, **{**given, **changes})

    return call


def assert_refused(kind: type[EdgetuneError], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    name: str, resolve: Callable[..., Base], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(tiny_gguf("llama"))
    for quantization in (None, "q4_0"):
        message = "whose name is too long or has special characters; rename the base"
        assert_refused(UsageError, message, lambda quantization=quantization: resolve(name, quantization=quantization))  # type: ignore[misc]
    assert not (tmp_path / "work").exists()


def test_a_folder_whose_file_no_bundle_can_have_is_refused_before_it_is_converted(
    resolve: Callable[..., Base], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "q" * 185
    (tmp_path / name).symlink_to(tiny_folder("llama"))
    assert_refused(UsageError, "whose name is too long", lambda: resolve(name))
    assert not (tmp_path / "work").exists()


def test_an_alias_names_the_package_that_is_missing(
    resolve: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
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
def test_the_error_about_an_unknown_base_lists_the_bases(name: str, message: str, resolve: Callable[..., Base]) -> None:
    assert_refused(NotFoundError, message, lambda: resolve(name))


def test_a_hub_id_without_network_is_one_line(resolve: Callable[..., Base]) -> None:
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
    hub: type[_Hub], message: str, resolve: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    resolve: Callable[..., Base], tiny_folder: Callable[[str], Path], tmp_path: Path
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
    kind: str, resolve: Callable[..., Base], tmp_path: Path
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
    resolve: Callable[..., Base], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base")) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["max_position_embeddings"]
    for keys in ({}, {"max_position_embeddings": None}):
        path.write_text(json.dumps({**config, **keys}), encoding="utf-8")
        assert_refused(IncompatibleError, "has no llama.context_length", lambda: resolve("base"))


@pytest.mark.usefixtures("forked_converter")
def test_a_folder_is_converted_once(
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
            upgrade.setattr(bases, name, version)
            assert_refused(NotFoundError, "no converter", lambda: resolve("tiny", quantization="f16"))
    (folder / "config.json").touch()
    assert_refused(NotFoundError, "no converter", lambda: resolve("tiny", quantization="f16"))
    assert [path.name for path in (tmp_path / "work").iterdir()] == [base.path.name]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_weights_in_torch_are_those_that_llama_cpp_runs(arch: str, tiny_base: Callable[[str], Base]) -> None:
    base = tiny_base(arch)
    model = load_torch(base, torch.float32).eval()
    logits = logits_of(model)
    # Longer than the tiny Gemma's sliding window of 16.
    rows = [np.random.default_rng(seed).integers(5, 380, length).tolist() for seed, length in ((0, 40), (1, 24))]
    with closing(GgufEngine(base.path, context_length=64, threads=1)) as engine:
        parity = compare(logits, engine, rows)
    assert parity.kl <= 1e-4
    assert parity.top1 > 0.95
    # Answers that hardly differ from token to token would make any two models agree.
    assert len(set(logits(rows[0]).argmax(-1))) > 10


# In a Gemma, only layers with full attention are scaled.
@pytest.mark.parametrize(
    ("arch", "factors"), [("llama", np.geomspace(1, 8, 8, dtype=np.float32)), ("llama", None), ("gemma3", None)]
)
def test_a_scaled_rotary_embedding_in_torch_is_that_of_llama_cpp(
    arch: str,
    factors: np.ndarray | None,
    tiny_gguf: Callable[[str], Path],
    resolve: Callable[..., Base],
    tmp_path: Path,
) -> None:
    base = resolve(str(scaled(tiny_gguf(arch), tmp_path / "scaled.gguf", factors)))
    rows = [np.random.default_rng(0).integers(5, 380, 40).tolist()]
    with closing(GgufEngine(base.path, context_length=64, threads=1)) as engine:
        kl = [
            compare(logits_of(load_torch(each, torch.float32)), engine, rows).kl
            for each in (base, resolve(str(tiny_gguf(arch))))
        ]
    # The second, which is not scaled, differs.
    assert kl[0] < 1e-6
    assert kl[1] > 1e-4


@pytest.mark.usefixtures("forked_converter")
def test_biases_of_a_llama_in_torch_are_those_of_llama_cpp(
    tiny_folder: Callable[[str], Path],
    resolve: Callable[..., Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    monkeypatch.setitem(MODELS, "llama", (*MODELS["llama"][:2], {**MODELS["llama"][2], **biases}))
    make_folder("llama", tmp_path / "biased", tiny_folder("llama") / "tokenizer.model")
    base, rows = resolve("biased", quantization="f16", converter=None), [[*range(5, 45)]]
    with closing(GgufEngine(base.path, context_length=64, threads=1)) as engine:
        assert compare(logits_of(load_torch(base, torch.float32)), engine, rows).kl < 1e-4


def test_a_base_with_tensors_that_torch_would_leave_out_is_refused(
    tiny_gguf: Callable[[str], Path], resolve: Callable[..., Base], tmp_path: Path
) -> None:
    biases = {f"blk.{layer}.attn_output.bias": np.ones(64, np.float32) for layer in (0, 1)}
    rewritten(tiny_gguf("qwen3"), tmp_path / "biased.gguf", tensors=biases)
    message = "base 'biased.gguf' has blk.0.attn_output.bias and 1 more, which its model in transformers lacks"
    assert_refused(IncompatibleError, message, lambda: load_torch(resolve("biased.gguf"), torch.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_with_a_weight_that_is_not_finite_is_refused_by_tensor(
    value: float, tiny_gguf: Callable[[str], Path], resolve: Callable[..., Base], tmp_path: Path
) -> None:
    norm = np.ones(64, np.float32)
    norm[3] = value
    rewritten(tiny_gguf("llama"), tmp_path / "nan.gguf", tensors={"blk.1.attn_norm.weight": norm})
    message = f"tensor blk.1.attn_norm.weight of the base {tmp_path / 'nan.gguf'} has values that are NaN or infinite"
    assert_refused(VerificationError, message, lambda: load_torch(resolve("nan.gguf"), torch.float32))


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_a_rotary_embedding_that_is_scaled_in_another_way_is_refused_before_any_work(
    arch: str, resolve: Callable[..., Base], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = {f"{arch}.rope.scaling.type": ("yarn", STRING, None)}
    rewritten(tiny_gguf(arch), tmp_path / "yarn.gguf", lambda fields: fields.update(kind))
    message = "the base scales its rotary embedding (yarn), which is not supported; use a base without"
    assert_refused(IncompatibleError, message, lambda: resolve("yarn.gguf", quantization="q8_0"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_weights_in_torch_are_those_of_the_folder(
    arch: str,
    tiny_folder: Callable[[str], Path],
    converted_gguf: Callable[[str], Path],
    resolve: Callable[..., Base],
) -> None:
    base, folder = resolve(str(converted_gguf(arch))), tiny_folder(arch)
    config = AutoConfig.from_pretrained(folder)
    for name, value in architectures.of(base.header).config_entries(base.header).items():
        setattr(config, name, value)
    expected, found = AutoModelForCausalLM.from_pretrained(folder, config=config), load_torch(base, torch.float32)
    tokens = torch.tensor([range(5, 45)])
    with torch.inference_mode():
        for parameter in expected.parameters():
            # The file has matrices in f16, and kernels of convolutions, which have three dimensions, in f32.
            parameter.copy_(parameter.half() if parameter.dim() == 2 else parameter)
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


# q6_k has 16 columns per group, fewer than a head has.
@pytest.mark.parametrize("quantization", ["q4_0", "q6_k"])
def test_weights_lie_on_the_grid_of_their_file_where_heads_have_another_order(
    quantization: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "base.gguf"
    quantize_gguf(tiny_gguf("qwen35"), path, quantization)
    file, header = GgufWeights(path), read_header(path)
    columns = base_columns(header.tensors["blk.0.ssm_out.weight"], header)
    assert columns is not None
    assert not np.array_equal(columns, np.arange(len(columns)))
    for module in ("out_proj", "in_proj_qkv"):
        name = f"model.layers.0.linear_attn.{module}.weight"
        on = file.grid(name)
        assert on is not None
        positions = on[0].positions(file.values(name).numpy())
        np.testing.assert_allclose(positions, np.rint(positions), atol=1e-2)


def test_layers_that_share_keys_may_have_some_in_the_file(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    # Published checkpoints of Gemma 4 have them, and llama.cpp's converter keeps them.
    own = {"attn_k.weight": (32, 64), "attn_v.weight": (32, 64), "attn_k_norm.weight": (16,)}
    unused = {f"blk.4.{name}": np.full(shape, np.nan, np.float32) for name, shape in own.items()}
    files = (rewritten(tiny_gguf("gemma4"), tmp_path / "base.gguf", tensors=unused), tiny_gguf("gemma4"))
    for file in files:
        check_base(read_header(file), file)
    found, expected = (BaseShape.of_header(read_header(file)) for file in files)
    assert found == expected
    logits = [
        load_torch(Base("", file, "", read_header(file)), torch.float32)(torch.tensor([[5, 6]])).logits
        for file in files
    ]
    assert torch.equal(*logits)
    with closing(GgufEngine(files[0], context_length=64, threads=1)) as engine:
        assert np.isfinite(engine.decode([5, 6])).all()


def test_rows_of_an_embedding_that_stays_in_the_file_are_those_of_the_whole(
    tiny_gguf: Callable[[str], Path], resolve: Callable[..., Base]
) -> None:
    base, name = resolve(str(tiny_gguf("gemma4")), quantization="q4_0"), "model.embed_tokens_per_layer"
    embedding = load_torch(base, torch.bfloat16).get_submodule(name)
    tokens = torch.tensor([[7, 300, 7], [0, 383, 12]])
    assert not [*embedding.parameters()]
    whole = GgufWeights(base.path).values(f"{name}.weight").to(torch.bfloat16)
    assert torch.equal(embedding(tokens), whole[tokens] * torch.tensor(32**0.5, dtype=torch.bfloat16))


def test_a_gemma4_with_the_types_of_googles_4_bit_files_is_what_llama_cpp_runs(
    tiny_folder: Callable[[str], Path],
    convert: Callable[[Path, Path], None],
    resolve: Callable[..., Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # q6_k needs rows of 256 columns.
    sizes = {"hidden_size_per_layer_input": 128, "global_head_dim": 128}
    monkeypatch.setitem(MODELS, "gemma4", (*MODELS["gemma4"][:2], MODELS["gemma4"][2] | sizes))
    tokenizer, folder = tiny_folder("llama") / "tokenizer.model", tmp_path / "wide"
    convert(make_folder("gemma4", folder, tokenizer, hidden_size=256), tmp_path / "f16.gguf")
    quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q4_0.gguf", "q4_0+q6_k")
    whole = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "f16.gguf").tensors}
    inputs = {name: data for name, data in whole.items() if name.endswith((".inp_gate.weight", ".proj.weight"))}
    base = resolve(str(rewritten(tmp_path / "q4_0.gguf", tmp_path / "shipped.gguf", tensors=inputs)))
    kinds = {name.removeprefix("blk.0."): tensor.type.name for name, tensor in base.header.tensors.items()}
    embeddings = (kinds["token_embd.weight"], kinds["per_layer_token_embd.weight"])
    assert (*embeddings, kinds["inp_gate.weight"], kinds["attn_q.weight"]) == ("q6_k", "q6_k", "f16", "q4_0")
    model, rows = load_torch(base, torch.float32), [np.random.default_rng(0).integers(5, 380, 40).tolist()]
    with torch.no_grad(), closing(GgufEngine(base.path, context_length=64, threads=1)) as engine:
        found = compare(lambda tokens: model(torch.tensor([tokens])).logits[0].numpy(), engine, rows)
    assert found.kl < 2e-3 and found.top1 > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arch", [arch for arch in ARCHITECTURES if architectures.known()[arch].transformers_reads_gguf]
)
def test_model_and_config_are_those_that_transformers_makes_of_the_file(
    arch: str, dtype: torch.dtype, tiny_gguf: Callable[[str], Path], resolve: Callable[..., Base]
) -> None:
    base = resolve(str(tiny_gguf(arch)), quantization="q8_0")
    model = load_torch(base, dtype)
    config = AutoConfig.from_pretrained(base.path.parent, gguf_file=base.path.name)
    for name, value in architectures.of(base.header).config_entries(base.header).items():
        setattr(config, name, value)
    expected = AutoModelForCausalLM.from_pretrained(
        base.path.parent, gguf_file=base.path.name, config=config, dtype=dtype
    )
    assert comparable(model.config) == comparable(expected.config)
    assert type(model) is type(expected)
    tensors = {**expected.state_dict(), **dict(expected.named_buffers())}
    found = {**model.state_dict(), **dict(model.named_buffers())}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    tied = [loaded.get_input_embeddings().weight is loaded.lm_head.weight for loaded in (model, expected)]
    assert tied[0] == tied[1]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def comparable(config: PreTrainedConfig) -> dict[str, Any]:
    """All that a config says but where it is from, how it is run and what its file was."""
    apart = {"_name_or_path", "_model_name_or_path", "quantization_config", "use_cache"}
    return {key: value for key, value in config.to_dict().items() if key not in apart}


def test_mapped_weights_are_the_same_and_their_file_stays_as_it_is(
    tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    file = tmp_path / "weights.f32"
    mapped, model = (load_torch(tiny_base("gemma3"), torch.float32, mapped=path) for path in (file, None))
    before = file.read_bytes()
    assert len(before) >= 4 * sum(parameter.numel() for parameter in model.parameters())
    for (name, values), expected in zip(mapped.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(values, expected), name
    with torch.no_grad():
        for values in mapped.parameters():
            values.add_(1)
    assert file.read_bytes() == before


def test_a_base_without_some_weights_is_refused(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    whole = tiny_base("llama")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    for key, value in whole.header.metadata.items():
        if not isinstance(value, tuple) and key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType(whole.header.value_types[key]))
    writer.add_array("tokenizer.ggml.tokens", list(whole.header.metadata["tokenizer.ggml.tokens"]))
    for tensor in gguf.GGUFReader(whole.path).tensors:
        if tensor.name not in {"blk.0.ffn_up.weight", "blk.1.attn_norm.weight"}:
            writer.add_tensor(tensor.name, tensor.data)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    path = tmp_path / "part.gguf"
    part = replace(whole, name="part", path=path, header=read_header(path))
    message = "base 'part' has no weights for model.layers.0.mlp.up_proj.weight and 1 more"
    assert_refused(IncompatibleError, message, lambda: load_torch(part, torch.float32))


def test_a_file_of_an_unknown_architecture_is_refused(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "nosuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path = tmp_path / "other.gguf"
    other = replace(tiny_base("llama"), name="other", path=path, header=read_header(path))
    message = "architecture 'nosuch' is not supported"
    assert_refused(IncompatibleError, message, lambda: load_torch(other, torch.float32))

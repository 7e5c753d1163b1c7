from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from edgetune_export import architectures
from edgetune_export.architectures.layout import base_columns
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_base import check_base
from edgetune_runtime.formats.gguf_file import read_header
from runtime.gguf_files import STRING, rewritten, scaled
from tiny import ARCHITECTURES, MODELS, make_folder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from edgetune.bases import Base, load_torch
from edgetune.bases.weights import GgufWeights
from edgetune.shipping.verify import logits_of


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
    assert_refused: Callable[..., None], tiny_gguf: Callable[[str], Path], resolve: Callable[..., Base], tmp_path: Path
) -> None:
    biases = {f"blk.{layer}.attn_output.bias": np.ones(64, np.float32) for layer in (0, 1)}
    rewritten(tiny_gguf("qwen3"), tmp_path / "biased.gguf", tensors=biases)
    message = "base 'biased.gguf' has blk.0.attn_output.bias and 1 more, which its model in transformers lacks"
    assert_refused(IncompatibleError, message, lambda: load_torch(resolve("biased.gguf"), torch.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_with_a_weight_that_is_not_finite_is_refused_by_tensor(
    assert_refused: Callable[..., None],
    value: float,
    tiny_gguf: Callable[[str], Path],
    resolve: Callable[..., Base],
    tmp_path: Path,
) -> None:
    norm = np.ones(64, np.float32)
    norm[3] = value
    rewritten(tiny_gguf("llama"), tmp_path / "nan.gguf", tensors={"blk.1.attn_norm.weight": norm})
    message = f"tensor blk.1.attn_norm.weight of the base {tmp_path / 'nan.gguf'} has values that are NaN or infinite"
    assert_refused(VerificationError, message, lambda: load_torch(resolve("nan.gguf"), torch.float32))


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_a_rotary_embedding_that_is_scaled_in_another_way_is_refused_before_any_work(
    assert_refused: Callable[..., None],
    arch: str,
    resolve: Callable[..., Base],
    tiny_gguf: Callable[[str], Path],
    tmp_path: Path,
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


def test_a_base_without_some_weights_is_refused(
    assert_refused: Callable[..., None], tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
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


def test_a_file_of_an_unknown_architecture_is_refused(
    assert_refused: Callable[..., None], tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "nosuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path = tmp_path / "other.gguf"
    other = replace(tiny_base("llama"), name="other", path=path, header=read_header(path))
    message = "architecture 'nosuch' is not supported"
    assert_refused(IncompatibleError, message, lambda: load_torch(other, torch.float32))

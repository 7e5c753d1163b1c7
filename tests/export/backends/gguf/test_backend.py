from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.adapters.shapes import Delta, LowRank, Merged
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.backend import write_adapter, write_merged
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import IncompatibleError, OutOfSpaceError, VerificationError
from edgetune_runtime.formats.gguf_file import read_header
from tiny import SAME_MODULES
from weights import weights_in

FINGERPRINT = "0" * 64


def ones(rank: int, rows: int, columns: int, value: float = 0.1) -> Delta:
    return Delta(np.full((rank, columns), value, np.float32), np.full((rows, rank), value, np.float32))


@pytest.fixture(scope="module")
def wide(wide_gguf: Callable[[int], Path]) -> Path:
    """A tiny LLaMA whose columns K-quants can divide."""
    return wide_gguf(256)


def random_adapter(base: Path, rank: int = 4, std: float = 0.1) -> LowRank:
    """A delta on every linear layer of a llama base."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    names |= {"attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    random = np.random.default_rng(0)
    modules = {}
    for tensor in read_header(base).tensors.values():
        _, layer, kind, *_ = [*tensor.name.split("."), "", ""]
        if kind in names:
            columns, rows = tensor.shape
            a, b = random.normal(0, std, (rank, columns)), random.normal(0, std, (rows, rank))
            modules[f"model.layers.{layer}.{names[kind]}"] = Delta(a.astype(np.float32), b.astype(np.float32))
    return LowRank("random", "lora", modules)


@pytest.mark.parametrize(
    ("arch", "kind"), [*((arch, "plain") for arch in SAME_MODULES), ("llama", "rslora"), ("llama", "patterns")]
)
def test_llama_cpp_computes_what_torch_computed(
    arch: str,
    kind: str,
    tiny_gguf: Callable[[str], Path],
    tune: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    tuned, base = tune(arch, kind), tiny_gguf(arch)
    folded = fold_peft(tuned.folder, "command")
    write_adapter(folded, base, tmp_path / "adapter.gguf", base_fingerprint=FINGERPRINT)
    write_merged(merge(folded, weights_in(base)), Source(base, ""), tmp_path / "merged.gguf")
    engine = open_engine(base, tmp_path / "adapter.gguf")
    assert compare(tuned.adapted, engine, rows).kl <= 1e-5
    assert compare(tuned.plain, engine, rows).kl > 0.05
    assert compare(tuned.adapted, open_engine(tmp_path / "merged.gguf"), rows).kl <= 1e-5
    engine.activate({})
    assert compare(tuned.plain, engine, rows).kl <= 1e-5


def test_the_file_says_what_it_is(tiny_gguf: Callable[[str], Path], tune: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    folded = fold_peft(tune("llama", "patterns").folder, "command")
    write_adapter(folded, tiny_gguf("llama"), out, base_fingerprint="ab" * 32)
    header = read_header(out)
    assert header.metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "command",
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
        "edgetune.base_fingerprint": "ab" * 32,
        "edgetune.method": "lora",
    }
    assert len(header.tensors) == 2 * len(folded.modules)
    assert header.tensors["blk.1.ffn_up.weight.lora_a"].shape == (64, 12)


def test_the_same_adapter_gives_the_same_bytes(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    for name in ("first", "second"):
        write_adapter(random_adapter(base), base, tmp_path / name, base_fingerprint=FINGERPRINT)
    assert sha256_of(tmp_path / "first") == sha256_of(tmp_path / "second")


def test_q8_0_is_used_where_columns_allow(
    tiny_gguf: Callable[[str], Path],
    tune: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    tuned, base, out = tune("llama"), tiny_gguf("llama"), tmp_path / "adapter.gguf"
    folded = fold_peft(tuned.folder, "command")
    write_adapter(folded, base, out, dtype="q8_0", base_fingerprint=FINGERPRINT)
    kinds = {(tensor.name[-1], tensor.type.name) for tensor in read_header(out).tensors.values()}
    assert kinds == {("a", "q8_0"), ("b", "f16")}
    assert compare(tuned.adapted, open_engine(base, out), rows).kl < 1e-3
    folded = random_adapter(base, rank=32)
    write_adapter(folded, base, out, dtype="q8_0", base_fingerprint=FINGERPRINT)
    assert {tensor.type.name for tensor in read_header(out).tensors.values()} == {"q8_0"}


@pytest.mark.parametrize(("rank", "stored", "types"), [(15, 15, ("f16", "f32")), (16, 32, ("q8_0", "q8_0"))])
def test_an_adapter_is_written_in_the_types_that_llama_cpp_multiplies_fastest(
    rank: int,
    stored: int,
    types: tuple[str, str],
    tiny_gguf: Callable[[str], Path],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    base, adapter = tiny_gguf("llama"), random_adapter(tiny_gguf("llama"), rank=rank)
    logits = {}
    for dtype in ("auto", "f32"):
        write_adapter(adapter, base, tmp_path / dtype, dtype=dtype, base_fingerprint=FINGERPRINT)
        engine = open_engine(base, tmp_path / dtype)
        logits[dtype] = engine.decode(rows[0])
    tensors = read_header(tmp_path / "auto").tensors
    assert {(name[-1], tensor.type.name) for name, tensor in tensors.items()} == {*zip("ab", types, strict=True)}
    assert {tensor.shape[0] for name, tensor in tensors.items() if name[-1] == "b"} == {stored}
    assert np.abs(logits["auto"] - logits["f32"]).max() < 0.02 * np.abs(logits["f32"]).max()


def test_values_beyond_f16_need_f32(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base, out = tiny_gguf("llama"), tmp_path / "adapter.gguf"
    adapter = LowRank("command", "lora", {"model.layers.0.mlp.up_proj": ones(4, 128, 64, value=7e4)})
    for dtype in ("f16", "q8_0"):
        with pytest.raises(VerificationError, match=r"ffn_up.*dtype: f32"):
            write_adapter(adapter, base, out, dtype=dtype, base_fingerprint=FINGERPRINT)
    assert not list(tmp_path.iterdir())
    write_adapter(adapter, base, out, dtype="f32", base_fingerprint=FINGERPRINT)
    assert {tensor.type.name for tensor in read_header(out).tensors.values()} == {"f32"}


@pytest.mark.parametrize("write", ["adapter", "merged"])
def test_an_adapter_of_another_base_is_refused_with_both_shapes(
    write: str, tiny_gguf: Callable[[str], Path], wide: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tiny_gguf("llama"))
    with pytest.raises(IncompatibleError, match=r"_proj is 64x\d+ in the adapter, 256x\d+ in the base|and \d+ more"):
        if write == "adapter":
            write_adapter(adapter, wide, tmp_path / "out", base_fingerprint=FINGERPRINT)
        else:
            write_merged(merge(adapter, weights_in(wide)), Source(wide, ""), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "delta", "what"),
    [
        ("model.layers.2.mlp.up_proj", ones(4, 128, 64), "no tensor for model.layers.2.mlp.up_proj"),
        ("model.vision_tower.layers.0.mlp.fc1", ones(4, 128, 64), "no tensor for model.vision_tower"),
        ("model.layers.0.input_layernorm", ones(4, 64, 1), "input_layernorm is not a linear layer"),
        ("model.embed_tokens", ones(4, 384, 64), "embed_tokens is not a linear layer"),
        ("lm_head", ones(4, 384, 64), "lm_head .its output layer is its token embedding"),
    ],
)
def test_modules_that_the_base_cannot_adapt_are_named(
    module: str, delta: Delta, what: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = LowRank("command", "lora", {module: delta})
    with pytest.raises(IncompatibleError, match=what):
        write_adapter(adapter, tiny_gguf("llama"), tmp_path / "out", base_fingerprint=FINGERPRINT)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapted_output_layer_works_where_the_base_has_one(
    tiny_gguf: Callable[[str], Path],
    tiny_folder: Callable[[str], Path],
    save_random_adapter: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["lm_head"]}
    tuned = save_random_adapter(tiny_folder("qwen2"), tmp_path / "peft", options)
    folded = fold_peft(tuned.folder, "command")
    write_adapter(folded, tiny_gguf("qwen2"), tmp_path / "adapter.gguf", base_fingerprint=FINGERPRINT)
    engine = open_engine(tiny_gguf("qwen2"), tmp_path / "adapter.gguf")
    assert compare(tuned.adapted, engine, rows).kl <= 1e-5
    assert compare(tuned.plain, engine, rows).kl > 0.05


def write_one_matrix(
    out: Path, arch: str, values: npt.NDArray[Any], kind: gguf.GGMLQuantizationType | None = None
) -> Path:
    """A GGUF file with one layer that has one matrix."""
    writer = gguf.GGUFWriter(out, arch)
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    base = write_one_matrix(tmp_path / "base.gguf", "bloom", np.zeros((64, 64), np.float16))
    adapter = LowRank("command", "lora", {"model.layers.0.mlp.up_proj": ones(4, 64, 64)})
    with pytest.raises(IncompatibleError, match=r"'bloom'.*gemma3, .*llama, .*qwen2, qwen3"):
        write_adapter(adapter, base, tmp_path / "out", base_fingerprint=FINGERPRINT)


def test_an_adapter_without_modules_is_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="changes no module"):
        write_merged(Merged("command", "lora", {}), Source(tiny_gguf("llama"), ""), tmp_path / "out")


def test_a_merged_parameter_with_no_tensor_or_another_shape_is_named(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    wrong = {"model.layers.9.mlp.up_proj.weight": "no tensor for", "model.norm.weight": "is .64,. in"}
    for parameter, what in wrong.items():
        merged = Merged("command", "full", {parameter: lambda: np.zeros((3, 3), np.float32)})
        with pytest.raises(IncompatibleError, match=what):
            write_merged(merged, Source(tiny_gguf("llama"), ""), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_merging_changes_only_the_adapted_tensors(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base, out = tiny_gguf("llama"), tmp_path / "merged.gguf"
    adapter = LowRank("command", "lora", {"model.layers.0.mlp.up_proj": ones(4, 128, 64)})
    digest = sha256_of(base)
    write_merged(merge(adapter, weights_in(base), 0.5), Source(base, ""), out)
    tensor = read_header(base).tensors["blk.0.ffn_up.weight"]
    before, after = base.read_bytes(), out.read_bytes()
    end = tensor.offset + tensor.nbytes
    assert (before[: tensor.offset], before[end:]) == (after[: tensor.offset], after[end:])
    old = np.frombuffer(before[tensor.offset : end], np.float16).astype(np.float32)
    new = np.frombuffer(after[tensor.offset : end], np.float16).astype(np.float32)
    np.testing.assert_allclose(new - old, 0.5 * 4 * 0.1 * 0.1, atol=1e-3)
    assert sha256_of(base) == digest


@pytest.mark.parametrize(
    ("quantization", "noise"),
    [
        ("bf16", 2e-4),
        ("q8_0", 0.003),
        ("q6_k", 0.015),
        ("q5_k_m", 0.05),
        ("q4_k_m", 0.15),
        ("q4_1", 0.15),
        ("q4_0", 0.15),
    ],
)
def test_merging_into_a_quantized_base_is_the_adapter_but_for_rounding(
    quantization: str,
    noise: float,
    wide: Path,
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    base, adapter = tmp_path / "base.gguf", random_adapter(wide, std=0.08)
    quantize_gguf(wide, base, quantization)
    write_adapter(adapter, base, tmp_path / "adapter.gguf", base_fingerprint=FINGERPRINT)
    write_merged(merge(adapter, weights_in(base)), Source(base, ""), tmp_path / "merged.gguf")
    assert read_header(tmp_path / "merged.gguf") == read_header(base)
    switched, merged = open_engine(base, tmp_path / "adapter.gguf"), open_engine(tmp_path / "merged.gguf")

    def with_adapter(tokens: list[int]) -> np.ndarray:
        switched.truncate(0)
        return np.array(switched.decode_all(tokens))

    assert compare(with_adapter, merged, rows).kl < noise
    assert compare(with_adapter, open_engine(base), rows).kl > 0.3


def test_a_type_that_needs_an_importance_matrix_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    base = write_one_matrix(tmp_path / "base.gguf", "llama", np.zeros((4, 66), np.uint8), kind)
    adapter = LowRank("command", "lora", {"model.layers.0.mlp.up_proj": ones(2, 4, 256)})
    with pytest.raises(IncompatibleError, match="iq2_xxs"):
        write_merged(merge(adapter, weights_in(base)), Source(base, ""), tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(wide: Path, small_disk: Path) -> None:
    with pytest.raises(OutOfSpaceError, match="free some space"):
        write_merged(merge(random_adapter(wide), weights_in(wide)), Source(wide, ""), small_disk / "merged.gguf")
    with pytest.raises(OutOfSpaceError, match="free some space"):
        write_adapter(random_adapter(wide, rank=512), wide, small_disk / "adapter.gguf", base_fingerprint=FINGERPRINT)
    assert not list(small_disk.iterdir())

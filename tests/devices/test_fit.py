from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from edgetune_devices import boards, fit
from edgetune_devices.needs import needs_of_header
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_runtime.bundle import AdapterEntry, BaseEntry, FileEntry, Manifest
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.needs import recurrent_sizes
from edgetune_runtime.engines.needs import MB, AdapterSize, Needs
from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader, TensorInfo, read_header
from edgetune_runtime.formats.gguf_sizes import kv_values_per_token
from edgetune_runtime.formats.quantization import QUANTIZATIONS, repacked_types
from edgetune_runtime.sizing.needs import items_of, needed_mb, needs_of_bundle
from edgetune_runtime.sizing.options import with_options
from edgetune_runtime.threads.machine import instructions
from runtime.gguf_files import UINT32, rewritten, setting

from edgetune.building.fit_target import read_target

TINY = ("llama", "qwen2", "qwen3", "gemma3", "gemma4", "lfm2")


def _header(layers: int, width: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> GgufHeader:
    """The header that a published model has as f16, with its embedding tied to its head and heads 64 wide."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, vocabulary), "output_norm.weight": (width,)}
    for layer in range(layers):
        parts = {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_q": (width, heads * 64),
            "attn_k": (width, kv_heads * 64),
            "attn_v": (width, kv_heads * 64),
            "attn_output": (heads * 64, width),
            "ffn_gate": (width, inner),
            "ffn_up": (width, inner),
            "ffn_down": (inner, width),
        }
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": width,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
    }
    return GgufHeader(metadata, {name: TensorInfo(name, shape, 1, 4_000_000, 0) for name, shape in shapes.items()})


QWEN_0_5B = _header(24, 896, 4864, 14, 2, 151936)
LLAMA_1B = _header(16, 2048, 8192, 32, 8, 128256)


@pytest.mark.parametrize("arch", TINY)
def test_kv_values_per_token_are_those_that_the_engine_saves(tiny_gguf: Callable[[str], Path], arch: str) -> None:
    engine = GgufEngine(tiny_gguf(arch), context_length=256, threads=1)
    try:
        engine.decode([5])
        short = len(engine.save_state())
        # Fewer tokens than the sliding window: a saved state leaves out what lies before it, memory does not.
        engine.decode(list(range(10, 20)))
        grown = len(engine.save_state()) - short
    finally:
        engine.close()
    if arch == "lfm2":
        assert short > recurrent_sizes(read_header(tiny_gguf(arch))).state_bytes > 0
    # Each cell has a position, a count of sequences and a sequence; sliding-window layers have cells of their own.
    cell_bytes = 24 if arch.startswith("gemma") else 12
    assert grown == 10 * (2 * kv_values_per_token(read_header(tiny_gguf(arch))) + cell_bytes)


def test_keys_and_values_of_layers_that_differ_are_summed() -> None:
    metadata = {**QWEN_0_5B.metadata, "llama.attention.head_count_kv": (2,) * 20 + (1,) * 4}
    header = replace(QWEN_0_5B, metadata=metadata)
    assert kv_values_per_token(header) == 44 * 128


@pytest.mark.parametrize("arch", TINY)
def test_needs_of_a_file_count_its_bytes_and_leave_out_an_untied_embedding(
    tiny_gguf: Callable[[str], Path], arch: str
) -> None:
    path = tiny_gguf(arch)
    header = read_header(path)
    needs = needs_of_header(header, context_length=128)
    assert needs.base_bytes == pytest.approx(path.stat().st_size, rel=0.01)
    everything = sum(tensor.nbytes for tensor in header.tensors.values())
    embedding = {"qwen2": "token_embd.weight", "gemma4": PER_LAYER_EMBEDDING}.get(arch)
    looked_up = header.tensors[embedding].nbytes if embedding else 0
    assert needs.read_bytes == everything - looked_up
    dropped = {item.name: item.droppable_mb for item in items_of(needs, repacks=())}
    assert dropped.get("embedding for the inputs of each layer", 0) * 1e6 == (looked_up if arch == "gemma4" else 0)
    assert needs.layers == sum(name.endswith("attn_norm.weight") for name in header.tensors)


@pytest.mark.parametrize(
    ("arch", "quantization"),
    [("llama", name) for name in (*QUANTIZATIONS, "q5_0+q4_0", "iq4_nl+iq4_nl")]
    + [(arch, name) for arch in ("gemma4", "lfm2") for name in ("q4_0", "q8_0")],
)
def test_predicted_size_of_a_quantization_is_that_of_the_quantized_file(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, arch: str, quantization: str
) -> None:
    out = tmp_path / "out.gguf"
    quantize_gguf(tiny_gguf(arch), out, quantization)
    needs = needs_of_header(read_header(tiny_gguf(arch)), context_length=128, quantization=quantization)
    assert needs.base_bytes == pytest.approx(out.stat().st_size, rel=0.03)


@pytest.mark.parametrize(("arch", "width"), [("llama", 96), ("llama", 256), ("phi3", 256)])
def test_predicted_sizes_follow_the_layers_to_which_llama_cpp_gives_more_bits(
    arch: str,
    width: int,
    tiny_folder: Callable[[str], Path],
    convert: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Before the sizes change, because other tests use this folder.
    tokenizer = tiny_folder(arch) / "tokenizer.model"
    model, config, own = tiny.MODELS[arch]
    sizes = {"num_hidden_layers": 8, "num_key_value_heads": 1, "intermediate_size": width}
    monkeypatch.setitem(tiny.MODELS, arch, (model, config, {**own, **sizes}))
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    convert(tiny.make_folder(arch, tmp_path / "base", tokenizer, hidden_size=width), base)
    for quantization in ("iq4_nl", "iq4_xs", "q3_k_m", "q4_k_m", "q5_k_m"):
        quantize_gguf(base, out, quantization)
        needs = needs_of_header(read_header(base), context_length=128, quantization=quantization)
        assert needs.base_bytes == pytest.approx(out.stat().st_size, rel=1e-3)
        assert {*needs.layer_types} >= {*read_header(out).layer_types}


@pytest.mark.parametrize(
    ("header", "quantization", "published_mb"),
    [(QWEN_0_5B, "q4_k_m", 398), (QWEN_0_5B, "q5_k_m", 420), (QWEN_0_5B, "q8_0", 531), (QWEN_0_5B, "q3_k_m", 355)],
)
def test_predicted_sizes_are_those_of_published_files(header: GgufHeader, quantization: str, published_mb: int) -> None:
    needs = needs_of_header(header, context_length=128, quantization=quantization)
    assert needs.base_bytes / 1e6 == pytest.approx(published_mb, rel=0.02)


@pytest.mark.parametrize(
    ("board", "header", "quantization", "published", "margin"),
    [
        ("pi-4", QWEN_0_5B, "q4_0", 9.8, 0.05),
        ("pi-4", LLAMA_1B, "q4_0", 4.6, 0.05),
        ("pi-4", QWEN_0_5B, "q4_k_m", 9.2, 0.1),
        ("pi-4", LLAMA_1B, "q4_k_m", 4.5, 0.1),
        ("pi-5", QWEN_0_5B, "q4_k_m", 20.4, 0.15),
        ("pi-5", QWEN_0_5B, "q4_k_m", 25.77, 0.15),
        ("pi-5", QWEN_0_5B, "q8_0", 17.45, 0.05),
        ("pi-5", QWEN_0_5B, "q8_0", 19.87, 0.15),
        ("pi-5", LLAMA_1B, "q4_k_m", 11.2, 0.15),
    ],
)
def test_decode_prediction_is_near_published_figures(
    board: str, header: GgufHeader, quantization: str, published: float, margin: float
) -> None:
    needs = needs_of_header(header, context_length=256, quantization=quantization)
    assert fit.fit(needs, boards.load(board)).speed.decode_tokens_per_s == pytest.approx(published, rel=margin)


@pytest.mark.parametrize(("header", "published"), [(QWEN_0_5B, 27.5), (LLAMA_1B, 11.4)])
def test_prefill_prediction_is_near_published_figures(header: GgufHeader, published: float) -> None:
    needs = needs_of_header(header, context_length=512, quantization="q4_0")
    assert fit.fit(needs, boards.load("pi-4")).speed.prefill_tokens_per_s == pytest.approx(published, rel=0.15)


MEASURE = """
import sys
from pathlib import Path
from edgetune_runtime.engines.gguf.engine import GgufEngine
engine = GgufEngine(Path(sys.argv[1]), context_length=128, threads=1, repack=sys.argv[2] == "repacked")
engine.decode([3 + number % 300 for number in range(120)])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def smollm2_q4_0(smollm2: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """SmolLM2-135M in q4_0, which takes seconds to quantize."""
    return once("smollm2-q4_0.gguf", lambda out: quantize_gguf(smollm2, out, "q4_0", again=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("weights", ["mapped", "repacked"])
def test_predicted_memory_is_within_a_tenth_of_what_a_run_takes(weights: str, smollm2_q4_0: Path) -> None:
    path = smollm2_q4_0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", MEASURE, str(path), weights]
    measured = subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout
    repacks = repacked_types(instructions()) if weights == "repacked" else ()
    needs = needs_of_header(read_header(path), context_length=128)
    assert needed_mb(needs, repacks=repacks) == pytest.approx(int(measured) * 1024 / 1e6, rel=0.1)


def test_an_embedding_is_counted_twice_where_it_is_also_a_repacked_head(smollm2: Path) -> None:
    header = read_header(smollm2)
    needs = needs_of_header(header, context_length=512, quantization="q4_0")
    assert (needs.main_type, needs.head_type) == ("q4_0", "q8_0")
    plain, x86, arm, amx = (
        needed_mb(needs, repacks=repacked_types(sets))
        for sets in ((), ("avx2", "avx512f"), ("neon", "dotprod"), ("avx2", "amx-int8"))
    )
    assert plain == x86
    assert arm - plain == amx - plain == pytest.approx(needs.head_bytes / 1e6)
    # Its rows are too narrow for q4_k.
    assert needs_of_header(header, context_length=512, quantization="q4_k_m").main_type == "q5_0"
    assert needs_of_header(header, context_length=512, quantization="q6_k").layer_types == ("q6_k", "q8_0")
    fine = needs_of_header(header, context_length=512, quantization="q8_0")
    mapped = needed_mb(fine, repacks=())
    assert needed_mb(fine, repacks=repacked_types(["dotprod"])) == mapped, "weights in q8_0 are mapped"


def test_an_adapter_costs_memory_and_speed(smollm2: Path) -> None:
    header = read_header(smollm2)
    size = AdapterSize(9_768_960, 210)
    board = boards.load("laptop")
    plain = fit.fit(needs_of_header(header, context_length=512), board)
    needs = replace(needs_of_header(header, context_length=512), adapters={"command": size})
    result = fit.fit(needs, board)
    states_mb = 2 * 256 * 2 * kv_values_per_token(header) / MB
    assert result.needed_mb - plain.needed_mb == pytest.approx(size.file_bytes / MB + states_mb)
    assert result.speed.decode_tokens_per_s == plain.speed.decode_tokens_per_s
    assert result.speed.adapter_tokens_per_s / plain.speed.decode_tokens_per_s == pytest.approx(0.54, abs=0.05)


def test_adapters_take_no_more_than_their_limit(smollm2: Path) -> None:
    header = read_header(smollm2)
    many = {f"a{number}": AdapterSize(1_000_000, 210) for number in range(300)}
    needs = with_options(replace(needs_of_header(header, context_length=512), adapters=many), adapters_mb=40)
    items = {item.name: item.mb for item in fit.fit(needs, boards.load("laptop")).items if "adapter" in item.name}
    assert items == {"adapters in memory, of 300 MB": 40}


def test_require_fit_says_sum_board_largest_part_and_remedy() -> None:
    needs = needs_of_header(LLAMA_1B, context_length=1024, quantization="q8_0")
    with pytest.raises(IncompatibleError) as caught:
        fit.require_fit(needs, boards.load("pi-zero-2w"))
    text = str(caught.value)
    needed = fit.fit(needs, boards.load("pi-zero-2w")).kept_mb
    assert f"needs {needed:.0f} MB, but pi-zero-2w leaves 305 MB" in text
    assert "largest part is base weights" in text
    assert "quantize the base further" in text


def test_require_fit_names_the_context_that_would_fit(smollm2: Path) -> None:
    header = read_header(smollm2)
    board = boards.load("pi-zero-2w")
    with pytest.raises(IncompatibleError, match=r"set context_length to \d+ or less") as caught:
        fit.require_fit(needs_of_header(header, context_length=8192), board)
    tokens = int(str(caught.value).split("context_length to ")[1].split()[0])
    assert fit.require_fit(needs_of_header(header, context_length=tokens), board).fits


def choose(name: str | boards.Board, header: GgufHeader, **given: Any) -> fit.BoardChoice:  # noqa: ANN401 - options of choose
    def needs_of(quantization: str | None, context_length: int) -> Needs:
        return needs_of_header(header, quantization=quantization, context_length=context_length)

    return fit.choose(name if isinstance(name, boards.Board) else boards.load(name), needs_of, **given)


def test_a_better_board_is_given_a_better_quantization() -> None:
    chosen = [choose(name, LLAMA_1B) for name in ("pi-4", "pi-5")]
    assert [choice.usable[0] for choice in chosen] == ["q4_0", "q8_0"]
    assert [choice.context_length for choice in chosen] == [1024, 1024]
    assert "though below 5 tokens/s" in chosen[0].reason
    assert chosen[1].reason.startswith("q8_0 with a context of 1024 tokens is the best that fits on pi-5")
    with pytest.raises(IncompatibleError, match="pi-zero-2w leaves"):
        choose("pi-zero-2w", LLAMA_1B)


def test_choose_keeps_what_the_recipe_sets() -> None:
    # None is a base that ships as it is.
    for quantization in ("q4_0", None):
        choice = choose("pi-5", QWEN_0_5B, quantizations=[quantization], context_lengths=[2048])
        assert (choice.usable, choice.context_length) == ([quantization], 2048)


def test_choose_shortens_the_context_before_it_gives_up() -> None:
    header = _header(30, 576, 1536, 9, 3, 49152)
    shortest = needs_of_header(header, context_length=256, quantization="q4_0")
    roomless = replace(
        boards.load("pi-4"), ram_free_mib=int(fit.fit(shortest, boards.load("pi-4")).kept_mb * 1e6 / 2**20) + 1
    )
    assert choose(roomless, header).context_length == 256
    with pytest.raises(IncompatibleError, match="leaves 10 MB"):
        choose(replace(roomless, ram_free_mib=10), header)


def _bundle(folder: Path, base: Path, shape: str = "low_rank") -> Path:
    """A bundle's manifest around a base; adapter files are named with their sizes but not written."""
    (folder / "base").mkdir(parents=True)
    os.link(base, folder / "base" / "model.gguf")
    digest = "0" * 64
    adapter_bytes = base.stat().st_size if shape == "merged" else 3 * 2**20
    entry = AdapterEntry(
        "intent",
        "lora",
        {"gguf": shape},
        {"gguf": "adapters/intent/adapter.gguf"},
        digest,
        {8: 14},
    )
    manifest = Manifest(
        name="home",
        base=BaseEntry("tiny", digest, "llama", "f16", 1, 512, 2, 1, digest, digest, {"gguf": "base/model.gguf"}),
        adapters={"intent": entry},
        files={
            "base/model.gguf": FileEntry(digest, base.stat().st_size),
            "adapters/intent/adapter.gguf": FileEntry(digest, adapter_bytes),
        },
        context_length=512,
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def test_needs_of_a_bundle_hold_its_context_and_adapters(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", tiny_gguf("llama"))
    needs = needs_of_bundle(bundle)
    assert needs.context_length == 512
    assert needs.adapters == {"intent": AdapterSize(3 * 2**20, 14)}
    assert needs_of_bundle(bundle, context_length=128).context_length == 128


def test_a_merged_adapter_is_a_second_model(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    needs = needs_of_bundle(_bundle(tmp_path / "bundle", tiny_gguf("llama"), "merged"))
    result = fit.fit(needs, boards.load("pi-4"))
    merged = next(item for item in result.items if item.name == "merged model intent")
    assert merged.mb * MB > needs.base_bytes
    assert not needs.adapters


@pytest.mark.parametrize("key", ["lfm2.attention.head_count_kv", "qwen35.attention.recurrent_layers"])
def test_a_number_in_place_of_one_per_layer_is_damage(
    key: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewritten(tiny_gguf(key.partition(".")[0]), tmp_path / "base.gguf", setting(key, 2, UINT32))
    for target in (path, _bundle(tmp_path / "bundle", path)):
        with pytest.raises(VerificationError, match=f"{key} is '2', not an array, each item a whole number from 0 to"):
            read_target(target, None, None)


def test_nothing_is_predicted_for_a_base_in_a_format_that_cannot_hold_it(tiny_gguf: Callable[[str], Path]) -> None:
    with pytest.raises(IncompatibleError, match="onnx does not support bases of architecture 'olmo2'"):
        read_target(tiny_gguf("olmo2"), None, "onnx")


def test_a_folder_that_is_no_bundle_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a bundle"):
        needs_of_bundle(tmp_path)

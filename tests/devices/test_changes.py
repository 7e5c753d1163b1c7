from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_devices import boards, changes, fit
from edgetune_devices.needs import needs_of_header
from edgetune_runtime.engines.needs import AdapterSize, Needs
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.needs import kept_mb
from edgetune_runtime.sizing.options import with_options
from edgetune_runtime.sizing.speed import speed_of

ADAPTERS = {"command": AdapterSize(5_000_000, 210), "reply": AdapterSize(9_000_000, 210)}


@pytest.fixture
def header(tiny_gguf: Callable[[str], Path]) -> GgufHeader:
    return read_header(tiny_gguf("llama"))


def _needs(header: GgufHeader, **sizes: int) -> Needs:
    """The needs of a base as large as SmolLM2-135M, with two adapters."""
    needs = needs_of_header(header, context_length=2048, quantization="q8_0")
    needs = replace(needs, adapters=ADAPTERS, head_lengths=(64, 64))
    large = {"base_bytes": 145_000_000, "read_bytes": 145_000_000, "read_parameters": 134_000_000, "layers": 30}
    return replace(needs, **{**large, "kv_values_per_token": 11520, "vocabulary": 49152, **sizes})


def _with_free_mb(mb: float) -> boards.Board:
    return replace(boards.load("pi-4"), ram_free_mib=int(mb * 1e6 / 2**20))


def test_nothing_is_proposed_for_what_fits(header: GgufHeader) -> None:
    assert changes.changes_for(_needs(header), boards.load("pi-4")) == []


def test_the_cheapest_change_that_suffices_is_the_only_one(header: GgufHeader) -> None:
    needs = _needs(header)
    short_by_a_little = _with_free_mb(kept_mb(needs, repacks=()) - 5)
    (change,) = changes.changes_for(needs, short_by_a_little)
    assert change.what == "limit saved states: --cache-mb 16"
    assert change.fits and change.saves_mb == pytest.approx(needs.state_bytes / 1e6 - 16)
    assert change.needed_mb == pytest.approx(kept_mb(needs, repacks=()) - change.saves_mb)


def test_the_other_engine_costs_nothing_and_comes_first(header: GgufHeader) -> None:
    onnx = replace(_needs(header), engine="onnx")
    gguf = _needs(header)
    board = _with_free_mb(kept_mb(gguf, repacks=()) + 5)
    assert [change.what for change in changes.changes_for(onnx, board, other=gguf)] == [
        "use the other engine: --engine gguf"
    ]
    assert all("engine" not in change.what for change in changes.changes_for(gguf, _with_free_mb(250), other=onnx))


def test_keys_and_values_in_8_bits_are_not_halved_again(header: GgufHeader) -> None:
    for kv, proposed in (("f16", True), ("q8_0", False)):
        found = changes.changes_for(with_options(_needs(header), kv=kv), _with_free_mb(1))
        assert any("--kv q8_0" in change.what for change in found) == proposed


def test_keys_and_values_in_8_bits_are_proposed_only_where_llama_cpp_has_them(header: GgufHeader) -> None:
    needs = _needs(header)
    prefix = replace(needs, adapters={**needs.adapters, "prefix": AdapterSize(5_000_000, 0, is_prefix=True)})
    for other in (replace(needs, head_lengths=(80, 80)), prefix):
        assert not any("--kv" in change.what for change in changes.changes_for(other, _with_free_mb(1)))


def test_each_change_adds_to_those_before_it_until_the_board_fits(header: GgufHeader) -> None:
    needs = _needs(header)
    short = replace(needs, cache_mb=16, kv="q8_0", context_length=1000)
    found = changes.changes_for(needs, _with_free_mb(kept_mb(short, repacks=())))
    assert [change.what.split(":")[0] for change in found] == [
        "limit saved states",
        "store keys and values in 8 bits",
        "shorten the context",
    ]
    assert [change.fits for change in found] == [False, False, True]
    total = kept_mb(needs, repacks=())
    for change in found:
        total -= change.saves_mb
        assert change.needed_mb == pytest.approx(total)
    assert found[-1].adapter_tokens_per_s >= found[0].adapter_tokens_per_s


def test_the_context_proposed_is_the_longest_that_fits(header: GgufHeader) -> None:
    board, needs = _with_free_mb(262), _needs(header, vocabulary=0)
    tokens = changes.longest_context(needs, board)
    assert 256 < tokens < 2048
    assert kept_mb(replace(needs, context_length=tokens), repacks=()) <= board.free_mb
    assert kept_mb(replace(needs, context_length=tokens + 1), repacks=()) > board.free_mb


def test_every_context_up_to_the_longest_fits_and_none_beyond_it(header: GgufHeader) -> None:
    adapters = {name: AdapterSize(1_000_000, 10) for name in "abcdef"}
    needs = _needs(header, kv_values_per_token=49152, context_length=8192, cache_mb=256)
    needs = replace(needs, adapters=adapters)
    lengths = range(256, needs.context_length + 1, 64)
    kept = {tokens: kept_mb(replace(needs, context_length=tokens), repacks=()) for tokens in lengths}
    for free_mb in range(int(kept[512]), int(kept[8192]), 25):
        board = _with_free_mb(free_mb)
        tokens = changes.longest_context(needs, board)
        assert [length for length in lengths if kept[length] <= board.free_mb] == [*range(256, tokens + 1, 64)]


def test_a_smaller_quantization_is_proposed_where_the_header_is_known() -> None:
    layers = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024)}
    metadata = {"general.architecture": "llama", "llama.block_count": 16, "llama.embedding_length": 1024}
    metadata |= {"llama.feed_forward_length": 4096}
    metadata |= {"llama.attention.head_count": 16, "llama.attention.head_count_kv": 4}
    names = [f"blk.{layer}.attn_{name}.weight" for layer in range(16) for name in layers]
    tensors = {name: TensorInfo(name, (1024, 4096), 8, 0, 1024 * 4096 * 34 // 32) for name in names}
    header = GgufHeader(metadata, tensors)
    needs = needs_of_header(header, context_length=256)
    board = _with_free_mb(kept_mb(needs, repacks=()) - 60)
    last = changes.changes_for(needs, board, header=header)[-1]
    assert (last.what, last.fits) == ("build with quantization: q5_k_m", True)


def test_adapters_that_save_memory_only_together_are_left_out_together(header: GgufHeader) -> None:
    adapters = {name: AdapterSize(mb * 1_000_000, 10) for name, mb in (("a", 200), ("b", 190), ("c", 180), ("d", 150))}
    needs = replace(_needs(header, context_length=256, cache_mb=0), adapters=adapters)
    found = changes.changes_for(replace(needs, kv="q8_0"), _with_free_mb(1))
    left_out = {change.what: round(change.saves_mb) for change in found if "adapter" in change.what}
    assert left_out == {"leave out adapters a and b and c": 256 - 150}
    needs = replace(needs, adapters_mb=400)
    found = changes.changes_for(needs, _with_free_mb(kept_mb(needs, repacks=()) - 220))
    left_out = {change.what: round(change.saves_mb) for change in found if "adapter" in change.what}
    assert left_out == {"leave out adapters a and b": 400 - 330, "leave out adapter c": 180}


def test_a_larger_size_of_the_same_board_is_proposed_last(header: GgufHeader) -> None:
    huge = _needs(header, base_bytes=3_000_000_000)
    last = changes.changes_for(huge, boards.load("pi-4-1gb"))[-1]
    assert (last.what, last.fits) == ("use a board with more memory: pi-4-4gb", True)
    assert last.needed_mb == pytest.approx(kept_mb(huge, repacks=()))


def test_a_limit_is_raised_where_the_board_has_the_memory(header: GgufHeader) -> None:
    needs, board = _needs(header, base_bytes=1_000_000_000), boards.load("pi-4")
    last = changes.changes_for(needs, board, limit_mb=500)[-1]
    raised = int(last.what.removeprefix("raise the limit: --limit-mb "))
    assert fit.fit(needs, board.limited(raised)).fits
    assert not fit.fit(needs, board.limited(raised - 3)).fits
    last = changes.changes_for(replace(needs, base_bytes=5_000_000_000), board, limit_mb=500)[-1]
    assert last.what.startswith("use a board with more memory: pi-4-8gb, and raise the limit: --limit-mb 5")


def test_a_larger_size_is_proposed_for_a_copy_of_a_board_file(header: GgufHeader) -> None:
    board = replace(boards.load("pi-4"), name="my-board")
    last = changes.changes_for(_needs(header, base_bytes=5_000_000_000), board)[-1]
    assert (last.what, last.fits) == ("use a board with more memory: --ram-mib 8192", True)


def test_each_engine_has_the_speed_that_was_measured_with_it(header: GgufHeader) -> None:
    gguf = _needs(header)
    onnx = replace(gguf, engine="onnx")
    board = _with_free_mb(kept_mb(gguf, repacks=()) + 5)
    slow, fast = (SpeedFigures(speed, 100, 10, 10, speed) for speed in (1.0, 10.0))
    for figures, known in (({"onnx": slow, "gguf": fast}, True), ({"onnx": slow}, False)):
        (change,) = changes.changes_for(onnx, board, other=gguf, figures=figures)
        assert change.adapter_tokens_per_s == (
            pytest.approx(speed_of(gguf, fast).adapter_tokens_per_s) if known else None
        )

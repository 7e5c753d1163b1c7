"""A step of several tokens rounds like single steps, so that drafts change no answer, not even in a near tie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.ggml import cpu_backend
from edgetune_runtime.engines.gguf.llama import library
from runtime.bundles import low_rank, write_adapter

pytestmark = pytest.mark.skipif(
    "LLAMAFILE" in cpu_backend(library()).features, reason="this llama.cpp was compiled with GGML_LLAMAFILE"
)
SIZES = (2, 3, 4, 5, 8, 9, 16)
PROMPT = list(range(20, 90))
MODULES = [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_q", "attn_output", "ffn_up", "ffn_down")]


def single_steps(engine: GgufEngine, tokens: list[int]) -> np.ndarray:
    return np.concatenate([engine.decode_all([token]) for token in tokens])


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize(("quantization", "repack"), [("f16", False), ("q8_0", False), ("q4_0", False), ("q4_0", True)])
def test_a_step_of_several_tokens_has_the_bits_of_single_steps(
    wide_gguf: Callable[[int], Path], tmp_path: Path, quantization: str, repack: bool, kv: str
) -> None:
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - torch only where needed

    # A head of 32 values, a block of keys and values in 8 bits.
    source, base = wide_gguf(128), tmp_path / "base.gguf"
    quantize_gguf(source, base, quantization)
    adapter = write_adapter(source, tmp_path / "adapter.gguf", low_rank(source, 1, 8, MODULES, 0.1))
    with closing(GgufEngine(base, context_length=200, threads=2, kv=kv, repack=repack)) as engine:
        engine.load_adapter("one", adapter)
        for active in ({}, {"one": 1.0}):
            engine.activate(active)
            for size in SIZES:
                tokens = [(7 * place + size) % 200 + 5 for place in range(size)]
                engine.truncate(0)
                engine.decode(PROMPT)
                # The second step has keys and values of the first.
                found = [engine.decode_all(tokens), engine.decode_all(tokens)]
                engine.truncate(len(PROMPT))
                expected = single_steps(engine, tokens * 2)
                assert np.concatenate(found).tobytes() == expected.tobytes(), (active, size)


def test_near_ties_go_the_same_way_in_a_step_of_several_tokens(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - as above

    base = tmp_path / "ties.gguf"
    quantize_gguf(tiny_gguf("llama"), base, "f32")
    rows = next(tensor for tensor in gguf.GGUFReader(base, "r+").tensors if tensor.name == "token_embd.weight").data
    # Each row of the output matrix, which are also the embeddings, is there twice, but for the last bits.
    rows[1::2] = rows[: len(rows) // 2 * 2 : 2]
    rows[1::2] *= 1 + 1e-6 * np.random.default_rng(0).standard_normal(rows[1::2].shape, np.float32)
    with closing(GgufEngine(base, context_length=200, threads=2)) as engine:
        answer, margins = [int(engine.decode(PROMPT).argmax())], []
        for _ in range(64):
            logits = engine.decode_all(answer[-1:])[0]
            answer.append(int(logits.argmax()))
            margins.append(np.diff(np.sort(logits)[-2:])[0])
        assert max(margins) < 1e-4
        engine.truncate(len(PROMPT))
        steps = [engine.decode_all(answer[start : start + 4]) for start in range(0, 64, 4)]
    assert np.concatenate(steps).argmax(-1).tolist() == answer[1:]

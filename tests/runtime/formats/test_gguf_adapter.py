from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_adapter import INVOCATION_TOKENS, check_adapter
from edgetune_runtime.formats.gguf_file import (
    read_header,
)
from runtime.bundles import low_rank, write_adapter
from runtime.gguf_files import changed

Gguf = Callable[[str], Path]


@pytest.fixture
def base(tiny_gguf: Gguf) -> Path:
    return tiny_gguf("llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(base, tmp_path / "adapter.gguf", low_rank(base, seed=1))


def test_a_sound_adapter_passes(adapter: Path, base: Path) -> None:
    check_adapter(read_header(adapter), read_header(base), "command")


def test_an_adapter_of_another_architecture_is_incompatible(adapter: Path, tiny_gguf: Gguf) -> None:
    with pytest.raises(IncompatibleError, match=r"llama.*qwen3"):
        check_adapter(read_header(adapter), read_header(tiny_gguf("qwen3")), "command")


def write_raw(
    path: Path, tensors: dict[str, np.ndarray], alpha: object = 4.0, kinds: dict[str, int] | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    if isinstance(alpha, np.float64):
        writer.add_float64("adapter.lora.alpha", float(alpha))
    elif isinstance(alpha, float):
        writer.add_float32("adapter.lora.alpha", alpha)
    elif isinstance(alpha, int):
        writer.add_uint32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q = "blk.0.attn_q.weight"


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.ones((rows, columns), np.float32)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({}, VerificationError),
        ({f"{Q}.lora_a": matrix(4, 64)}, VerificationError),
        ({f"{Q}.lora_b": matrix(64, 4)}, VerificationError),
        ({f"{Q}.lora_a": matrix(4, 64), f"{Q}.lora_b": matrix(64, 5)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(64, 4), f"{Q}.lora_b": matrix(4, 64)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(4, 32), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
        ({f"{Q}.lora_a": np.ones((2, 4, 64), np.float32), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
        ({"blk.9.attn_q.weight.lora_a": matrix(4, 64), "blk.9.attn_q.weight.lora_b": matrix(64, 4)}, IncompatibleError),
        ({"output_norm.weight.lora_a": matrix(4, 64), "output_norm.weight.lora_b": matrix(1, 4)}, IncompatibleError),
        ({"output_norm.weight": np.ones(64, np.float32)}, IncompatibleError),
        ({"lora_a": matrix(4, 64), "lora_b": matrix(64, 4)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(4, 64).astype(np.float64), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
    ],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused(
    tensors: dict[str, np.ndarray], error: type[Exception], base: Path, tmp_path: Path
) -> None:
    header = read_header(write_raw(tmp_path / "a.gguf", tensors))
    with pytest.raises(error, match="'command'"):
        check_adapter(header, read_header(base), "command")


def test_an_adapter_in_a_type_that_llama_cpp_cannot_apply_is_refused(base: Path, tmp_path: Path) -> None:
    a = gguf.quants.quantize(matrix(4, 64), gguf.GGMLQuantizationType.Q4_0)
    path = write_raw(tmp_path / "a.gguf", {f"{Q}.lora_a": a, f"{Q}.lora_b": matrix(64, 4)}, kinds={f"{Q}.lora_a": 2})
    with pytest.raises(IncompatibleError, match="q4_0"):
        check_adapter(read_header(path), read_header(base), "command")


@pytest.mark.parametrize("alpha", [None, 4, np.float64(4), float("nan"), float("inf")])
def test_an_alpha_that_would_abort_llama_cpp_is_refused(alpha: object, base: Path, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_a": matrix(4, 64), f"{Q}.lora_b": matrix(64, 4)}
    header = read_header(write_raw(tmp_path / "a.gguf", tensors, alpha))
    with pytest.raises(VerificationError, match="alpha"):
        check_adapter(header, read_header(base), "command")


def test_the_embedding_takes_its_matrices_the_other_way_round(base: Path, tmp_path: Path) -> None:
    columns, rows = read_header(base).tensors["token_embd.weight"].shape
    name = "token_embd.weight"
    right = {f"{name}.lora_a": matrix(rows, 4), f"{name}.lora_b": matrix(columns, 4)}
    check_adapter(read_header(write_raw(tmp_path / "a.gguf", right)), read_header(base), "command")
    wrong = {f"{name}.lora_a": matrix(4, columns), f"{name}.lora_b": matrix(rows, 4)}
    with pytest.raises(IncompatibleError):
        check_adapter(read_header(write_raw(tmp_path / "b.gguf", wrong)), read_header(base), "command")


@pytest.mark.parametrize("key", ["general.type", "adapter.type"])
def test_a_file_that_is_no_lora_is_refused(key: str, adapter: Path, base: Path) -> None:
    with pytest.raises(VerificationError, match=key):
        check_adapter(changed(read_header(adapter), key, "model"), read_header(base), "command")


@pytest.mark.parametrize("tokens", [7, "7", (-1,), (1.5,), (True,), ("a",)])
def test_invocation_tokens_that_are_none_are_refused(tokens: object, adapter: Path, base: Path) -> None:
    header = changed(read_header(adapter), INVOCATION_TOKENS, tokens)
    with pytest.raises(VerificationError, match="invocation_tokens"):
        check_adapter(header, read_header(base), "command")


LOAD_ALL = """
import sys
from pathlib import Path
from edgetune_runtime import EdgetuneError
from edgetune_runtime.engines.gguf.engine import GgufEngine

loaded = 0
for path in sorted(Path(sys.argv[2]).iterdir()):
    engine = GgufEngine(Path(sys.argv[1]), context_length=32, threads=1)
    try:
        engine.load_adapter("a", path)
        engine.activate({"a": 1.0})
        engine.decode([5, 6, 7])
        loaded += 1
    except EdgetuneError:
        pass
    engine.close()
print(loaded)
"""


def test_flipped_bytes_in_an_adapters_header_never_crash_the_process(adapter: Path, base: Path, tmp_path: Path) -> None:
    data, header, rng = adapter.read_bytes(), read_header(base), random.Random(0)
    start = min(tensor.offset for tensor in read_header(adapter).tensors.values())
    passed = tmp_path / "passed"
    passed.mkdir()
    refused = 0
    for number in range(1500):
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(start)] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.gguf"
        path.write_bytes(flipped)
        try:
            check_adapter(read_header(path), header, "command")
        except (VerificationError, IncompatibleError):
            refused += 1
        else:
            path.rename(passed / f"{number:04}.gguf")
    assert refused > 750
    # What passed has to be harmless: llama.cpp loads it, or says no, in a process of its own that has to survive.
    command = [sys.executable, "-c", LOAD_ALL, str(base), str(passed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 0

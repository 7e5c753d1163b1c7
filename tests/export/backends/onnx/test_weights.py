from __future__ import annotations

import gguf
import numpy as np
import pytest
from edgetune_export.backends.onnx.weights import BLOCK, PackedWeights, pack, pack_floats, reorder, stack, widen
from edgetune_export.base_file.quantize import dequantize_rows, quantize_rows
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES

NUMBERS = {name: kind.number for name, kind in TENSOR_TYPES.items()}
EXACT = {"q4_0": 4, "q5_0": 8, "q8_0": 8}
NEAR = ("q4_1", "q5_1", "q4_k", "q5_k", "q6_k", "iq4_nl")


def quantized(kind: str, rows: int = 6, columns: int = 512, seed: int = 0) -> tuple[bytes, TensorInfo, np.ndarray]:
    """Random rows as ggml writes them: their bytes, their description, and gguf's own reading of them."""
    values = np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32)
    values[0, :BLOCK] = 0
    data = quantize_rows(values, NUMBERS[kind])
    tensor = TensorInfo("blk.0.ffn_up.weight", (columns, rows), NUMBERS[kind], 0, len(data))
    raw = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return data, tensor, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.ggml_type))


def unpack(packed: PackedWeights) -> np.ndarray:
    """The numbers that the operator computes with, float32 [rows, columns]."""
    wide = widen(packed)
    levels = wide.data.astype(np.float32) - np.float32(128)
    return (levels * wide.scales[..., None]).reshape(wide.rows, -1)


def packed_of(kind: str, **options: int) -> PackedWeights:
    data, tensor, _ = quantized(kind, **options)
    packed = pack(data, tensor)
    assert packed is not None
    return packed


@pytest.mark.parametrize("kind", EXACT)
def test_blocks_of_one_scale_keep_every_bit(kind: str) -> None:
    data, tensor, expected = quantized(kind)
    packed = pack(data, tensor)
    assert packed is not None
    assert (packed.bits, packed.rows, packed.columns) == (EXACT[kind], 6, 512)
    assert unpack(packed).tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize("kind", EXACT)
def test_every_byte_that_a_block_can_hold_keeps_its_bits(kind: str) -> None:
    assert TENSOR_TYPES[kind].block == BLOCK
    blocks = np.random.default_rng(0).integers(0, 256, (64, 16, TENSOR_TYPES[kind].block_bytes), np.uint8)
    # Scales of either sign and any size that is finite.
    blocks[..., :2] = np.random.default_rng(1).normal(0, 10, (64, 16, 1)).astype(np.float16).view(np.uint8)
    tensor = TensorInfo("w", (16 * BLOCK, 64), NUMBERS[kind], 0, blocks.nbytes)
    packed = pack(blocks.tobytes(), tensor)
    assert packed is not None
    assert unpack(packed).tobytes() == dequantize_rows(blocks.tobytes(), tensor).tobytes()


def test_two_neighbours_share_a_byte_as_the_operator_wants_it() -> None:
    levels = np.arange(BLOCK, dtype=np.uint8) % 16
    # In GGUF weight i shares a byte with weight i + 16.
    data = np.float16(0.5).tobytes() + (levels[:16] | levels[16:] << 4).astype(np.uint8).tobytes()
    packed = pack(data, TensorInfo("w", (BLOCK, 1), NUMBERS["q4_0"], 0, len(data)))
    assert packed is not None
    assert packed.data.tolist() == [[[low | (low + 1) << 4 for low in range(0, 16, 2)] * 2]]
    assert packed.scales.tolist() == [[0.5]]


@pytest.mark.parametrize("kind", NEAR)
def test_other_types_are_off_by_half_an_8_bit_step_at_most(kind: str) -> None:
    data, tensor, expected = quantized(kind)
    packed = pack(data, tensor)
    assert packed is not None
    assert packed.bits == 8
    error = np.abs(unpack(packed) - expected).reshape(6, -1, BLOCK)
    assert (error <= packed.scales[..., None] * 0.5001).all()
    assert error.max() > 0


def test_an_8_bit_step_is_a_fraction_of_the_4_bit_one_it_holds() -> None:
    # A block of q4_1 has 16 levels from its least weight on. The more it leans to one side of zero, the coarser 8 bits
    # around zero are: half a step is 1/34 of q4_1's in the middle, 1/17 where all weights have one sign.
    data, tensor, expected = quantized("q4_1", rows=512)
    packed = pack(data, tensor)
    assert packed is not None
    steps = np.frombuffer(data, np.uint8).reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
    error = np.abs(unpack(packed) - expected).reshape(-1, BLOCK)[1:] / steps[1:]
    assert error.max() < 1 / 17
    assert np.sqrt((error**2).mean()) < 1 / 45


def test_floats_are_rounded_by_the_largest_of_a_block() -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)
    values[1, BLOCK:] = 0
    packed = pack_floats(values)
    assert (packed.bits, packed.columns) == (8, 64)
    largest = np.abs(values.reshape(3, 2, BLOCK)).max(-1)
    np.testing.assert_array_equal(packed.scales, largest / np.float32(127))
    error = np.abs(unpack(packed) - values).reshape(3, 2, BLOCK)
    assert (error <= packed.scales[..., None] * 0.5001).all()
    assert not unpack(packed)[1, BLOCK:].any()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats_stay_floats(kind: str) -> None:
    data, tensor, _ = quantized(kind)
    assert pack(data, tensor) is None


def test_columns_that_32_does_not_divide_stay_floats() -> None:
    # No quantized ggml type has shorter blocks, but a file may say anything.
    assert pack(bytes(18), TensorInfo("w", (48, 1), NUMBERS["q4_0"], 0, 18)) is None


def test_more_bits_keep_the_numbers() -> None:
    packed = packed_of("q4_0")
    wide = widen(packed)
    assert (wide.bits, wide.data.shape) == (8, (6, 16, BLOCK))
    assert unpack(wide).tobytes() == unpack(packed).tobytes()
    assert widen(wide) is wide


def test_rows_and_columns_move_to_where_their_order_says_in_whole_blocks() -> None:
    packed = packed_of("q4_0")
    rows, columns = np.array([3, 1, 5, 0, 2, 4]), np.arange(16 * BLOCK).reshape(2, 8, -1).swapaxes(0, 1).reshape(-1)
    moved = reorder(packed, rows, columns)
    np.testing.assert_array_equal(unpack(moved)[rows][:, columns], unpack(packed))
    assert moved.bits == 4
    np.testing.assert_array_equal(unpack(reorder(packed, None, None)), unpack(packed))
    with pytest.raises(IncompatibleError, match="value heads of 16 columns, which do not fit quantized blocks of 32"):
        reorder(packed, None, np.roll(columns, BLOCK // 2))


@pytest.mark.parametrize(
    ("kinds", "bits"), [(("q4_0", "q4_0"), 4), (("q4_0", "q8_0", "q5_0"), 8), (("q4_0", "q6_k"), 8)]
)
def test_matrices_stack_in_the_bits_of_the_widest(kinds: tuple[str, ...], bits: int) -> None:
    parts = [packed_of(kind, rows=2 + number, seed=number) for number, kind in enumerate(kinds)]
    whole = stack(parts)
    assert (whole.bits, whole.columns) == (bits, 512)
    np.testing.assert_array_equal(unpack(whole), np.concatenate([unpack(part) for part in parts]))

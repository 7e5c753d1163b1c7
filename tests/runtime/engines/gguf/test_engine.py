from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.llama import library
from runtime.bundles import low_rank, write_adapter
from runtime.engines.conftest import log_p
from runtime.interrupting import enter_until

Gguf = Callable[[str], Path]
CONTEXT = 200


def test_a_state_with_impossible_cells_is_refused(tiny_gguf: Gguf) -> None:
    with closing(GgufEngine(tiny_gguf("llama"), context_length=CONTEXT, threads=1)) as engine:
        engine.decode([5, 6])
        state = bytes(engine.save_state())
        # Cells that are not there, at positions outside the context, or of another sequence; more bytes, and fewer.
        changed = [state[:12] + struct.pack("<I", count) + state[16:] for count in (0, 1, 3, 2**31)]
        changed += [state[:16] + struct.pack("<i", position) + state[20:] for position in (-1, CONTEXT)]
        changed += [state[:20] + struct.pack("<ii", *cell) + state[28:] for cell in ((2, 0), (1, 1))]
        for broken in changed:
            with pytest.raises(VerificationError, match="state"):
                engine.restore_state(memoryview(broken))
            assert engine.truncate(5) == 0


def test_keys_and_values_in_8_bits_halve_a_state_and_change_little(wide_gguf: Callable[[int], Path]) -> None:
    base, tokens = wide_gguf(128), list(range(20, 60))
    with (
        closing(GgufEngine(base, context_length=CONTEXT, threads=1)) as whole,
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, kv="q8_0")) as small,
    ):
        expected, found = log_p(whole.decode(tokens)), log_p(small.decode(tokens))
        assert 0 < (np.exp(expected) * (expected - found)).sum() < 1e-3
        assert len(small.save_state()) < 0.6 * len(whole.save_state())
        assert small.signatures[0] != whole.signatures[0]
        with pytest.raises(VerificationError, match="state"):
            small.restore_state(whole.save_state())


def test_repacked_weights_give_the_same_answers_and_have_their_own_states(tiny_gguf: Gguf, tmp_path: Path) -> None:
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - as above

    base, tokens = tmp_path / "q4_0.gguf", list(range(20, 60))
    quantize_gguf(tiny_gguf("llama"), base, "q4_0")
    with (
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, repack=False)) as mapped,
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, repack=True)) as repacked,
        closing(repacked.fork()) as fork,
    ):
        expected, found = log_p(mapped.decode(tokens)), log_p(repacked.decode(tokens))
        assert (np.exp(expected) * (expected - found)).sum() < 1e-3
        np.testing.assert_array_equal(log_p(fork.decode(tokens)), found)
        assert fork.signatures == repacked.signatures == mapped.signatures[::-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("arch", "stays"), [("gemma4", True), ("llama", False)])
def test_of_a_base_with_an_embedding_for_each_layer_the_file_stays_mapped(
    arch: str, stays: bool, tiny_gguf: Gguf
) -> None:
    path = tiny_gguf(arch)
    with closing(GgufEngine(path, context_length=CONTEXT, threads=1, repack=True)):
        assert (str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")) == stays


def test_weights_are_repacked_where_that_is_faster(tiny_gguf: Gguf, tmp_path: Path) -> None:
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - as above

    has_code = any(name in library().llama_print_system_info() for name in (b"AVX2 = 1", b"DOTPROD = 1"))
    for quantization, gains in (("q4_0", has_code), ("q8_0", False)):
        base = tmp_path / f"{quantization}.gguf"
        quantize_gguf(tiny_gguf("llama"), base, quantization)
        with closing(GgufEngine(base, context_length=CONTEXT, threads=1)) as engine:
            assert ("repacked" in engine.signatures[0]) == gains


KEPT_THREADS = """
import sys
from pathlib import Path
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.llama import end_threads
engine = GgufEngine(Path(sys.argv[1]), context_length=64, threads=2, repack=True)
threads = set(Path("/proc/self/task").iterdir())
end_threads()()
print(len(threads - set(Path("/proc/self/task").iterdir())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_a_base_leaves_no_threads_which_would_slow_down_all_steps(
    wide_gguf: Callable[[int], Path], tmp_path: Path
) -> None:
    """Where a processor has AMX, threads of the caller arrange the weights."""
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - as above

    base = tmp_path / "q4_0.gguf"
    quantize_gguf(wide_gguf(128), base, "q4_0")
    command = [sys.executable, "-c", KEPT_THREADS, str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == "0\n"


def test_keys_and_values_of_another_form_or_of_odd_heads_are_refused(tiny_gguf: Gguf) -> None:
    with pytest.raises(UsageError, match="q4_0"):
        GgufEngine(tiny_gguf("llama"), context_length=CONTEXT, kv="q4_0")
    with pytest.raises(IncompatibleError, match="kv f16"):
        GgufEngine(tiny_gguf("llama"), context_length=CONTEXT, kv="q8_0")


def test_a_sound_gguf_file_that_is_no_model_is_told_with_what_it_lacks(tiny_gguf: Gguf, tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    path = write_adapter(base, tmp_path / "a.gguf", low_rank(base, 1))
    with pytest.raises(VerificationError, match=r"a\.gguf is not a base .*: it has no list of tokens"):
        GgufEngine(path, context_length=32)


def test_bos_is_added_once_where_the_vocabulary_wants_it(tiny_gguf: Gguf, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    data = tiny_gguf("llama").read_bytes()
    assert key + b"\0" in data
    path = tmp_path / "bos.gguf"
    path.write_bytes(data.replace(key + b"\0", key + b"\1"))
    tokenizer = GgufTokenizer(path)
    once = tokenizer.tokenize("lamp")
    assert tokenizer.piece(once[0]) == b""
    assert tokenizer.tokenize("<s>lamp").count(once[0]) == 1
    assert once[0] not in tokenizer.tokenize("lamp", continues=True)


def test_an_interrupt_while_labels_are_scored_leaves_no_branches(
    tiny_gguf: Gguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(GgufEngine(tiny_gguf("llama"), context_length=64, threads=1)) as engine:
        copy = library().llama_memory_seq_cp

        def interrupt(*arguments: object) -> None:
            copy(*arguments)
            raise KeyboardInterrupt

        engine.decode([1, 2, 3, 4])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(library(), "llama_memory_seq_cp", interrupt)
            engine.score([[5], [6]])
        engine.truncate(0)
        engine.decode([1, 2])
        assert len(engine.score([[5, 6], [6, 5]])) == 2


def test_an_interrupt_before_a_first_step_keeps_no_adapter_from_being_loaded(tiny_gguf: Gguf) -> None:
    with closing(GgufEngine(tiny_gguf("llama"), context_length=64, threads=1)) as engine:
        place = 0
        while enter_until(place, engine._adapters.in_first_step):
            assert not engine._adapters._first_steps
            place += 1
        assert place > 1


AT_EXIT = """
import atexit, sys
from pathlib import Path
# Registered first, so that it is called last.
atexit.register(lambda: print(len(engine.decode([1, 2, 3]))))
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf import tiles
tiles._uses_amx = lambda: len(sys.argv) > 2
engine = GgufEngine(Path(sys.argv[1]), context_length=64, threads=1)
"""


@pytest.mark.parametrize("amx", [(), ("amx",)])
def test_an_engine_that_is_not_closed_computes_until_the_process_ends(tiny_gguf: Gguf, amx: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tiny_gguf("llama")), *amx]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 0

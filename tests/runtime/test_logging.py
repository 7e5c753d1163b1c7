"""What the library logs: info on loading, warnings on states it drops, debug on hits and misses; nothing is printed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import Runtime, VerificationError
from edgetune_runtime.engines.gguf.llama import load_model
from edgetune_runtime.engines.gguf.log import LlamaLog
from edgetune_runtime.engines.onnx.ort import library, open_session
from edgetune_runtime.inference.measuring import loaded_bundle

PROMPT = "turn on the light"
DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
NATIVE = ("llama_cpp", "onnxruntime")
QUIET = """
import sys
from edgetune_runtime import Runtime
for engine in ("gguf", "onnx"):
    with Runtime.open(sys.argv[1], engine=engine, cache_folder=sys.argv[2]) as runtime:
        runtime.warm()
        runtime.generate("play", adapter="one", max_tokens=2)
"""


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Messages so far of a level: those of one logger below `edgetune_runtime`, or of all but the native libraries'."""
    caplog.set_level(DEBUG, "edgetune_runtime")

    def messages(level: int, name: str | None = None) -> list[str]:
        found = [(record.name.removeprefix("edgetune_runtime."), record) for record in caplog.records]
        return [
            record.getMessage()
            for place, record in found
            if record.levelno == level and (place == name if name else place not in NATIVE)
        ]

    return messages


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_opening_and_warming_are_info_and_calls_are_debug(
    engine: str, prompted_of: Callable[[str], Path], tmp_path: Path, logged: Callable[..., list[str]]
) -> None:
    bundle = prompted_of("llama")
    with Runtime.open(bundle, engine=engine, cache_folder=tmp_path) as runtime:
        runtime.warm(["one"])
        info = logged(INFO)
        runtime.generate(PROMPT, adapter="one", max_tokens=1)
        runtime.generate(PROMPT, adapter="two", max_tokens=1)
    assert len(info) == 2
    assert info[0].startswith(f"opened {bundle} with {engine} and 2 adapters in ")
    assert info[1].startswith("warmed one: ")
    debug = logged(DEBUG, "serving.context")
    assert any(message.startswith("switched to one in ") for message in debug)
    assert any(message.startswith("hit: ") for message in debug)
    assert any(message.startswith("switched to two=0.5 in ") for message in debug)
    assert any(message.startswith("miss: 0 of ") for message in debug)
    assert logged(WARNING) == logged(ERROR) == []


def test_evictions_are_debug(prompted_of: Callable[[str], Path], logged: Callable[..., list[str]]) -> None:
    with Runtime.open(prompted_of("llama"), disk_mb=0) as runtime:
        runtime.generate(PROMPT, adapter="one", max_tokens=1)
        one_mb = loaded_bundle(runtime).context()[0].shared.cache.bytes / 1e6
    with Runtime.open(prompted_of("llama"), disk_mb=0, cache_mb=1.5 * one_mb) as runtime:
        for adapter in ("one", "two", "one", "two"):
            runtime.generate(PROMPT, adapter=adapter, max_tokens=1)
    assert any(message.startswith("evicted a state of ") for message in logged(DEBUG))


def test_more_threads_than_cores_are_a_warning(
    prompted_of: Callable[[str], Path], logged: Callable[..., list[str]]
) -> None:
    with Runtime.open(prompted_of("llama"), engine="onnx", disk_mb=0, threads=1000):
        assert logged(WARNING)[0].startswith("threads=1000, but only ")


def test_nothing_is_printed_when_the_app_sets_up_no_logging(prompted_of: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", QUIET, str(prompted_of("llama")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_llama_cpp_logs_its_errors_and_its_information_as_debug(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, logged: Callable[..., list[str]]
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf("llama").read_bytes()[:100])
    with pytest.raises(VerificationError):
        load_model(damaged, vocabulary_only=True)
    assert any("failed to load" in message for message in logged(ERROR, "llama_cpp"))
    assert logged(INFO, "llama_cpp") == []


def test_parts_of_a_line_are_one_message_of_the_first_ones_level(logged: Callable[..., list[str]]) -> None:
    log = LlamaLog()
    parts = [(3, b"one "), (5, b"two\nthr"), (5, b"ee\n"), (2, b"good\n"), (4, b"bad"), (1, b"deb"), (5, b"ug\n")]
    for level, text in parts:
        log.write(level, text)
    assert logged(WARNING, "llama_cpp") == ["one two", "three"]
    assert logged(ERROR, "llama_cpp") == ["bad"]
    assert logged(DEBUG, "llama_cpp") == ["good"]
    assert (log.take_errors(), log.take_errors()) == ("bad", "")


def test_a_stopped_step_and_an_expected_fallback_are_no_warnings(logged: Callable[..., list[str]]) -> None:
    log = LlamaLog()
    log.write(3, b"lora for 'blk.0.attn_q.weight' cannot use buft 'CPU_REPACK', fallback to CPU\n")
    log.stopping.add(1)
    log.write(4, b"failed to compute graph\n")
    assert len(logged(DEBUG, "llama_cpp")) == 2
    assert logged(WARNING, "llama_cpp") == logged(ERROR, "llama_cpp") == []


def test_a_call_that_is_cut_short_logs_no_error(
    prompted_of: Callable[[str], Path], logged: Callable[..., list[str]]
) -> None:
    with Runtime.open(prompted_of("llama"), disk_mb=0) as runtime:
        runtime.generate(PROMPT, adapter="one", deadline_s=1e-6)
    assert logged(WARNING) == logged(ERROR) == []


def test_onnxruntime_logs_its_information_as_debug(
    both_of: Callable[[str], Path], logged: Callable[..., list[str]]
) -> None:
    if not hasattr(library(), "set_default_logger_callback"):
        pytest.skip("onnxruntime older than 1.32")
    (graph,) = (both_of("llama") / "base").rglob("*.onnx")
    open_session(graph, 1)
    assert any("Session successfully initialized" in message for message in logged(DEBUG, "onnxruntime"))
    # Of the graph's inputs with defaults, too.
    assert logged(INFO, "onnxruntime") == logged(WARNING, "onnxruntime") == []

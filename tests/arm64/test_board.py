from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from arm64.board import SHARED, Board

# Greedy tokens compared for each adapter. Emulated, SmolLM2-135M takes about a second for each.
TOKENS = 12
# Log-probabilities (nats) of two tokens closer than this are a near tie: quantized activations round differently.
NEAR_NATS = 0.3
# Processors of qemu, what they stand for, and the variant of llama.cpp's CPU backend for them.
BOARDS = {"cortex-a53": "armv8.0_1", "cortex-a72": "armv8.0_1", "cortex-a76": "armv8.2_2"}
OTHERS = {
    "cortex-a35": "armv8.0_1",
    "cortex-a55": "armv8.2_2",
    "a64fx": "armv8.0_1",
    "neoverse-v1": "armv8.6_1",
    "neoverse-n2": "armv8.6_2",
    "max": "armv9.2_2",
}
ANSWERS = Path(__file__).with_name("answers.py")


@cache
def host_answers(bundle: Path, engine: str) -> dict[str, Any]:
    """The answers of this machine."""
    command = [sys.executable, str(ANSWERS), str(bundle), engine, str(TOKENS)]
    return json.loads(subprocess.check_output(command, text=True))


def first_difference(host: list[Any], board: list[Any]) -> tuple[int, float] | None:
    """Where two answers first differ, and how far apart the two tokens are, on the machine where they are further.

    None if they do not differ; infinity if one machine does not have the other's token among its two likeliest.
    """
    for place, ((mine, my_top), (other, other_top)) in enumerate(zip(host, board, strict=False)):
        if mine != other:
            tops = (dict(map(tuple, my_top)), dict(map(tuple, other_top)))
            gaps = [abs(top[mine] - top[other]) if {mine, other} <= top.keys() else float("inf") for top in tops]
            return place, max(gaps)
    return None


@pytest.mark.parametrize(("cpu", "variant"), (BOARDS | OTHERS).items())
def test_doctor_tells_the_processor_and_the_variant_made_for_it(
    cpu: str, variant: str, board: Board, installed: Callable[[str], str]
) -> None:
    doctor = json.loads(board.run(f"{installed('gguf')}/bin/edgetune-run", "doctor", "--json", cpu=cpu))
    assert doctor["llama_cpp"]["variant"] == variant
    features = set(doctor["llama_cpp"]["features"].split())
    assert "NEON" in features
    assert ("DOTPROD" in features) == (variant != "armv8.0_1")
    assert ("FP16_VA" in features) == (variant != "armv8.0_1")
    assert "neon" in doctor["instructions"]
    assert ("dotprod" in doctor["instructions"]) == ("DOTPROD" in features)
    assert ("SVE" in features) == variant.startswith(("armv8.6", "armv9"))


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
@pytest.mark.parametrize("cpu", BOARDS)
def test_greedy_answers_are_those_of_the_host_up_to_near_ties(
    cpu: str, engine: str, board: Board, bundle: Path, installed: Callable[[str], str]
) -> None:
    current = f"{installed(engine)}/current"
    shutil.copy(ANSWERS, board.shared)
    asks = (f"{current}/venv/bin/python", f"{SHARED}/{ANSWERS.name}", f"{current}/bundle", engine, str(TOKENS))
    found = json.loads(board.run(*asks, cpu=cpu))
    expected = host_answers(bundle, engine)
    assert found.keys() == expected.keys()
    for name, answer in expected.items():
        difference = first_difference(answer, found[name])
        if difference is None:
            assert len(answer) == len(found[name])
            continue
        place, gap = difference
        print(f"{cpu}, {engine}, {name}: token {place} differs: host {answer[place]}, board {found[name][place]}")
        assert gap < NEAR_NATS

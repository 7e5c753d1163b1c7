from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import greedy
import pytest
from arm64.board import SHARED, Board

# Greedy tokens compared for each adapter on the boards, and on newer processors. Emulated, SmolLM2-135M takes about a
# second for each.
TOKENS, FEW_TOKENS = 12, 3
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
NEWER = [cpu for cpu, variant in OTHERS.items() if variant not in BOARDS.values()]
SCRIPT = Path(greedy.__file__)
ASKED = [
    *((cpu, engine, TOKENS) for cpu in BOARDS for engine in ("gguf", "onnx")),
    *((cpu, "gguf", FEW_TOKENS) for cpu in NEWER),
]


@cache
def host_answers(bundle: Path, engine: str, tokens: int) -> dict[str, Any]:
    """The answers of this machine."""
    command = [sys.executable, str(SCRIPT), str(bundle), engine, str(tokens)]
    return json.loads(subprocess.check_output(command, text=True))


@pytest.mark.parametrize(("cpu", "variant"), (BOARDS | OTHERS).items())
def test_doctor_reports_the_processor_and_the_library_built_for_it(
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


@pytest.mark.parametrize(("cpu", "engine", "tokens"), ASKED)
def test_greedy_answers_are_those_of_the_host_up_to_near_ties(
    cpu: str, engine: str, tokens: int, *, board: Board, bundle: Path, installed: Callable[[str], str]
) -> None:
    current = f"{installed(engine)}/current"
    shutil.copy(SCRIPT, board.shared)
    asks = (f"{current}/venv/bin/python", f"{SHARED}/{SCRIPT.name}", f"{current}/bundle", engine, str(tokens))
    found = json.loads(board.run(*asks, cpu=cpu))
    greedy.require_same(host_answers(bundle, engine, tokens), found, f"{cpu}, {engine}")

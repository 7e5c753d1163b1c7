"""Training leaves no tensor on the CPU that belongs on the device, which no machine for tests has: a simulated one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import simulated_trainings
from trainings import QUIET

from edgetune import bases

CASES = [
    *simulated_trainings.METHODS,
    "distilled cartridge", "windows", "lora in bf16", "prefix in bf16", "bottleneck in bf16", "rounded",
    "rounded in bf16", "encoder", "adalora, to the device and back", "lora, to the device and back",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(
    wide_gguf: Callable[[int], Path],
    once: Callable[[str, Callable[[Path], object]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the trainings of a process of their own found: the device stays registered."""

    def train(out: Path) -> None:
        work, source = tmp_path_factory.mktemp("base"), str(wide_gguf(256))
        base = bases.resolve(source, folder=Path(), quantization="q4_0", work=work, progress=QUIET, converter=None)
        # torch and transformers, which take half as long to import as all trainings, are there already.
        done = forks.run([sys.executable, "-P", simulated_trainings.__file__, str(base.path)])
        assert done.returncode == 0, done.stderr
        out.write_text(done.stdout.splitlines()[-1], encoding="utf-8")

    told: dict[str, Any] = json.loads(once("simulated-trainings.json", train).read_text(encoding="utf-8"))
    assert list(told) == CASES
    return told


@pytest.mark.parametrize("case", CASES)
def test_a_training_on_the_device_computes_there_and_has_the_losses_of_the_cpu(
    case: str, found: dict[str, Any]
) -> None:
    # The last bits decide how a value between two of bf16, or of a base's grid, is rounded.
    tolerance = 1e-2 * ("bf16" in case) + 1e-2 * ("rounded" in case) or 2e-5
    assert found[case]["on_device"] == pytest.approx(found[case]["on_cpu"], abs=tolerance)
    assert found[case]["on_cpu"][-1] < found[case]["on_cpu"][0]
    assert found[case]["device"] == ("cpu" if case.endswith("back") else "simulated")
    assert found[case]["base"] == ["cpu"]

"""Trains tiny bases on the CPU and on another device.

`python simulated_trainings.py GGUF` does so with the simulated device, which stays registered in its process, and
prints one JSON object: for each case, the validation losses on both devices, and where the base is afterwards. GGUF is
a quantized base, for rounded layers.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import CancelledError
from edgetune_runtime.formats.gguf_file import read_header
from simulated_device import NAME, device, register, simulated
from tiny import make_encoder, make_model
from trainings import HEADER, QUIET, VARIANTS, VOCABULARY, Stopping, job
from transformers import PreTrainedModel

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.building.encoder.objective import Classify, Labelled
from edgetune.training.hardware import processes
from edgetune.training.job import TrainingJob, TrainResult
from edgetune.training.loop import train

OPTIONS: dict[str, dict[str, Any]] = {
    "alora": {"invocation_tokens": HEADER},
    "cartridge": {"num_virtual_tokens": 4},
    "last_layers": {"layers": 1},
}
METHODS = [name for name in methods.names() if name not in VARIANTS]
STEPS = 4

MakeBase = Callable[[], PreTrainedModel]


def cases(gguf: Path) -> Iterator[tuple[str, MakeBase, TrainingJob[Any]]]:
    """Each training with its name and the base that it trains."""
    # Moving a tied weight to the simulated device makes two of it; on a GPU it stays one.
    untied = partial(make_model, "qwen2", VOCABULARY)
    short: dict[str, Any] = {"max_steps": 2, "evals": 2}
    for name in METHODS:
        yield name, untied, job(name, OPTIONS.get(name), **short)
    document = methods.load("cartridge").options.model_validate(OPTIONS["cartridge"]).read("", range(40, 60))
    yield (
        "distilled cartridge",
        untied,
        replace(work := job("cartridge", **short), options=document, objective=work.method.objective(document)),
    )
    yield "windows", partial(make_model, "gemma3", VOCABULARY), job("lora", **short)
    # Rounding may hide what fewer steps change.
    longer: dict[str, Any] = {**short, "max_steps": STEPS}
    in_bf16: dict[str, Any] = {**longer, "precision": "bf16"}
    for name in ("lora", "prefix", "bottleneck"):
        yield f"{name} in bf16", lambda: untied().bfloat16(), job(name, OPTIONS.get(name), **in_bf16)
    quantized = Base("base", gguf, sha256_of(gguf), read_header(gguf), None)
    for name, dtype, options in (("rounded", torch.float32, longer), ("rounded in bf16", torch.bfloat16, in_bf16)):
        yield name, partial(bases.load_torch, quantized, dtype), replace(job("lora", **options), rounds_to=gguf)
    encoder = job("lora", {"target_modules": ["query", "value"]}, **short)
    rows = [Labelled(tuple(range(5, 9 + number % 3)), number % 2) for number in range(12)]
    classify = Classify(64, 2)
    yield (
        "encoder",
        partial(make_encoder, "bert", VOCABULARY),
        replace(encoder, train=rows, validation=rows, objective=classify),
    )


def trained(make_base: MakeBase, work: TrainingJob[Any], *devices: torch.device) -> tuple[TrainResult, list[str]]:
    """The result of a training that is interrupted and goes on on the next device, and where the base is afterwards."""
    base = make_base()
    with tempfile.TemporaryDirectory() as folder:
        for number, place in enumerate(devices):
            processes().device = place
            with simulated() if place.type == NAME else nullcontext():
                try:
                    progress = QUIET if place is devices[-1] else Stopping(STEPS // 2 + number)
                    result = train(base, work, Path(folder), progress)
                except CancelledError:
                    continue
    return result, sorted({str(parameter.device) for parameter in base.parameters()})


def compared(make_base: MakeBase, work: TrainingJob[Any], *devices: torch.device) -> dict[str, Any]:
    """The losses on the CPU and on the devices, one after the other."""
    expected, _ = trained(make_base, work, torch.device("cpu"))
    result, places = trained(make_base, work, *devices)
    losses = [[point.val_loss for point in found.history] for found in (expected, result)]
    return {"on_cpu": losses[0], "on_device": losses[1], "device": result.device, "base": places}


def main(gguf: Path) -> None:
    """Run all cases."""
    register()
    # As in conftest.py: accelerate collects garbage at the end of every training.
    gc.freeze()
    cpu = torch.device("cpu")
    found = {name: compared(make_base, work, device()) for name, make_base, work in cases(gguf)}
    for name in ("adalora", "lora"):
        whole = partial(make_model, "qwen2", VOCABULARY), job(name, max_steps=STEPS, evals=2)
        found[f"{name}, to the device and back"] = compared(*whole, cpu, device(), cpu)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

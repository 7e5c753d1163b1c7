"""Short trainings on tiny bases, run as in `edgetune build`: jobs, and ways to interrupt one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.errors import CancelledError
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.common.progress import Progress, Step
from edgetune.methods.common.base import trainable
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.objectives.packing import take_packed_rows
from edgetune.recipe.training import TrainingSpec
from edgetune.training.job import TrainingJob, TrainResult
from edgetune.training.loop import train

VOCABULARY = 384
HEADER = (10, 11, 12)
VARIANTS = {"loraplus": "lora", "olora": "pissa", "rslora": "lora"}
"""The methods that are another one with other defaults, and that one."""
QUIET = Progress(quiet=True)


class Listening(Progress):
    """Records the lines of progress; raises KeyboardInterrupt at a line that begins with `stop_at`."""

    def __init__(self, stop_at: str | None = None) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self.stop_at is not None and text.startswith(self.stop_at):
            raise KeyboardInterrupt


class Stopping(Progress):
    """Prints nothing, and raises `error` once after `step` steps."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__(quiet=True)
        self.at, self.error = step, error

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        yield _StoppingStep(label, total, self)


class _StoppingStep(Step):
    def __init__(self, label: str, total: int, stopping: Stopping) -> None:
        super().__init__(label, total)
        self.stopping = stopping

    def update(self, note: str = "", done: int | None = None) -> None:
        super().update(note, done)
        if self.done == self.stopping.at:
            raise self.stopping.error


def answer(number: int) -> Example:
    """A row whose answer depends on its number; rows have two different lengths."""
    words = (30 + number, 13) if number % 2 else (30 + number, 14, 13)
    tokens = (*HEADER, *words, 130 + number % 40, 131 + number % 40, 2)
    prompt = len(HEADER) + len(words)
    return Example(tokens, (False,) * prompt + (True,) * 3, prompt)


def short_answer(number: int, shift: int = 0) -> Example:
    """A row of eight tokens whose answer follows from its number; `shift` makes another rule."""
    tokens = (*HEADER, 30 + number, 13, 130 + (number + shift) % 40, 131 + (number + shift) % 40, 2)
    return Example(tokens, (False,) * 5 + (True,) * 3, 5)


SHORT = [short_answer(number) for number in range(24)]


def job(method: str, options: dict[str, Any] | None = None, **training: object) -> TrainingJob[Example]:
    """A training of 24 rows of two lengths by `method`."""
    kind = methods.load(method)
    rows = [answer(number) for number in range(24)]
    return job_of(kind, kind.options.model_validate(options or {}), rows, **training)


def job_of(
    method: methods.Method[Any],
    options: Any,  # noqa: ANN401 - those of the method
    rows: Sequence[Example],
    validation: Sequence[Example] | None = None,
    **training: object,
) -> TrainingJob[Example]:
    """A training with prepared options; without `validation`, every third row is one of it too."""
    given = {"max_steps": 12, "epochs": 100, "evals": 3, "batch_size": 8, "precision": "fp32", "patience": None}
    schedule = TrainingSpec.model_validate({**given, **training})
    held_out = list(rows[::3] if validation is None else validation)
    return TrainingJob("reply", method, options, schedule, list(rows), held_out, "abc", method.objective(options))


def learn(base: PreTrainedModel, work: TrainingJob[Example], folder: Path) -> TrainResult:
    """Train, and check that the base is unchanged afterwards, bit for bit and without hooks."""
    before = _state(base)
    result = train(base, work, folder, QUIET)
    after = _state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    return result


def _state(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def stopped_and_resumed(base: PreTrainedModel, work: TrainingJob[Example], folder: Path, step: int) -> TrainResult:
    """The result of a training that was interrupted after `step` steps and resumed."""
    with pytest.raises(CancelledError):
        train(base, work, folder, Stopping(step))
    return train(base, work, folder, QUIET)


def modified(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written, in ns."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def logits_of(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:  # noqa: ANN401 - with or without PEFT around it
    """The logits after each token [tokens, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ANN401 - as above
    """The gradients of a loss, by the names of their parameters."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pass_gradients(model: Any, rows: Sequence[Example]) -> dict[str, torch.Tensor]:  # noqa: ANN401 - as above
    """The loss and the gradients of one packed pass."""
    loss = NEXT_TOKEN.loss(model, model, NEXT_TOKEN.batch(rows))
    return {"loss": loss.detach()} | gradients(model, loss)


def randomize(model: torch.nn.Module) -> None:
    """Make the trainable parameters random."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.copy_(torch.randn_like(parameter) / 4)


def random_lora(base: PreTrainedModel, std: float = 0.1, **options: Any) -> Any:  # noqa: ANN401 - PEFT's
    """A LoRA on the base with random values of B, in training mode, for packed rows."""
    take_packed_rows(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()


def random_row(seed: int, length: int, beginning: Sequence[int] = (), learned_from: int = 1) -> Example:
    """A row of random tokens after `beginning`."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(30, VOCABULARY, (length - len(beginning),), generator=generator).tolist()
    return Example((*beginning, *own), tuple(i >= learned_from for i in range(length)), learned_from)


def build_in_two_processes(recipe: Path, out: Path) -> dict[str, Any]:
    """The output of `edgetune build RECIPE --json`, run by torch's launcher in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "edgetune", "build", str(recipe), "--out", str(out), "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told

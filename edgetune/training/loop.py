"""The training loop: trains a base on tokenized rows, writes `adapter/`, `result.json` and `log.jsonl` to a folder.

One loop on accelerate for every objective: validation during training, early stopping, and a saved state from which an
interrupted run resumes. Multiple processes or GPUs are set up by accelerate's launcher.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from edgetune_runtime.errors import CancelledError, EdgetuneError
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.processes.interrupts import interrupts_held
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from edgetune.common.progress import Progress, Step
from edgetune.methods.common.base import trainable
from edgetune.objectives.base import Batch, TrainingRow, row_length, total_weight

from .checkpointing import checkpointed, layers_of
from .device_memory import peak_mb
from .duration import TimeTrial, tokens_left
from .fused import fused
from .hardware import over_processes, precision_of, processes
from .job import Point, TrainingJob, TrainResult, write_result
from .memory import PassPlan
from .on_device import on_device
from .pass_sizes import pass_cost, passes_within
from .rounding import rounded_layers
from .schedule import Schedule, passes, plan
from .step_threads import StepThreads

# A killed run loses at most about this much work, or twenty times as much as the last state took to write.
_SAVE_EVERY_S, _SAVE_SHARE = 60.0, 0.05
# A final validation loss above the best by this factor is overfitting; below it is noise.
_OVERFIT = 1.01


@dataclass
class _State:
    """What an interrupted run needs to resume, besides weights and optimizer state."""

    step: int = 0
    history: list[Point] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    row_tokens: int = 0
    seconds: float = 0.0


def train(
    base: PreTrainedModel, job: TrainingJob[Any], folder: Path, progress: Progress, later: float = 0.0
) -> TrainResult:
    """Run the job and restore `base` afterwards. Resumes an interrupted run of the same key in `folder`.

    Reports the estimated time left after ten steps; `later` is the number of tokens in the runs after this one.
    Writes the checkpoint that the options choose to `folder/adapter` in PEFT's format. Raises CancelledError
    after saving when the user interrupts; EdgetuneError if the loss is not finite, or the device fails; UsageError if
    the longest row does not fit the recipe's memory limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with on_device(base, processes().device, job.name):
        return _trained(_Run(base, job, folder), progress, later)


def _trained(run: _Run, progress: Progress, later: float) -> TrainResult:
    try:
        run.objective.prepare(run.base)
        with run.layers():
            run.plan_passes()
            if message := run.passes_message():
                progress.say(message)
            left = tokens_left(run.train_rows, run.validation, run.training, run.state.step)
            with progress.step(f"training {run.name}", run.schedule.steps) as step:
                run.loop(step, TimeTrial(run.name, left, later), progress.say)
        return run.finish()
    except KeyboardInterrupt as error:
        # In the middle of a weight update only the state saved before it is consistent.
        if not run.is_changing:
            run.save()
        message = f"training {run.name} stopped at step {run.state.step}"
        raise CancelledError(message, "run the same command to resume") from error
    finally:
        run.detach()


class _Run:
    """One training run: model, optimizer and progress."""

    def __init__(self, base: PreTrainedModel, job: TrainingJob[Any], folder: Path) -> None:
        training, method = job.training, job.method
        self.training, self.folder, self.key, self.objective = training, folder, job.key, job.objective
        self.method, self.options, self.name, self.rounds_to = method, job.options, job.name, job.rounds_to
        self.train_rows = list(job.train)
        self.validation = job.loss_rows
        # Processes validate different numbers of batches, so no forward pass may wait for another process.
        apart = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(kwargs_handlers=[apart])
        self.precision = precision_of(training, method)
        self.schedule = Schedule(len(self.train_rows), training)
        self.state = _State()
        torch.manual_seed(training.seed)
        # Before the method adds its own parameters to the base.
        self.base, self.attention, total = base, base.config._attn_implementation, base.num_parameters()
        self.tuned: Any = method.attach(base, job.options, self.schedule.steps)
        if job.start is not None:
            try:
                method.start_from(self.tuned, job.start, job.options)
            except EdgetuneError:
                method.detach(self.tuned)
                raise
        self.objective.extend(self.tuned)
        self.tuned.to(self.accelerator.device)
        groups = method.parameter_groups(self.tuned, job.options, training.learning_rate)
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=training.weight_decay)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.counts = (sum(p.numel() for _, p in trainable(self.tuned)), total)
        self.model, self.optimizer = self.accelerator.prepare(self.tuned, optimizer)
        self.best: dict[str, torch.Tensor] = {}
        self.is_changing = False
        self.passes = PassPlan()
        self.checkpointed: list[Any] = []
        self.threads = StepThreads(is_cpu=self.accelerator.device.type == "cpu")
        self._next_save = time.monotonic() + _SAVE_EVERY_S
        self._resume()

    def plan_passes(self) -> None:
        """Choose the largest forward passes that fit in memory; UsageError if the recipe's limit allows none."""
        self.model.train()
        before = self.method.prefix_tokens(self.options)
        vocabulary = getattr(self.base.config, "vocab_size", 0)
        cost = pass_cost(self.train_rows, self.tuned, self._loss_of_row, before=before, vocabulary=vocabulary)
        if cost is not None:
            rows = (*self.train_rows, *self.validation)
            kept = self.objective.kept_bytes(rows)
            self.passes = passes_within(
                cost, self.training, rows, self.accelerator, trained=self.counts[0], kept_bytes=kept, name=self.name
            )
            # Checkpoint the first layers: the backward pass reaches them last, when the other layers' memory is free.
            self.checkpointed = layers_of(self.tuned)[-self.passes.layers :][: self.passes.checkpointed]

    def passes_message(self) -> str:
        """The planned passes as a message; empty if neither the recipe nor the free memory limits them."""
        limit = self.training.memory_mb
        within = "" if limit is None else f", memory limit {limit:,} MB"
        is_limited = limit is not None or self.passes.tokens < PassPlan.tokens
        return f"training {self.name}: {self.passes}{within}" if is_limited else ""

    def _loss_of_row(self, row: TrainingRow) -> torch.Tensor:
        return self._loss(self.objective.batch([row]).to(self.accelerator.device), self.tuned)

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Layers with rounded weights if the job has them; the others fused."""
        with rounded_layers(self.tuned, self.rounds_to), fused(self.tuned, int8=self.precision == "int8"):
            yield

    def loop(self, progress: Step, trial: TimeTrial, say: Callable[[str], None]) -> None:
        """Run the remaining steps, with validation and saving in between."""
        self.model.train()
        started = time.monotonic() - self.state.seconds
        progress.update("resumed" if self.state.step else "", self.state.step)
        if self._is_validation_due():
            self._validate()
        for rows in self._batches():
            if self._is_out_of_patience():
                break
            tokens = sum(map(row_length, rows))
            with self.threads.step(tokens):
                self._step(rows)
            if (estimate := trial.step(tokens, time.monotonic())) is not None:
                say(estimate)
            self.state.seconds = time.monotonic() - started
            progress.train_loss = self.state.loss_sum / (self.state.loss_weight or 1.0)
            note = f"loss {progress.train_loss:.3f}, {self._speed():.0f} tokens/s"
            if self._is_validation_due():
                point = self._validate()
                self.state.seconds = time.monotonic() - started
                progress.val_loss = point.val_loss
                note = f"validation loss {point.val_loss:.3f}, {self._speed():.0f} tokens/s"
                self.save()
            elif time.monotonic() > self._next_save:
                self.save()
            progress.update(note, self.state.step)

    def finish(self) -> TrainResult:
        """Write the checkpoint that ships and the result, and delete the saved state."""
        history = self.state.history
        best = min(self._settled(), key=lambda point: point.val_loss)
        shipped = best if self.training.checkpoint == "best" else history[-1]
        turned = history[-1].val_loss > best.val_loss * _OVERFIT
        result = TrainResult(
            train_loss=shipped.train_loss,
            val_loss=shipped.val_loss,
            shipped_step=shipped.step,
            steps=self.state.step,
            overfit_step=best.step if turned else None,
            trainable_parameters=self.counts[0],
            total_parameters=self.counts[1],
            tokens=self.state.row_tokens,
            tokens_per_s=self._speed(),
            peak_memory_mb=peak_mb(self.accelerator.device),
            seconds=self.state.seconds,
            precision=self.precision,
            device=self.accelerator.device.type,
            history=history,
        )
        if self.training.checkpoint == "best":
            self._load_weights(self.best)
        self.tuned.to("cpu")
        if self.accelerator.is_main_process:
            write_result(self.folder, self.key, result, self._save_adapter)
            self._state_path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return result

    def _save_adapter(self, folder: Path) -> None:
        self.method.save(self.tuned, folder)
        self.objective.save(self.tuned, folder)

    def save(self) -> None:
        """Write the state from which a later run resumes."""
        begin = time.monotonic()
        if self.accelerator.is_main_process:
            self._write_state()
        end = time.monotonic()
        self._next_save = end + max(_SAVE_EVERY_S, (end - begin) / _SAVE_SHARE)

    def _write_state(self) -> None:
        state = {
            "key": self.key,
            "state": asdict(self.state),
            "weights": self._weights(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "method": dict(self.method.state(self.tuned)),
        }
        # When torch opens the path itself, its error for a full disk does not say so. It ends the process if an
        # interrupt leaves its archive open.
        with interrupts_held(), replacing(self._state_path) as path, path.open("wb") as file:
            torch.save(state, file)

    def detach(self) -> None:
        """Restore the base and torch's threads."""
        self.threads.restore()
        self.method.detach(self.tuned)
        self.base.set_attn_implementation(self.attention)
        self.accelerator.free_memory()

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    def _resume(self) -> None:
        try:
            saved = torch.load(self._state_path, map_location="cpu", weights_only=True)
        except (FileNotFoundError, RuntimeError, EOFError, ValueError, UnpicklingError):
            return
        if saved.get("key") != self.key:
            return
        raw = saved["state"]
        self.state = _State(**{**raw, "history": [Point(**point) for point in raw["history"]]})
        self.best = saved["best"]
        self._load_weights(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.method.restore(self.tuned, saved["method"])

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in trainable(self.tuned)}

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in trainable(self.tuned):
                parameter.copy_(weights[name])

    def _batches(self) -> Iterator[list[TrainingRow]]:
        """The rows of each remaining step."""
        for indices in plan([len(e.tokens) for e in self.train_rows], self.schedule, self.training, self.state.step):
            yield [self.train_rows[i] for i in indices]

    def _step(self, rows: Sequence[TrainingRow]) -> None:
        """One optimizer step on the weighted loss of `rows` per learned prediction, across processes.

        The state changes only at the end, so an interrupted step is repeated.
        """
        processes = self.accelerator.num_processes
        learned = sum(self.objective.learned(row) for row in rows)
        # A process without rows still takes part, with weight 0.
        own = rows[self.accelerator.process_index :: processes]
        weight = processes / learned if own else 0.0
        torch.manual_seed(self.training.seed + self.state.step)
        computed = own or rows[:1]
        groups = passes(computed, self.passes.tokens, self.objective.shared(computed))
        parts = [self.objective.batch(part).to(self.accelerator.device) for part in groups]
        loss_sum = 0.0
        for number, part in enumerate(parts, 1):
            waits = self.accelerator.no_sync(self.model) if number < len(parts) else nullcontext()
            # Checkpointed layers run again in the backward pass and must not cast their inputs there either.
            with waits, checkpointed(self.checkpointed), self._uncast():
                loss = self._loss(part, self.model)
                penalty = self.method.penalty(self.tuned) if number == len(parts) else 0.0
                self.accelerator.backward(loss * weight + penalty)
            loss_sum += loss.item() if own else 0.0
        self._require_finite(loss_sum, self.state.step + 1)
        self.accelerator.clip_grad_norm_(self.tuned.parameters(), self.training.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.factor(self.state.step)
        self.is_changing = True
        self.optimizer.step()
        self.method.after_step(self.tuned, self.state.step)
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.loss_sum += loss_sum
        self.state.loss_weight += total_weight(self.objective, own)
        self.state.row_tokens += sum(len(example.tokens) for example in rows)
        self.is_changing = False

    def _loss(self, batch: Batch, model: torch.nn.Module) -> torch.Tensor:
        """Summed loss of the batch; `model` is the tuned model, or the one that accelerate prepared from it."""
        casting = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with casting, self._uncast():
            return self.objective.loss(model, self.tuned, batch)

    def _uncast(self) -> AbstractContextManager[None]:
        """Stop PEFT from casting inputs to float32 and back where autocast already casts the adapter's weights.

        (IA)3 layers never cast, and have no such switch.
        """
        layers = (module for module in self.tuned.modules() if isinstance(module, BaseTunerLayer))
        active = self.precision == "bf16" and all(hasattr(layer, "cast_input_dtype_enabled") for layer in layers)
        casting: AbstractContextManager[None] = disable_input_dtype_casting(self.tuned, active=active)
        return casting

    @torch.no_grad()
    def _validate(self) -> Point:
        self.model.eval()
        val_sum = 0.0
        own = self.validation[self.accelerator.process_index :: self.accelerator.num_processes]
        for part in passes(sorted(own, key=row_length), self.passes.validation_tokens, self.objective.shared(own)):
            batch = self.objective.batch(part).to(self.accelerator.device)
            val_sum += self._loss(batch, self.model).item()
        sums = (val_sum, total_weight(self.objective, own), self.state.loss_sum, self.state.loss_weight)
        val_sum, val_weight, train_sum, train_weight = over_processes(sums, self.accelerator)
        self._require_finite(val_sum, self.state.step)
        point = Point(
            step=self.state.step,
            epoch=self.state.step / self.schedule.steps_per_epoch,
            # All rows since the last one may have weight 0, and so may those of validation that are not too long.
            train_loss=train_sum / (train_weight or 1.0),
            val_loss=val_sum / (val_weight or 1.0),
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )
        self.model.train()
        with interrupts_held():
            self.state.history.append(point)
            best = min(self._settled(), key=lambda p: p.val_loss, default=None)
            if self.training.checkpoint == "best" and best is point:
                self.best = self._weights()
            self.state.loss_sum, self.state.loss_weight = 0.0, 0.0
        return point

    def _require_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        remedy = "lower training.learning_rate"
        if self.state.step == 0:
            # Nothing has been learned yet.
            remedy = "check the base and start_from for weights that are NaN, infinite or huge"
        if self.precision != "fp32":
            remedy = f"{remedy} or set training.precision: fp32"
        raise EdgetuneError(f"the loss is {loss} at step {step}", remedy)

    def _is_validation_due(self) -> bool:
        """Whether validation is due after the last step; also true when a run was interrupted while validating."""
        validated = self.state.history[-1].step if self.state.history else 0
        return self.state.step in self.schedule.evals and self.state.step > validated

    def _settled(self) -> list[Point]:
        """The validations from which a checkpoint may ship, as the method's own schedule had ended."""
        since = self.method.settled_step(self.options, self.schedule.steps)
        return [point for point in self.state.history if point.step >= since]

    def _is_out_of_patience(self) -> bool:
        losses, patience = [point.val_loss for point in self._settled()], self.training.patience
        return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def _speed(self) -> float:
        """Training tokens/s, with the time of validation included."""
        return self.state.row_tokens / max(self.state.seconds, 1e-9)

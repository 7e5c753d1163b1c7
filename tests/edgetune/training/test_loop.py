from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.errors import CancelledError, EdgetuneError, IncompatibleError
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainings import QUIET, SHORT, VOCABULARY, Stopping, job_of, short_answer
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.methods.lora import Lora
from edgetune.objectives.example import Example
from edgetune.training import memory
from edgetune.training.job import TrainingJob, finished
from edgetune.training.loop import train


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return make_model("llama", VOCABULARY)


@pytest.fixture
def run(base: PreTrainedModel, tmp_path: Path) -> Callable[..., Any]:
    """`run(job, folder_name, progress)`: the result of a training in that folder below tmp_path."""
    return lambda job, folder="run", progress=QUIET: train(base, job, tmp_path / folder, progress)


def job(
    method: dict[str, Any] | None = None,
    validation: Sequence[Example] | None = None,
    rows: int = 24,
    **training: object,
) -> TrainingJob:
    lora = methods.load("lora")
    options = lora.options.model_validate({"r": 4, **(method or {})})
    return job_of(lora, options, SHORT[:rows], validation, **{"learning_rate": 1e-2, "patience": 3, **training})


OVERFITTING = job(
    rows=4, validation=[short_answer(n, shift=7) for n in range(8)], max_steps=20, evals=10, batch_size=4,
    patience=None, seed=1,
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter/adapter_model.safetensors")
    return found


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(tensor.abs().max() > 0 for name, tensor in a.items() if "lora_B" in name)


def state_of(folder: Path) -> Any:  # noqa: ANN401 - as saved
    return torch.load(folder / "state.pt", weights_only=True)["state"]


def loss_of(model: Any, rows: Sequence[Example]) -> float:  # noqa: ANN401 - with or without PEFT around it
    """The mean loss of the learned tokens, rows run one by one with transformers' own attention."""
    logits = torch.cat([model(torch.tensor([row.tokens])).logits[0, 4:7] for row in rows])
    return cross_entropy(logits, torch.tensor([row.tokens[5:] for row in rows]).flatten()).item()


def test_a_training_learns_its_task_and_returns_its_figures(
    base: PreTrainedModel, run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(job(max_steps=40))
    losses = [point.val_loss for point in result.history]
    assert losses[-1] == result.val_loss < 0.7 * losses[0]
    assert [point.step for point in result.history] == [2, 5, 8, 11, 14, 17, 20, 22, 25, 28, 31, 34, 37, 40]
    assert (result.steps, result.shipped_step, result.overfit_step, result.precision) == (40, 40, None, "fp32")
    assert result.tokens == 40 * 8 * 8
    assert 0 < result.trainable_parameters < result.total_parameters == base.num_parameters()
    assert min(result.seconds, result.tokens_per_s, result.peak_memory_mb) > 0
    lines = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["val_loss"] for line in lines] == losses
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "log.jsonl", "result.json"]


@pytest.mark.parametrize(
    "method",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 8}, "lora_dropout": 0.1},
        {"loraplus_lr_ratio": 4, "target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_the_forms_of_lora_learn(method: dict[str, Any], run: Callable[..., Any], tmp_path: Path) -> None:
    result = run(job(method))
    assert result.val_loss < result.history[0].val_loss
    ranks = {tensor.shape[0] for name, tensor in weights(tmp_path / "run").items() if "q_proj.lora_A" in name}
    assert ranks == {method.get("rank_pattern", {}).get("q_proj", 4)}


def test_the_base_is_left_as_it_was(base: PreTrainedModel, run: Callable[..., Any]) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.named_modules()]
    attention = base.config._attn_implementation

    def assert_unchanged() -> None:
        after = base.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [(name, type(module)) for name, module in base.named_modules()] == modules
        assert base.config._attn_implementation == attention

    run(job(max_steps=2))
    assert_unchanged()
    with pytest.raises(RuntimeError, match="killed"):
        run(job(), "killed", Stopping(2, type("KilledError", (RuntimeError,), {"__str__": lambda _: "killed"})))
    assert_unchanged()
    with pytest.raises(ValueError, match="q_porj"):
        run(job({"target_modules": ["q_porj"]}), "refused")
    assert_unchanged()


@pytest.fixture(scope="module")
def whole(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `RESUMED`, trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    train(base, RESUMED, folder, QUIET)
    return folder


RESUMED = job({"lora_dropout": 0.2}, evals=3, weight_decay=0.1)


def assert_as_in_one_go(folder: Path, whole: Path) -> None:
    assert_same_weights(folder, whole)
    (first, second) = (finished(path, "abc") for path in (folder, whole))
    assert first is not None
    assert second is not None
    assert (first.history, first.steps, first.tokens) == (second.history, second.steps, second.tokens)
    assert not (folder / "state.pt").exists()


@pytest.mark.parametrize("step", [1, 9, 12])
def test_an_interrupted_training_resumes_to_the_same_weights(
    step: int, run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    with pytest.raises(CancelledError, match=f"training reply stopped at step {step}; run the same command to resume"):
        run(RESUMED, progress=Stopping(step, KeyboardInterrupt))
    assert state_of(tmp_path / "run")["step"] == step
    assert not (tmp_path / "run/result.json").exists()
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


def test_a_killed_training_resumes_from_its_last_validation(
    run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    with pytest.raises(RuntimeError):
        run(RESUMED, progress=Stopping(8, RuntimeError))
    assert state_of(tmp_path / "run")["step"] == 6
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


def interrupting(at: int, counts: Callable[..., bool]) -> Callable[..., None]:
    """A hook that raises KeyboardInterrupt at that one of the calls that count."""
    calls = []

    def interrupt(*arguments: object) -> None:
        calls.extend([1] if counts(*arguments) else [])
        if len(calls) == at:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("point", [3, 12])
def test_a_run_interrupted_while_it_validates_validates_again(
    point: int, base: PreTrainedModel, run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    interrupt = interrupting(point // 3, lambda model, _: not model.training)
    with base.register_forward_pre_hook(interrupt), pytest.raises(CancelledError, match=f"stopped at step {point}"):
        run(RESUMED)
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


def test_a_run_interrupted_in_the_middle_of_a_step_takes_it_again_wholly(
    base: PreTrainedModel, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST_TOKENS", 40)
    run(RESUMED, "whole")
    # Two more passes before the first step measure what a pass keeps.
    interrupt = interrupting(12, lambda model, _: model.training)
    with base.register_forward_pre_hook(interrupt), pytest.raises(CancelledError, match="stopped at step 4"):
        run(RESUMED)
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", tmp_path / "whole")


def test_a_run_interrupted_while_weights_change_goes_on_from_the_state_before(
    run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    with register_optimizer_step_post_hook(interrupting(8, lambda *_: True)), pytest.raises(CancelledError):
        run(RESUMED)
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


@contextmanager
def interruptible() -> Iterator[None]:
    # Jobs that a shell starts in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_run_interrupted_while_it_saves_finishes_the_file(
    at: int, run: Callable[..., Any], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, writes, saved = torch.save, [], []

    class Interrupting(io.FileIO):
        def write(self, data: Any, /) -> int:  # noqa: ANN401 - as FileIO's
            writes.append(1)
            if len(writes) == at:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    def interrupting(state: object, file: io.BufferedWriter) -> None:
        with Interrupting(file.name, "wb") as raw:
            save(state, raw)
        saved.append(state)

    monkeypatch.setattr(torch, "save", interrupting)
    with interruptible(), pytest.raises(CancelledError, match="stopped at step 3"):
        run(RESUMED)
    assert len(saved) == 2  # torch ends the process if it is left with half an archive
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


@pytest.mark.parametrize("damage", [b"", b"no state", b"PK\x03\x04 cut off"])
def test_a_damaged_state_starts_the_run_anew(
    damage: bytes, run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state.pt").write_bytes(damage)
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


def test_a_training_state_with_another_key_is_ignored(run: Callable[..., Any], tmp_path: Path, whole: Path) -> None:
    other = job(learning_rate=5e-2)
    with pytest.raises(CancelledError):
        run(TrainingJob(**{**vars(other), "key": "other"}), progress=Stopping(5, KeyboardInterrupt))
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


@pytest.mark.parametrize(("call", "step"), [(4, 3), (16, 12)])
def test_a_run_interrupted_after_a_validation_keeps_all_of_it(
    call: int, step: int, run: Callable[..., Any], tmp_path: Path, whole: Path
) -> None:
    calls = []

    class Interrupting(Lora):
        def settled_step(self, options: Any, steps: int) -> int:  # noqa: ANN401 - as Lora's
            # Asked before every step, and in each validation.
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return super().settled_step(options, steps)

    with interruptible(), pytest.raises(CancelledError, match=f"stopped at step {step}"):
        run(replace(RESUMED, method=Interrupting()))
    run(RESUMED)
    assert_as_in_one_go(tmp_path / "run", whole)


def test_losses_are_means_by_the_weights_of_the_rows(run: Callable[..., Any]) -> None:
    def weighted(rows: Sequence[Example], weight: float) -> list[Example]:
        return [replace(row, weight=weight) for row in rows]

    plain = job(validation=SHORT[:4], max_steps=1, evals=1)
    result = run(plain)
    validation = [*weighted(SHORT[8:], 0.0), *weighted(SHORT[:4], 0.1)]
    assert run(replace(plain, validation=validation), "validated").val_loss == pytest.approx(result.val_loss, rel=1e-5)
    trained = run(replace(plain, train=weighted(SHORT, 0.1)), "trained")
    assert trained.train_loss == pytest.approx(result.train_loss, rel=1e-5)
    assert run(replace(plain, train=weighted(SHORT, 0.0)), "without").train_loss == 0


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_checkpoint_that_ships_is_that_of_the_options(
    checkpoint: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    training = OVERFITTING.training.model_copy(update={"checkpoint": checkpoint})
    result = run(replace(OVERFITTING, training=training))
    losses = {point.step: point.val_loss for point in result.history}
    best = min(losses, key=lambda step: losses[step])
    assert result.overfit_step == best < result.steps == 20
    assert losses[20] > 1.1 * losses[best]
    shipped = {"best": best, "last": 20}[checkpoint]
    assert (result.shipped_step, result.val_loss) == (shipped, losses[shipped])
    tuned = PeftModel.from_pretrained(make_model("llama", VOCABULARY), tmp_path / "run/adapter").eval()
    with torch.no_grad():
        assert loss_of(tuned, OVERFITTING.validation) == pytest.approx(result.val_loss, rel=1e-4)


@pytest.mark.parametrize("stopped", [None, 4])
def test_patience_ends_a_run_that_gets_no_better(stopped: int | None, run: Callable[..., Any]) -> None:
    impatient = TrainingJob(
        **{**vars(OVERFITTING), "training": OVERFITTING.training.model_copy(update={"patience": 2})}
    )
    if stopped is not None:
        with pytest.raises(CancelledError):
            run(impatient, progress=Stopping(stopped, KeyboardInterrupt))
    result = run(impatient)
    after_best = [point for point in result.history if point.step > result.shipped_step]
    assert len(after_best) == 2
    assert all(point.val_loss >= result.val_loss for point in after_best)
    assert result.steps == after_best[-1].step < 20


def test_a_result_counts_only_for_its_key(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run(job(max_steps=2))
    folder = tmp_path / "run"
    assert finished(folder, "abc") == result
    assert finished(folder, "abd") is None
    assert finished(tmp_path / "none", "abc") is None
    (folder / "result.json").write_text('{"key": "abc", "history"', encoding="utf-8")
    assert finished(folder, "abc") is None


def test_a_result_never_counts_for_the_adapter_of_another_training(run: Callable[..., Any], tmp_path: Path) -> None:
    run(job(max_steps=2))
    # The second training cannot write this file, and ends before it has a result.
    (tmp_path / "run/log.jsonl").unlink()
    (tmp_path / "run/log.jsonl").mkdir()
    with pytest.raises(OSError, match=r"log\.jsonl"):
        run(replace(job(max_steps=2, seed=1), key="other"))
    assert finished(tmp_path / "run", "abc") is None


def test_another_training_leaves_no_file_of_the_former_result(run: Callable[..., Any], tmp_path: Path) -> None:
    run(job(max_steps=2))
    (tmp_path / "run/training.png").touch()
    full = methods.load("full")
    train(make_model("llama", VOCABULARY), job_of(full, full.options(), SHORT, max_steps=1), tmp_path / "run", QUIET)
    assert not (tmp_path / "run/adapter/adapter_config.json").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "log.jsonl", "result.json"]


@pytest.mark.parametrize(("steps", "evals"), [(3, 1), (1, 1), (4, 4)])
def test_a_loss_that_is_no_number_is_an_error_with_a_remedy(
    steps: int, evals: int, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(EdgetuneError, match=r"the loss is (nan|-?inf) at step [0-9]; lower training.learning_rate"):
        run(job(learning_rate=1e30, warmup=0, max_steps=steps, evals=evals, max_grad_norm=1e30))
    assert not (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/adapter").exists()


def test_a_loss_that_is_no_number_at_the_first_step_is_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    base = make_model("llama", VOCABULARY)
    with torch.no_grad():
        base.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(EdgetuneError, match=r"^the loss is nan at step 1; check the base and start_from for weights"):
        train(base, job(max_steps=2, precision="fp32"), tmp_path / "run", QUIET)


def test_the_seed_decides_the_weights(run: Callable[..., Any], tmp_path: Path) -> None:
    for folder, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(job(seed=seed, max_steps=2), folder)
    assert_same_weights(tmp_path / "one", tmp_path / "again")
    name, first = next(iter(weights(tmp_path / "one").items()))
    assert not torch.equal(first, weights(tmp_path / "two")[name])


def test_training_starts_from_a_saved_adapter_with_the_same_options(run: Callable[..., Any], tmp_path: Path) -> None:
    first = run(job(max_steps=24), "first")
    start = tmp_path / "first" / "adapter"
    again = run(replace(job(max_steps=1, learning_rate=1e-9), start=start), "again")
    assert again.val_loss == pytest.approx(first.val_loss, abs=1e-3)
    assert run(job(max_steps=1, learning_rate=1e-9), "anew").val_loss > first.val_loss + 1
    for method, difference in (({"r": 8}, "r 4 and not 8"), ({"target_modules": ["q_proj"]}, "other modules")):
        with pytest.raises(IncompatibleError, match=f"has {difference}, so training cannot start from it"):
            run(replace(job(method), start=start), "other")

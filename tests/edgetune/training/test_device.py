from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError
from recipes import adapter_of, make_recipe
from simulated_trainings import STEPS, compared
from tiny import make_model
from trainings import QUIET, VOCABULARY, Listening, Stopping, job

from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.planning.needs import check, report
from edgetune.planning.records import BuildNeeds, NeedsReport, Room
from edgetune.recipe.model import Recipe
from edgetune.recipe.saved import save_recipe
from edgetune.recipe.training import TrainingSpec
from edgetune.training.device import CPU, TorchReport, TrainingDevice, choose_device, may_have_gpu
from edgetune.training.hardware import device_of, processes, torch_report, use_device
from edgetune.training.loop import train
from edgetune.training.memory import PassCost, plan_passes
from edgetune.training.on_device import failure_of, on_device
from edgetune.training.precision import precision_on

FOR_CPUS = TorchReport("2.13.0+cpu")
NO_GPU, ONE_GPU, TWO_GPUS = (TorchReport("2.13.0+cu128", has_cuda=True, cuda_devices=count) for count in range(3))
APPLE = TorchReport("2.13.0", has_mps=True)
T4 = TrainingDevice("cuda:0", "Tesla T4", free_mb=15_000, total_mb=15_800)
A100 = TrainingDevice("cuda:1", "A100", free_mb=40_000, total_mb=42_000, multiplies_bf16=True)


@pytest.mark.parametrize(
    ("key", "reported", "name"),
    [
        ("auto", FOR_CPUS, "cpu"),
        ("auto", NO_GPU, "cpu"),
        ("auto", TWO_GPUS, "cuda:0"),
        ("auto", APPLE, "mps"),
        ("cpu", TWO_GPUS, "cpu"),
        ("cpu", APPLE, "cpu"),
        ("cuda", ONE_GPU, "cuda:0"),
        ("cuda:1", TWO_GPUS, "cuda:1"),
        ("mps", APPLE, "mps"),
    ],
)
def test_the_device_is_the_first_gpu_or_the_one_that_is_set(key: str, reported: TorchReport, name: str) -> None:
    assert choose_device(key, reported) == name


@pytest.mark.parametrize(
    ("key", "reported", "message"),
    [
        ("cuda", FOR_CPUS, "cuda, but torch 2.13.0+cpu is built without CUDA; install a torch build with CUDA"),
        ("cuda:0", APPLE, "cuda:0, but torch 2.13.0 is built without CUDA; install a torch build with CUDA"),
        ("cuda", NO_GPU, "cuda, but torch 2.13.0+cu128 finds no GPU; check that nvidia-smi (or rocm-smi) lists it"),
        ("cuda:3", ONE_GPU, "cuda:3, but torch finds no such GPU; use cuda:0"),
        ("cuda:2", TWO_GPUS, "cuda:2, but torch finds no such GPU; use cuda:0, cuda:1"),
        ("mps", ONE_GPU, "mps, but torch 2.13.0+cu128 finds no GPU of Apple silicon; run on such a Mac with macOS 14"),
    ],
)
def test_a_device_that_torch_does_not_find_is_refused(key: str, reported: TorchReport, message: str) -> None:
    with pytest.raises(IncompatibleError) as error:
        choose_device(key, reported)
    assert str(error.value).startswith(f"training.device is {message}")
    assert str(error.value).endswith(", or set training.device: auto")


@pytest.mark.parametrize("key", ["gpu", "cuda:", "cuda:-1", "cuda:123", "CPU", "mps:0", ""])
def test_another_name_of_a_device_is_refused(tmp_path: Path, tiny_gguf: Callable[[str], Path], key: str) -> None:
    with pytest.raises(UsageError, match=r"training.device: .* is not a device; use auto, cpu, cuda, cuda:N"):
        make_recipe(tmp_path, tiny_gguf("llama"), training={"device": key})


def test_a_build_has_one_device(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    own = {"command": {**adapter_of("lora"), "training": {"device": "cpu"}}}
    with pytest.raises(UsageError, match=r"adapters.command.training: device is one for all trainings of a build; set"):
        make_recipe(tmp_path, tiny_gguf("llama"), own)


def test_a_recipe_with_chosen_options_can_be_saved_for_other_processes(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), training={"auto": True, "device": "cpu"})
    planned = plan_build(recipe).plan.recipe
    assert planned.adapters["command"].training.model_fields_set >= {"epochs", "device"}
    read = Recipe.from_file(save_recipe(planned, tmp_path / "saved"))
    assert read.training.device == "cpu"
    assert read.adapters["command"].training.epochs == planned.adapters["command"].training.epochs


def test_no_result_depends_on_the_device() -> None:
    assert TrainingSpec(device="cuda:1").model_dump(mode="json") == TrainingSpec().model_dump(mode="json")


def test_torch_is_asked_for_a_gpu_only_where_a_driver_is(tmp_path: Path) -> None:
    assert not may_have_gpu(tmp_path) or torch.backends.mps.is_available()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert may_have_gpu(tmp_path)


@pytest.mark.parametrize(
    ("device", "setting", "precision"),
    [(A100, "auto", "bf16"), (T4, "auto", "fp32"), (T4, "bf16", "bf16"), (A100, "fp32", "fp32")],
)
def test_auto_is_bf16_only_where_the_device_multiplies_it(device: TrainingDevice, setting: str, precision: str) -> None:
    assert precision_on(device, TrainingSpec.model_validate({"precision": setting})) == precision


def test_the_device_found_here_is_that_of_all_trainings(tmp_path: Path) -> None:
    reported = torch_report()
    found = use_device("auto")
    assert found.name == choose_device("auto", reported) == str(processes().device)
    assert (found.total_mb is None) == (found.kind == "cpu")
    assert use_device("cpu").name == "cpu"
    result = train(make_model("llama", VOCABULARY), job("lora", max_steps=2), tmp_path, QUIET)
    assert result.device == "cpu"
    assert use_device("auto") == replace(found, free_mb=device_of(processes().device).free_mb)


@pytest.mark.skipif(torch.cuda.device_count() > 9, reason="has as many GPUs")
def test_plan_and_build_refuse_a_missing_gpu_before_any_work(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), training={"device": "cuda:9"})
    runs: list[Callable[[], Any]] = [
        lambda: plan_build(recipe),
        lambda: build(recipe, tmp_path / "out", progress=QUIET),
    ]
    for run in runs:
        with pytest.raises(IncompatibleError, match=r"^training.device is cuda:9, but torch"):
            run()
    assert not (tmp_path / "out.work").exists()


def test_a_build_says_its_device(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), training={"device": "cpu", "max_steps": 1, "precision": "fp32"})
    assert plan_build(recipe).plan.to_json()["training_device"] == {"name": "cpu", "title": ""}
    progress = Listening()
    result = build(recipe, tmp_path / "home", progress=progress)
    assert any(line.startswith("trains on cpu") for line in progress.lines)
    assert any("tokens/s in fp32 on cpu, peak memory " in line for line in progress.lines)
    assert result.figures["command"]["device"] == "cpu"


def needs_on(device: TrainingDevice, recipe: Recipe) -> NeedsReport:
    """What a build needs that trains on `device`."""
    plan = plan_build(recipe).plan
    assert plan.source is not None and plan.source.shape is not None
    return report(plan, plan.source.shape, Room(Path("/data"), 64_000, 500_000, device))


def test_training_needs_of_a_gpu_are_without_the_process_and_in_its_precision(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), training={"precision": "auto"})
    on_cpu, on_t4, on_a100 = (needs_on(device, recipe) for device in (CPU, T4, A100))
    assert on_cpu.needs.training_mb - on_t4.needs.training_mb == pytest.approx(450)
    assert on_a100.needs.min_training_mb < on_t4.needs.min_training_mb
    assert on_a100.needs.export_mb == on_cpu.needs.export_mb
    assert " on cuda:0 (Tesla T4, 15,000 MB free) and " in on_t4.summary
    assert " on cpu" not in on_cpu.summary


NEEDS = BuildNeeds(
    parameters=1_700_000_000, weights_mb=6800, training_mb=20_000, min_training_mb=16_000, export_mb=15_000,
    min_export_mb=8200, bundle_mb=2000, disk_mb=20_000, min_disk_mb=3000, extra_formats_mb=0,
)  # fmt: skip


def test_a_small_gpu_is_told_before_any_work(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"))
    room = Room(Path("/data"), 10_000, 500_000, T4)
    (warning,) = check(recipe, NEEDS, room)
    assert warning == (
        "training takes about 16,000 MB of memory on cuda:0 (Tesla T4, 15,000 MB free); close other programs that use "
        "it, set training.device: cpu, or choose a smaller base"
    )
    assert check(recipe, NEEDS, replace(room, device=A100)) == []
    (of_machine,) = check(recipe, NEEDS, replace(room, memory_mb=8000, device=A100))
    assert of_machine.startswith("export takes about 8,200 MB of memory, and 8,000 MB are free")
    tiny = TrainingDevice("cuda:0", "GT 1030", free_mb=1900, total_mb=2000)
    with pytest.raises(IncompatibleError) as error:
        check(recipe, NEEDS, replace(room, device=tiny))
    assert str(error.value).endswith(
        "of 1,700M parameters takes at least 3,400 MB of memory on cuda:0 (GT 1030), which has 2,000 MB; set "
        "training.device: cpu, or choose a smaller base"
    )


def test_passes_are_sized_by_what_the_allocator_of_a_gpu_reports() -> None:
    cost = PassCost(layers=10, per_token=2e6, input_per_token=4e3, constant=0, loss=50e6)

    def tokens(free_mb: float) -> int:
        sizes: dict[str, Any] = {"longest_row": 512, "batch_size": 16, "used_mb": 3000, "limit_mb": None}
        return plan_passes(cost, **sizes, room_mb=free_mb, name="reply").tokens

    assert [tokens(free_mb) for free_mb in (40_000, 4000, 2000)] == [4096, 1709, 844]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "ran out of memory on cuda:0; clo"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), "ran out of memory on cuda:0; close other"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "ran out of memory on cuda:0; close oth"),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
            "lost cuda:0: CUDA error: unspecified launch failure; check the device and its driver, then run the same",
        ),
        (RuntimeError("The size of tensor a (2) must match"), None),
    ],
)
def test_a_device_that_fails_is_one_line(error: RuntimeError, message: str | None) -> None:
    failure = failure_of(error, torch.device("cuda:0"), "reply")
    assert (failure is None) == (message is None)
    if failure is not None:
        assert str(failure).startswith(f"training reply {message}")
        assert str(failure).endswith(" run the same command to resume")
        assert "\n" not in str(failure)


def test_a_lost_device_that_fails_again_is_reported_as_it_was_lost() -> None:
    class Lost(torch.nn.Linear):
        def to(self, *_args: Any, **_options: Any) -> Any:  # noqa: ANN401 - as torch's
            raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasCreate(handle)`")

    with (
        pytest.raises(EdgetuneError, match="training reply lost cuda:0: CUDA error: unspecified launch failure; check"),
        on_device(Lost(1, 1), torch.device("cuda:0"), "reply"),
    ):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")


def test_an_error_that_the_caller_was_handling_is_not_the_devices() -> None:
    try:
        raise RuntimeError("CUDA out of memory")
    except RuntimeError:
        with (
            pytest.raises(RuntimeError, match=r"^a wrong size$"),
            on_device(torch.nn.Linear(1, 1), torch.device("cuda:0"), "reply"),
        ):
            raise RuntimeError("a wrong size") from None


def test_what_the_allocator_of_the_cpu_raises_is_recognized() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    failure = failure_of(error.value, torch.device("cpu"), "reply")
    assert str(failure).startswith("training reply ran out of memory on cpu; close other programs")


GPU = choose_device("auto", torch_report())


@pytest.mark.skipif(GPU == "cpu", reason="torch finds no GPU")
@pytest.mark.parametrize("method", ["lora", "full", "prefix", "adalora"])
def test_the_same_seed_gives_the_same_losses_on_a_gpu(method: str) -> None:
    cpu, gpu = torch.device("cpu"), torch.device(GPU)
    for devices in ((gpu,), (cpu, gpu), (gpu, cpu)):
        found = compared(partial(make_model, "llama", VOCABULARY), job(method, max_steps=STEPS, evals=2), *devices)
        assert found["on_device"] == pytest.approx(found["on_cpu"], rel=2e-3)
        assert (found["device"], found["base"]) == (devices[-1].type, ["cpu"])


def test_a_training_that_runs_out_of_memory_resumes_with_the_next_build(tmp_path: Path) -> None:
    base = make_model("llama", VOCABULARY)
    work = job("lora", max_steps=6, evals=3)
    whole = train(base, work, tmp_path / "whole", QUIET)
    with pytest.raises(EdgetuneError, match="training reply ran out of memory on cpu; close other programs") as error:
        train(base, work, tmp_path / "cut", Stopping(4, torch.OutOfMemoryError))
    assert "training.device: cpu" not in str(error.value)
    assert train(base, work, tmp_path / "cut", QUIET).history == whole.history

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.errors import CancelledError, EdgetuneError, IncompatibleError, UsageError
from recipes import adapter_of, lights, write_recipe, write_rows
from safetensors.numpy import save_file
from trainings import QUIET, Listening
from waiting import wait_for

import edgetune
from edgetune.cli.main import main
from edgetune.common.module_process import read_request, write_request
from edgetune.common.progress import Progress
from edgetune.comparison.columns import ON_ENGINE, TRAINING, engine_rows, training_rows
from edgetune.comparison.engines import outcome_of, run_here, run_on_ray
from edgetune.comparison.figures import TrialResult, read_outcome, write_outcome
from edgetune.comparison.grid import Request, Trial, recipe_of, trials_of
from edgetune.comparison.plots import plots
from edgetune.comparison.sweep import Comparison, compare
from edgetune.comparison.trial import run as run_trial
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task

TASKS = dict.fromkeys(
    ("lights", "other"),
    adapter_of({"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
)
SETTINGS = {"rslora.target_modules": "nothing_like_it"}
LABELLED = [{"text": f"turn on light {number}", "label": ("on", "off")[number % 2]} for number in range(40)]
OTHER = adapter_of(train="others.jsonl")
OTHERS = [{"prompt": f"set the heat to {number}", "completion": "none"} for number in range(40)]


@dataclass(frozen=True)
class Compared:
    """A finished comparison and what was asked for."""

    request: Request
    result: Comparison

    def outcome(self, name: str) -> TrialResult:
        return next(outcome for outcome in self.result.outcomes if outcome.name == name)


@pytest.fixture(scope="module")
def request_of(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Request]:
    """`request_of(**keys)`: lora at rank 2 on the tiny llama, or what the keys say."""
    folder, data = tmp_path_factory.mktemp("compare"), {"rows.jsonl": lights(20, ("reply on", "set red"))}
    recipe = write_recipe(folder, tiny_gguf("llama"), TASKS, data=data, targets=["gguf", "onnx"])
    whole = Request(recipe, "lights", ("lora",), folder / "out", ranks=(2,), limit=3)
    return lambda **keys: replace(whole, **keys)


@pytest.fixture(scope="module")
def compared(request_of: Callable[..., Request]) -> Compared:
    """lora, an rslora that fails, and bottleneck, which GGUF cannot hold."""
    request = request_of(methods=("lora", "rslora", "bottleneck"), settings=SETTINGS)
    return Compared(request, compare(request, run_in_this_process, QUIET))


def run_in_this_process(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """As `run_here`, without a process for each, which imports torch first; test_api.py starts one."""
    for trial in trials:
        try:
            folder, outcome = write_request(Path(trial.folder), trial), run_trial(trial, progress)
        except EdgetuneError as error:
            yield trial.without_figures("failed", str(error))
        else:
            write_outcome(outcome, folder, trial.key)
            yield outcome_of(trial, "")


def no_run(trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
    assert not trials
    yield from ()


def trials(request: Request, fingerprint: str = "ab") -> list[Trial]:
    return trials_of(request, recipe_of(request), fingerprint)


def method_of(trial: Trial) -> dict[str, Any]:
    spec: dict[str, Any] = trial.one_task.adapters[trial.task].method.model_dump(mode="json")
    return spec


def test_a_failing_trial_does_not_stop_the_others(compared: Compared) -> None:
    assert {outcome.name: outcome.status for outcome in compared.result.outcomes} == {
        "lora-r2": "done",
        "bottleneck": "done",
        "rslora-r2": "failed",
    }
    reason = compared.outcome("rslora-r2").reason
    assert reason.startswith("adapter 'lights': the base has no module 'nothing_like_it'; ")
    assert "\n" not in reason


def test_a_row_is_filled_for_each_engine(compared: Compared) -> None:
    lora = compared.outcome("lora-r2")
    assert (lora.rows, lora.metric, lora.rank) == (3, "exact", 2)
    assert lora.training is not None and lora.torch_score is not None
    assert 0 < lora.training.trainable_parameters < 0.1 * lora.training.total_parameters
    assert lora.training.peak_memory_mb > 100 and lora.training.tokens_per_s > 0
    assert len(lora.training.history) == 2
    assert list(lora.engines) == ["gguf", "onnx"]
    for figures in lora.engines.values():
        assert figures.shape == "low_rank"
        assert 0 < figures.bytes < 100_000
        speeds = (figures.tokens_per_s, figures.merged_tokens_per_s, figures.base_tokens_per_s)
        assert all(speed is not None and speed > 0 for speed in speeds)
        assert figures.switch_us is not None and figures.first_token_ms is not None
        assert figures.score == lora.torch_score


def test_a_format_that_cannot_hold_a_method_has_the_reason_in_place_of_figures(compared: Compared) -> None:
    bottleneck = compared.outcome("bottleneck")
    assert list(bottleneck.engines) == ["onnx"]
    assert bottleneck.engines["onnx"].merged_tokens_per_s is None
    assert "gguf does not support bottleneck" in bottleneck.refused["gguf"]
    assert ("bottleneck", "gguf", f"refused: {bottleneck.refused['gguf']}") in list(engine_rows([bottleneck]))


def test_the_bundle_of_a_trial_is_whole_and_nothing_merged_is_left(compared: Compared) -> None:
    folder = compared.request.out / "trials" / "lora-r2"
    manifest = read_manifest(folder / "bundle")
    assert list(manifest.adapters) == ["lights"]
    assert list(manifest.adapters["lights"].modules_by_rank) == [2]
    assert not (folder / "merged").exists()
    assert not (compared.request.out / "shared" / "structure").exists()


def test_the_base_that_trials_share_is_found_in_a_folder_that_was_moved(compared: Compared, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(compared.request.out, moved, symlinks=True)
    assert (moved / "trials/lora-r2/bundle.work/base").resolve() == (moved / "shared/base").resolve()


def test_what_is_finished_is_not_run_again(compared: Compared) -> None:
    asked: list[str] = []

    def run(trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
        for trial in trials:
            asked.append(trial.name)
            yield compared.outcome(trial.name)

    again = compare(compared.request, run, QUIET)
    assert asked == ["rslora-r2"]
    assert {o.name: o for o in again.outcomes if o.status == "done"} == {
        o.name: o for o in compared.result.outcomes if o.status == "done"
    }


def test_more_rows_give_a_learning_curve_and_the_recommendation_is_of_the_most(
    compared: Compared,
    request_of: Callable[..., Request],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
        for trial in trials:
            rows = len(read_task(trial.task, trial.one_task).train)
            yield replace(compared.outcome("lora-r2"), name=trial.name, trained_rows=rows)

    data = str(compared.request.recipe.with_name("rows.jsonl"))
    result = compare(request_of(rows=(12, 4), out=tmp_path / "out", data=data), run, QUIET)
    assert "rows.jsonl (16 of 20 answers are to prompts of training rows" in result.source
    trained = {outcome.name: outcome.trained_rows for outcome in result.outcomes}
    assert trained == {"lora-r2-4rows": 4, "lora-r2-12rows": 12}
    assert result.recommended is not None and result.recommended.name == "lora-r2-12rows"
    (sentence,) = result.more_rows
    assert sentence.startswith("lora-r2: exact 0.") and " with 4 rows, " in sentence
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert sentence in page and page.count('src="data:image/png;base64,') == 4
    assert json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))["more_rows"] == [sentence]
    plots(compared.result.outcomes, tmp_path / "out")
    assert not (tmp_path / "out" / "rows.png").exists(), "that of an earlier comparison is gone"
    plots(result.outcomes, tmp_path / "out")
    bundle, report = compared.request.out / "trials" / "lora-r2" / "bundle", tmp_path / "report.html"
    command = ["report", str(bundle), "--out", str(report), "--compare"]
    assert main([*command, str(tmp_path / "out")]) == 0
    text = report.read_text(encoding="utf-8")
    assert f"the base is {result.base}.\n{sentence}." in text and text.count('src="data:image/png;base64,') == 1
    assert "img { max-width: 100%; height: auto; }" in text
    assert main([*command, str(compared.request.out)]) == 2
    assert "has no learning curve, as it has scores for one number of rows" in capsys.readouterr().err


def test_numbers_of_rows_are_of_all_rows_whatever_the_recipe_trains_on(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "held_out": 0.2, "rows": 4}
    recipe = write_recipe(tmp_path, "base.gguf", {"lights": {"data": data}}, data={"rows.jsonl": lights(20)})
    own = Request(recipe, "lights", ("lora",), tmp_path)
    read = [read_task("lights", recipe_of(request)) for request in (own, replace(own, rows=(8, 16)))]
    assert [len(task.train) for task in read] == [4, 16]


def test_another_recipe_or_other_rows_are_run_anew(compared: Compared, request_of: Callable[..., Request]) -> None:
    same, *_ = trials(request_of())
    for keys in ({"limit": 2}, {"settings": {"training.seed": 1}}, {"targets": ("gguf",)}, {"data": "other.jsonl"}):
        other, *_ = trials(request_of(**keys))
        assert other.name == same.name
        assert other.key != same.key
    assert trials(request_of(), "cd")[0].key != same.key
    assert read_outcome(Path(same.folder), same.key) is None  # the base's fingerprint is another
    done = Path(same.folder) / "trial.json"
    assert read_outcome(Path(same.folder), json.loads(done.read_text())["key"]) == compared.outcome("lora-r2")


def test_a_trial_does_not_begin_with_another_recipe_than_the_comparison(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    recipe = Path(shutil.copytree(request_of().recipe.parent, tmp_path / "own", ignore=lambda *_: ["out"]))
    recipe /= request_of().recipe.name
    trial, *_ = trials(request_of(recipe=recipe, out=tmp_path / "out"))
    with recipe.with_name("rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "dim", "completion": "set blue"}))
    with pytest.raises(UsageError, match="its data has changed since the comparison began; run it again"):
        run_trial(Trial(**read_request(write_request(tmp_path / "trial", trial))), QUIET)


def keys_before_and_after(change: Callable[[], object], request: Request) -> tuple[str, str]:
    before = trials(request)[0].key
    change()
    return before, trials(request)[0].key


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"out_of_scope": True}, LABELLED),
        ({"data": {"train": "rows.jsonl", "augment": {"negatives": {"completion": "none"}}}}, lights(20)),
        ({}, lights(20)),
    ],
)
def test_a_trial_learns_from_the_rows_of_other_adapters_as_a_build_does(
    keys: dict[str, Any], rows: list[dict[str, Any]], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters, data = {"lights": adapter_of(**keys), "other": OTHER}, {"rows.jsonl": rows, "others.jsonl": OTHERS}
    request = Request(write_recipe(tmp_path, tiny_gguf("llama"), adapters, data=data), "lights", ("lora",), tmp_path)
    recipes = (Recipe.from_file(request.recipe), trials(request)[0].one_task)
    built, tried = ([row.messages for row in read_task("lights", recipe).trained_rows] for recipe in recipes)
    assert tried == built
    assert ("heat" in str(tried)) == bool(keys)
    before, after = keys_before_and_after(lambda: write_rows(tmp_path / "others.jsonl", OTHERS[:-1]), request)
    assert (before != after) == bool(keys)


def test_a_trial_with_another_document_or_other_weights_to_start_from_is_run_anew(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    document, weights = tmp_path / "text.txt", tmp_path / "start/adapter_model.safetensors"
    weights.parent.mkdir()
    document.write_text("turn on the light in the hall")
    save_file({"some": np.zeros(1)}, weights)
    adapters = {
        "cartridge": adapter_of({"name": "cartridge", "document": "text.txt"}),
        "lora": adapter_of(start_from="start"),
    }
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), adapters)
    for name, change in (
        ("cartridge", lambda: document.write_text("close the blind")),
        ("lora", lambda: save_file({"others": np.zeros(1)}, weights)),
    ):
        before, after = keys_before_and_after(change, Request(recipe, name, (name,), tmp_path / "out"))
        assert before != after


def test_the_page_has_every_row_and_needs_nothing_else(compared: Compared) -> None:
    page = (compared.request.out / "compare.html").read_text(encoding="utf-8")
    for outcome in compared.result.outcomes:
        assert f">{outcome.name}</td>" in page
    assert "the base has no module &#39;nothing_like_it&#39;" in page
    assert page.count('src="data:image/png;base64,') == 3
    assert "http" not in page and "<script" not in page
    assert compared.result.recommended is not None
    assert "on 3 rows of its validation data." in page
    assert f"take {compared.result.recommended.name}." in page.lower()


def test_files_hold_what_is_printed(compared: Compared) -> None:
    out = compared.request.out
    told = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert (told["task"], told["metric"], told["rows"]) == ("lights", "exact", 3)
    assert told["source"] == "its validation data"
    assert [trial["name"] for trial in told["trials"]] == [outcome.name for outcome in compared.result.outcomes]
    assert compared.result.recommended is not None
    assert told["recommended"] == compared.result.recommended.name
    assert told["reason"]
    for name in ("score-size.png", "score-speed.png", "loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_tables_have_a_cell_for_each_column(compared: Compared) -> None:
    done = [outcome for outcome in compared.result.outcomes if outcome.status == "done"]
    assert {len(row) for row in training_rows(done)} == {len(TRAINING)}
    assert {len(row) for row in engine_rows([compared.outcome("lora-r2")])} == {len(ON_ENGINE)}


def test_a_method_without_a_rank_is_tried_once(request_of: Callable[..., Request]) -> None:
    found = trials(request_of(methods=("lora", "full", "lora"), ranks=(4, 8, 4)))
    assert [(trial.name, trial.rank) for trial in found] == [("lora-r4", 4), ("lora-r8", 8), ("full", None)]


def test_the_mean_rank_of_adalora_is_a_rank(request_of: Callable[..., Request]) -> None:
    found = trials(request_of(methods=("adalora",), ranks=(2, 4)))
    assert [(trial.name, trial.rank) for trial in found] == [("adalora-r2", 2), ("adalora-r4", 4)]
    assert [method_of(trial)["target_r"] for trial in found] == [2, 4]


def test_the_recipes_initial_rank_of_adalora_is_left_out_at_other_mean_ranks(
    request_of: Callable[..., Request], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    method = {"name": "adalora", "target_r": 2, "init_r": 3}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), {"lights": adapter_of(method)})
    own, larger = (trials(request_of(recipe=recipe, methods=("adalora",), ranks=ranks))[0] for ranks in ((), (4,)))
    assert (method_of(own)["target_r"], method_of(own)["init_r"]) == (2, 3)
    assert (method_of(larger)["target_r"], method_of(larger)["init_r"]) == (4, None)


def test_alpha_follows_the_rank(request_of: Callable[..., Request]) -> None:
    small, large = trials(request_of(ranks=(2, 16)))
    assert (method_of(small)["lora_alpha"], method_of(large)["lora_alpha"]) == (4, 32)
    # rsLoRA divides by the square root of the rank.
    small, large = trials(request_of(methods=("rslora",), ranks=(4, 64)))
    assert (method_of(small)["lora_alpha"], method_of(large)["lora_alpha"]) == (4, 16)


def test_what_the_recipe_sets_holds_for_methods_that_weigh_alike(request_of: Callable[..., Request]) -> None:
    lora, dora, rslora = map(method_of, trials(request_of(methods=("lora", "dora", "rslora"), ranks=())))
    assert lora["target_modules"] == dora["target_modules"] == ["q_proj", "v_proj"]
    assert (dora["r"], dora["lora_alpha"]) == (lora["r"], lora["lora_alpha"]) == (4, 8)
    # Its alpha means another weight.
    assert (rslora["r"], rslora["lora_alpha"]) == (16, 8)


def test_settings_of_one_method_leave_the_others_alone(request_of: Callable[..., Request]) -> None:
    settings = {"lora.target_modules": "o_proj", "dora.training.learning_rate": "1e-4", "training.epochs": "2"}
    lora, dora = trials(request_of(methods=("lora", "dora"), settings=settings))
    recipes = [trial.one_task for trial in (lora, dora)]
    assert [recipe.training.under(recipe.adapters["lights"].training).learning_rate for recipe in recipes] == [
        5e-3,
        1e-4,
    ]
    assert [recipe.training.epochs for recipe in recipes] == [2, 2]
    assert (method_of(lora)["target_modules"], method_of(dora)["target_modules"]) == ("o_proj", ["q_proj", "v_proj"])


def test_a_method_that_no_format_holds_is_refused_without_training(request_of: Callable[..., Request]) -> None:
    request = request_of(methods=("bottleneck",), targets=("gguf",), out=request_of().out.with_name("refused"))
    with pytest.raises(IncompatibleError, match=r"none of 1 trials succeeded; bottleneck: gguf does not support"):
        compare(request, no_run, QUIET)
    assert "gguf does not support" in (request.out / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"methods": ("lora", "lroa")}, "no method 'lroa'; did you mean 'lora'?"),
        ({"task": "light"}, "no task 'light'; did you mean 'lights'?"),
        ({"task": "zzz"}, "no task 'zzz'; choose one of: lights, other"),
        ({"ranks": (4, 0)}, "0 is not a rank; use whole numbers of at least 1"),
        ({"limit": 0}, "a limit of 0 rows leaves nothing to score; use at least 1"),
        ({"settings": {"lora.r": "4"}}, "ranks and setting lora.r are both given, and set the same; keep one"),
        ({"settings": {"lora.rank": "4"}}, "ranks and setting lora.rank are both given, and set the same; keep one"),
        (
            {"settings": {"adapters.lights.method.r": "4"}},
            "ranks and setting adapters.lights.method.r are both given, and set the same; keep one",
        ),
        (
            {"targets": ("gguf",), "settings": {"targets": "[onnx]"}},
            "targets and setting targets are both given, and set the same; keep one",
        ),
        ({"settings": {"dora.r": "2"}}, "dora has settings, but is not among the methods; add it, or remove these"),
    ],
)
def test_an_invalid_request_is_refused_before_any_work(
    request_of: Callable[..., Request], tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError) as raised:
        compare(request_of(out=tmp_path / "out", **keys), no_run, QUIET)
    assert str(raised.value) == told
    assert not (tmp_path / "out").exists()


def test_wrong_data_and_a_wrong_folder_are_refused_before_any_work(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is not a folder; choose another folder"):
        edgetune.compare(request_of().recipe, "lights", ["lora"], tmp_path / "file")
    with pytest.raises(EdgetuneError, match="no-such"):
        compare(request_of(out=tmp_path / "out", data="no-such.jsonl"), no_run, QUIET)


def test_one_comparison_at_a_time_uses_a_folder(request_of: Callable[..., Request], tmp_path: Path) -> None:
    request = request_of(out=tmp_path / "out")

    def run(_trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
        with pytest.raises(UsageError, match=r"another process is using .*out; wait until it has ended, or choose"):
            compare(request, no_run, QUIET)
        yield from ()
        raise KeyboardInterrupt

    with pytest.raises(CancelledError):
        compare(request, run, QUIET)


def noting(given: list[Any], what: Callable[[Trial], object]) -> Callable[..., Iterator[TrialResult]]:
    """Runs trials that note something of themselves in `given`, and fail."""

    def run(trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
        for trial in trials:
            given.append(what(trial))
            yield trial.without_figures("failed", "for the test")

    return run


@pytest.mark.usefixtures("forked_converter")
def test_all_trials_get_the_quantization_that_the_board_picks_and_a_folder_is_converted_once(
    tiny_folder: Callable[[str], Path], slow_board: Callable[..., str], tmp_path: Path
) -> None:
    given: list[str | None] = []
    recipe = write_recipe(tmp_path, tiny_folder("llama"), TASKS, device=slow_board())
    request = Request(recipe, "lights", ("lora", "full"), tmp_path / "out", ranks=(2,), limit=3)
    with pytest.raises(EdgetuneError, match="none of 2 trials succeeded"):
        compare(request, noting(given, lambda trial: trial.one_task.quantization), QUIET)
    assert given == ["q4_0", "q4_0"]
    (base,) = (tmp_path / "out/shared/base").iterdir()
    assert base.name.endswith("-q4_0.gguf")


def test_all_trials_get_the_base_of_one_importance_matrix(request_of: Callable[..., Request], tmp_path: Path) -> None:
    given: list[tuple[str, str | None, int | None]] = []
    settings = {"quantization": "q4_0", "imatrix": "auto"}
    request = request_of(rows=(8, 16), settings=settings, out=tmp_path)
    with pytest.raises(EdgetuneError, match="none of 2 trials succeeded"):
        compare(request, noting(given, lambda trial: (trial.one_task.base, trial.one_task.imatrix, trial.rows)), QUIET)
    (base,) = (tmp_path / "shared/base").rglob("*.gguf")
    assert given == [(str(base), None, 8), (str(base), None, 16)]


def test_all_trials_get_the_quantization_that_was_measured_once(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    given: list[str | None] = []
    request = request_of(rows=(8, 16), settings={"quantization": "auto"}, out=tmp_path)
    with pytest.raises(EdgetuneError, match="none of 2 trials succeeded"):
        compare(request, noting(given, lambda trial: trial.one_task.quantization), QUIET)
    measured = json.loads((tmp_path / "shared/base/quantizations.json").read_text())["measured"]
    assert given == [min(measured, key=lambda item: item["kl"])["quantization"]] * 2


def test_an_interrupt_reports_how_many_trials_are_finished(request_of: Callable[..., Request], tmp_path: Path) -> None:
    def run(trials: Sequence[Trial], _progress: Progress) -> Iterator[TrialResult]:
        yield trials[0].without_figures("failed", "for the test")
        raise KeyboardInterrupt

    request = request_of(out=tmp_path / "out", ranks=(2, 4))
    with pytest.raises(CancelledError, match="stopped with 1 of 2 trials finished; run the same command to resume"):
        compare(request, run, QUIET)


def test_an_interrupt_ends_the_trial_that_runs(request_of: Callable[..., Request], tmp_path: Path) -> None:
    request = request_of(out=tmp_path / "out", settings={"training.max_steps": 100_000})
    with pytest.raises(CancelledError, match="comparison stopped with 0 of 1 trials finished; "):
        compare(request, run_here, Listening(stop_at="lora-r2: "))
    wait_for(lambda: not running(tmp_path))


def test_a_trial_ends_when_its_parent_is_gone() -> None:
    trial = "import time; from edgetune.common.module_process import end_with_parent; end_with_parent(); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", trial], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--ranks", "4,x"), "--ranks: '4,x' is not a list of whole numbers; write it as --ranks 4,16"),
        (("--rows", "few"), "--rows: 'few' is not a list of whole numbers; write it as --rows 4,16"),
        (("--rows", "4,17"), "17 rows are more than the 16 training rows of lights; use at most 16"),
        (("--rows", "0"), "0 is not a number of training rows; use whole numbers of at least 1"),
        (("--engine", "spark"), "no engine 'spark'; choose one of: local, ray"),
        (("--targets", "ggfu,onnx"), "--targets: no format 'ggfu'; did you mean 'gguf'?"),
        (("--set", "lora.q=1"), "setting adapters.lights.method: "),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(
    request_of: Callable[..., Request], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    request = request_of()
    out = str(request.out.with_name("never"))
    command = ["compare", str(request.recipe), "--task", "lights", "--methods", "lora", "--out", out]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"edgetune: {told}")
    assert len(error.splitlines()) == 1


def test_json_is_the_last_line_of_what_is_printed(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared.request.out, tmp_path / "out")
    recipe, out = str(compared.request.recipe), str(tmp_path / "out")
    command = ["compare", recipe, "--task", "lights", "--methods", "lora", "--ranks", "2", "--limit", "3", "--out", out]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    assert (told["recommended"], [trial["name"] for trial in told["trials"]]) == ("lora-r2", ["lora-r2"])
    assert "lora-r2 is already finished" in printed.err
    assert main([*command, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "recommended: lora-r2 in " in printed.out
    assert printed.err == ""


def running(folder: Path) -> list[str]:
    """Command lines of processes that work in `folder`."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if str(folder) in line]


def test_without_ray_the_extra_is_named(request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IncompatibleError, match=r'engine ray needs Ray; run: pip install "edgetune\[ray\]"'):
        list(run_on_ray(trials(request_of()), QUIET))

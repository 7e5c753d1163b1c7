from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest
from recipes import LIGHTS, PLAIN, adapter_of, values_of, write_recipe, write_rows

import edgetune
from edgetune.common.work_folder import locked

SIGNATURES = {
    "build": "(recipe, out=None, on_progress=None, resume=True, *, into=None, engine='local', converter=None)",
    "compare": "(recipe, task, methods, out, *, ranks=(), targets=None, settings=None, data=None, limit=100, rows=(), "
    "engine='local', on_progress=None)",
    "evaluate": "(bundle, data, adapter=None, *, limit=None, engine=None, kv=None, on_progress=None)",
    "export": "(base, adapters, out, *, quantization=None, systems=None, merged=False, targets=('gguf',), "
    "converter=None, on_progress=None)",
    "learn": "(bundle, log, *, recipe=None, into=None, on_progress=None)",
    "plan": "(recipe, out=None, *, into=None)",
    "rebase": "(bundle, base=None, out=None, *, quantization=None, recipe=None, folder='', settings=None, data=None, "
    "margin=1.0, without_worse=False, converter=None, on_progress=None)",
    "Recipe.from_file": "(path, settings=None, flags=None)",
    "Recipe.from_dict": "(values, folder='', settings=None, flags=None)",
    "Build.open": "(self, **options)",
}
FIELDS = {
    "Build": ["bundle", "figures", "losses", "domain", "base", "trained", "prompts", "seconds", "router"],
    "BuildPlan": ["recipe", "source", "base", "adapters", "board", "domain", "needs", "training_device"],
    "BundleFigures": ["base", "quantization", "parameters", "base_mb", "adapters_mb", "total_mb"],
    "Change": [
        *("before", "after", "error", "rows", "conversations", "answers", "is_loss"),
        *("before_ms", "after_ms", "left_out", "still_wrong"),
    ],
    "Comparison": ["task", "base", "metric", "rows", "source", "outcomes", "recommended"],
    "Evaluation": ["score", "metric", "rows", "too_long", "details"],
    "Learned": ["bundle", "changes", "learned"],
    "Point": ["step", "epoch", "train_loss", "val_loss", "learning_rate"],
    "ProgressEvent": ["message", "step", "done", "total", "train_loss", "val_loss"],
    "Rebased": ["bundle", "changes", "before", "after", "margin", "left_out"],
    "ScoredRow": [
        "where",
        "prompt",
        "reference",
        "answer",
        "score",
        "kind",
        "log_odds",
        "confidence",
        "bits_per_byte",
        "written",
        "conversation",
    ],
}
PROBE = """
import sys
before = set(sys.modules)
import edgetune
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
edgetune.Recipe, edgetune.Build, edgetune.ProgressEvent, edgetune.build, edgetune.EdgetuneError
print("torch" in sys.modules)
"""


def shown(name: str) -> str:
    """The parameters of a public function, without their types."""
    owner, _, member = name.rpartition(".")
    function = getattr(getattr(edgetune, owner), member) if owner else getattr(edgetune, member)
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def recipe_of(base: Path, train: object = LIGHTS, **training: object) -> dict[str, Any]:
    return values_of(base, {"reply": adapter_of(train=train, **PLAIN)}, training)


class Recorder:
    """Keeps the events, and calls `then` at the first that is done with `at` parts of a training."""

    def __init__(self, at: int | None = None, then: Callable[[], None] = lambda: None) -> None:
        self.events: list[edgetune.ProgressEvent] = []
        self.at, self.then = at, then

    def __call__(self, event: edgetune.ProgressEvent) -> None:
        self.events.append(event)
        if event.step.startswith("training") and event.done == self.at:
            self.at = None
            self.then()

    @property
    def steps(self) -> list[int]:
        return [event.done for event in self.events if event.step == "training reply"]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_public_names_and_signatures_are_these() -> None:
    functions = {name.partition(".")[0] for name in SIGNATURES}
    assert set(edgetune.__all__) == set(dir(edgetune)) == {*functions, *FIELDS, "EdgetuneError"}
    assert {name: shown(name) for name in SIGNATURES} == SIGNATURES
    assert {name: [field.name for field in fields(getattr(edgetune, name))] for name in FIELDS} == FIELDS


def test_importing_brings_nothing_but_the_standard_library_and_names_bring_no_torch() -> None:
    command = [sys.executable, "-c", PROBE]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "['edgetune']\nFalse\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="builds"):
        _ = edgetune.builds


def test_plan_takes_rows_in_memory_and_leaves_nothing(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    plan = edgetune.plan(recipe_of(tiny_gguf("llama")), tmp_path / "home")
    rows = plan.adapters["reply"].rows
    assert rows is not None and (rows.train, rows.validation) == (8, 2)
    assert plan.needs is not None and plan.base.steps == ()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(edgetune.EdgetuneError, match="exists and is not a bundle of this version; choose"):
        edgetune.plan(recipe_of(tiny_gguf("llama")), tmp_path)


@pytest.fixture(scope="module")
def built(
    tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[edgetune.Build, Recorder]:
    """A build of rows in memory, with its events."""
    events = Recorder()
    out = tmp_path_factory.mktemp("api") / "home"
    return edgetune.build(recipe_of(tiny_gguf("llama")), out, on_progress=events), events


def test_a_build_of_rows_in_memory_has_a_bundle_figures_and_losses(built: tuple[edgetune.Build, Recorder]) -> None:
    build, _ = built
    assert [(point.step, point.val_loss > 0) for point in build.losses["reply"]][-1] == (6, True)
    assert build.figures["reply"]["val_loss"] == min(point.val_loss for point in build.losses["reply"])
    data = read_manifest(build.bundle).recipe["adapters"]["reply"]["data"]
    assert data["train"].startswith("10 rows from memory, sha256 ")
    with build.open(disk_mb=0) as runtime:
        assert isinstance(runtime, Runtime)
        assert runtime.generate(LIGHTS[0]["prompt"], adapter="reply", max_tokens=3).text


def test_a_build_warns_of_nothing_that_its_user_cannot_change(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tiny_gguf("llama"), max_steps=1, evals=1)
    recipe["adapters"] = {"reply": adapter_of("olora", train=LIGHTS)}
    with warnings.catch_warnings():
        for category in (FutureWarning, UserWarning):
            warnings.simplefilter("error", category)
        edgetune.build(recipe, tmp_path / "home", on_progress=Recorder())


def test_events_have_steps_messages_and_losses(built: tuple[edgetune.Build, Recorder]) -> None:
    _, recorder = built
    assert any(event.message.startswith("needs memory about ") and not event.step for event in recorder.events)
    training = [event for event in recorder.events if event.step == "training reply"]
    assert [event.done for event in training] == [*range(7)]
    assert {event.total for event in training} == {6}
    assert training[-1].train_loss is not None and training[-1].val_loss == built[0].losses["reply"][-1].val_loss


def test_rows_from_a_file_give_the_same_training_as_rows_in_memory(
    built: tuple[edgetune.Build, Recorder], tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe, events = write_recipe(tmp_path, tiny_gguf("llama"), {"reply": adapter_of(**PLAIN)}), Recorder()
    again = edgetune.build(recipe, built[0].bundle, on_progress=events)
    assert not events.steps
    assert again.losses == built[0].losses


def test_evaluate_scores_rows_of_each_kind(built: tuple[edgetune.Build, Recorder], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", LIGHTS)
    scores = [
        edgetune.evaluate(built[0].bundle, data, "reply", limit=3, on_progress=Recorder())
        for data in (LIGHTS, iter(LIGHTS), pd.DataFrame(LIGHTS), file, str(file))
    ]
    assert {(score.score, score.metric, score.rows) for score in scores} == {(scores[0].score, "exact", 3)}
    third = len(LIGHTS) / 3
    assert [int((int(row.where.split()[-1]) - 1) // third) for row in scores[0].details] == [0, 1, 2]
    with pytest.raises(edgetune.EdgetuneError, match="data row 1: has no 'completion'"):
        edgetune.evaluate(built[0].bundle, [{"prompt": "x"}], "reply")


def test_an_interrupt_is_a_keyboard_interrupt_and_the_next_build_resumes(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_gguf("llama"))
    with pytest.raises(KeyboardInterrupt, match="training reply stopped at step 2; run the same command to resume"):
        edgetune.build(recipe, tmp_path / "home", on_progress=Recorder(2, interrupt))
    assert not (tmp_path / "home").exists()
    resumed, anew = Recorder(3, interrupt), Recorder(2, interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        edgetune.build(recipe, tmp_path / "home", on_progress=resumed)
    assert resumed.steps == [2, 3]
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
        edgetune.build(recipe, tmp_path / "home", on_progress=anew, resume=False)
    assert anew.steps == [0, 1, 2]


def test_after_the_process_died_the_next_build_resumes(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe, dying = recipe_of(tiny_gguf("llama")), Recorder(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    died = multiprocessing.get_context("fork").Process(target=edgetune.build, args=(recipe, tmp_path / "home", dying))
    died.start()
    died.join(120)
    died.kill()
    assert died.exitcode == -signal.SIGKILL
    resumed = Recorder()
    edgetune.build(recipe, tmp_path / "home", on_progress=resumed)
    # The state was saved at the validation after step 4.
    assert resumed.steps == [4, 5, 6]


def test_two_builds_of_one_folder_at_once_are_one_error(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe, out = recipe_of(tiny_gguf("llama")), tmp_path / "home"

    def build_again() -> None:
        with pytest.raises(edgetune.EdgetuneError) as error:
            edgetune.build(recipe, out, on_progress=Recorder())
        assert str(error.value).startswith(f"another process is using {out}.work; wait until it has ended, or choose")

    assert edgetune.build(recipe, out, on_progress=Recorder(1, build_again)).figures
    with locked(tmp_path / "home.work"):
        pass


def test_two_builds_in_two_threads_are_as_one_alone_and_change_no_setting_of_torch(
    built: tuple[edgetune.Build, Recorder], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_gguf("llama"))

    def build(name: str) -> edgetune.Build:
        # Settings of the thread.
        with torch.inference_mode(), torch.device("meta"):
            return edgetune.build(recipe, tmp_path / name, on_progress=Recorder())

    torch.manual_seed(7)
    seed = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        builds = [*threads.map(build, ("a", "b"))]
    assert [each.losses for each in builds] == [built[0].losses] * 2
    assert torch.equal(torch.get_rng_state(), seed)


HOLDS = """
import sys
from pathlib import Path
from edgetune.common.work_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_process_that_was_killed_is_free_and_its_temporary_files_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "home.work")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(edgetune.EdgetuneError, match="another process is using"), locked(tmp_path / "home.work"):
            pass
        (tmp_path / "home.work" / ".state.pt.tmp-12-13").write_bytes(b"half")
        (tmp_path / "home.work" / ".tmp-abc" / "deep").mkdir(parents=True)
        (tmp_path / "home.work" / ".tmp-abc" / "deep" / ".x.tmp-1-2").write_bytes(b"half")
        process.kill()
    with locked(tmp_path / "home.work"):
        pass
    assert not list(tmp_path.iterdir())


def test_compare_takes_rows_in_memory(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    events, recipe = Recorder(), recipe_of(tiny_gguf("llama"), max_steps=2, evals=1)
    result = edgetune.compare(
        recipe, "reply", "lora", tmp_path / "out", targets="gguf", ranks=[2], data=LIGHTS[:2], on_progress=events
    )
    assert [(outcome.name, outcome.status) for outcome in result.outcomes] == [("lora-r2", "done")]
    assert result.rows == 2
    assert any(event.message.startswith("trial 1 of 1: lora-r2") for event in events.events)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapters": {"a b": "x"}},
            "adapters: the name 'a b' may contain only a-z, 0-9, _ and -, up to 100; choose another name",
        ),
        ({"systems": {"b": "x"}}, "systems: no adapter 'b'; choose one of: a"),
        ({"targets": ["ggfu"]}, "no format 'ggfu'; did you mean 'gguf'?"),
        ({"targets": "ggfu"}, "no format 'ggfu'; did you mean 'gguf'?"),
        ({"targets": ()}, "targets is empty; give at least one format, of: gguf, onnx"),
        ({"adapters": {}}, "adapters is empty; give at least one folder saved by PEFT"),
        ({"converter": "/nowhere"}, "/nowhere has no convert_hf_to_gguf.py; use a llama.cpp checkout"),
        ({}, "x is not a PEFT adapter: it has no adapter_config.json; use a folder"),
    ],
)
def test_a_wrong_request_of_an_export_is_one_error(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(edgetune.EdgetuneError) as error:
        edgetune.export(**{"base": "b", "adapters": {"a": "x"}, "out": "o", **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "home"}, "recipe: base: is missing\nrecipe: adapters: is missing"),
        ({**recipe_of(Path("x.gguf")), "epochs": 2}, "recipe: epochs: unknown key; did you mean 'training.epochs'?"),
        ({**recipe_of(Path("x.gguf"), [{"prompt": "x"}])}, "adapters.reply.data.train row 1: has no 'completion'"),
        ("missing.yaml", "no recipe missing.yaml; write one with `edgetune init`"),
        (7, "7 is not a recipe; give a Recipe, the path of a recipe file, or a mapping"),
    ],
)
def test_a_build_of_bad_input_is_one_error_and_leaves_nothing(
    recipe: Any,  # noqa: ANN401 - that is the point
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(edgetune.EdgetuneError) as error:
        edgetune.build(recipe, tmp_path / "home")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())

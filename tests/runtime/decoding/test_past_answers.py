from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.cli.main import main
from edgetune_runtime.decoding import past_answers
from edgetune_runtime.decoding.past_answers import PastAnswers
from edgetune_runtime.formats.checked_file import write_checked

VOCABULARY = 100
PROMPT = "turn on the warm light"
LENGTH = 30
SPANS = ((0, {"one": 1.0}),)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return past_answers.path_of(tmp_path, "home", "fingerprint")


def last(answers: PastAnswers, *prompt: int, adapter: str = "one") -> list[int]:
    return list(answers.of(adapter.split(), SPANS, prompt).tokens)


def keep(answers: PastAnswers, prompt: list[int], tokens: list[int], adapter: str = "one") -> None:
    answers.of(adapter.split(), SPANS, prompt).keep(tokens)


def test_the_last_answer_belongs_to_its_prompt_and_adapter() -> None:
    answers = PastAnswers(VOCABULARY)
    keep(answers, [1, 2], [7, 8])
    keep(answers, [1, 2], [9], adapter="two")
    keep(answers, [1, 2, 3], [])
    assert [last(answers, 1, 2), last(answers, 1, 2, adapter="two"), last(answers, 1, 2, 3)] == [[7, 8], [9], []]
    keep(answers, [1, 2], [7, 9, 9])
    assert last(answers, 1, 2) == [7, 9, 9]


def test_the_least_recently_given_answers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_answers, "MAX_BYTES", 3 * 258)
    answers = PastAnswers(VOCABULARY)
    for prompt in (1, 2, 3, 1, 4):
        keep(answers, [prompt], [prompt, 9])
    assert [last(answers, prompt) for prompt in (1, 2, 3, 4)] == [[1, 9], [], [3, 9], [4, 9]]
    keep(answers, [5], [9] * 80)
    assert [last(answers, prompt) for prompt in (1, 3, 4, 5)] == [[], [], [], [9] * 80]


def test_answers_survive_their_file_until_they_are_forgotten(file: Path) -> None:
    answers = PastAnswers(VOCABULARY, file)
    keep(answers, [1], [7, 8])
    keep(answers, [2], [9])
    answers.save()
    assert file.stat().st_mode & 0o077 == 0
    again = PastAnswers(VOCABULARY, file)
    assert [last(again, 1), last(again, 2)] == [[7, 8], [9]]
    again.clear()
    assert not file.exists()
    assert last(again, 1) == []
    assert past_answers.clear_all(file.parents[1]) == 0


def test_answers_are_looked_up_and_kept_while_a_slow_disk_writes_the_others(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, is_writing, is_slow = PastAnswers(VOCABULARY, file), threading.Event(), threading.Event()
    keep(answers, [1], [7, 8])
    monkeypatch.setattr(os, "fsync", lambda _: (is_writing.set(), is_slow.wait(30)))
    with ThreadPoolExecutor(1) as others:
        saved = others.submit(answers.save)
        assert is_writing.wait(30)
        keep(answers, [2], [9])
        assert last(answers, 1) == [7, 8]
        assert not saved.done()
        is_slow.set()
    assert [last(PastAnswers(VOCABULARY, file), prompt) for prompt in (1, 2)] == [[7, 8], []]
    answers.save()
    assert last(PastAnswers(VOCABULARY, file), 2) == [9]


def test_the_answers_of_one_adapter_are_forgotten_in_the_file_too(file: Path) -> None:
    answers, adapters = PastAnswers(VOCABULARY, file), ("", "one", "two", "one two")
    for adapter in adapters:
        keep(answers, [1], [7], adapter)
    answers.save()
    answers.forget("one")
    for each in (answers, PastAnswers(VOCABULARY, file)):
        assert [last(each, 1, adapter=adapter) for adapter in adapters] == [[7], [], [7], []]
    for adapter in ("two", ""):
        answers.forget(adapter)
    assert not file.exists()


def test_the_answers_of_adapters_that_are_gone_leave_the_file_when_it_is_written(file: Path) -> None:
    answers, adapters = PastAnswers(VOCABULARY, file, lambda: ["one", "two"]), ("", "one", "two", "one two")
    for adapter in adapters:
        keep(answers, [1], [7], adapter)
    answers.save()
    later = PastAnswers(VOCABULARY, file, lambda: ["two"])
    keep(later, [2], [7], "two")
    later.save()
    again = PastAnswers(VOCABULARY, file)
    assert [last(again, 1, adapter=adapter) for adapter in adapters] == [[7], [], [7], [7]]
    alone = PastAnswers(VOCABULARY, file.with_name("alone.bin"), list)
    keep(alone, [1], [7])
    alone.save()
    assert not file.with_name("alone.bin").exists()


@pytest.mark.parametrize(
    ("about", "tokens"),
    [
        ({"answers": [["00", 2]]}, [7, VOCABULARY]),
        ({"answers": [["00", 3]]}, [7, 8]),
        ({"answers": [["00", -1], ["01", 3]]}, [7, 8]),
        ({"answers": [["no hex", 2]]}, [7, 8]),
        ({"answers": [["00", {}]]}, [7, 8]),
        ({"answers": {}}, []),
        ({}, [7, 8]),
    ],
)
def test_a_file_that_is_not_one_of_past_answers_is_ignored_with_a_warning(
    file: Path, about: dict[str, Any], tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir(parents=True)
    write_checked(file, past_answers.KIND, about, memoryview(array("I", tokens)).cast("B"))
    answers = PastAnswers(VOCABULARY, file)
    assert f"ignored the past answers in {file}" in caplog.text
    keep(answers, [1], [7])
    answers.save()
    assert last(PastAnswers(VOCABULARY, file), 1) == [7]


def test_a_damaged_file_is_ignored_and_a_folder_that_cannot_be_made_is_no_error(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = PastAnswers(VOCABULARY, file)
    keep(answers, [1], [7, 8])
    answers.save()
    file.write_bytes(file.read_bytes()[:-1])
    assert last(PastAnswers(VOCABULARY, file), 1) == []
    inside_a_file = PastAnswers(VOCABULARY, file / "past-answers" / "home.bin")
    keep(inside_a_file, [1], [7, 8])
    inside_a_file.save()
    assert "cannot save past answers" in caplog.text


def test_a_folder_of_another_user_is_no_error(unreadable: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = PastAnswers(VOCABULARY, past_answers.path_of(unreadable, "home", "fingerprint"))
    keep(answers, [1], [7, 8])
    answers.save()
    assert last(answers, 1) == [7, 8]
    assert "cannot save past answers" in caplog.text


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def opening(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"engine": request.param, "disk_mb": 0}


@pytest.fixture(scope="module")
def bundle(prompted_of: Callable[[str], Path]) -> Path:
    return prompted_of("llama")


def test_an_answer_that_comes_again_takes_fewer_steps(bundle: Path, opening: dict[str, Any]) -> None:
    with Runtime.open(bundle, **opening, learn_drafts="memory") as runtime:
        for adapter in (None, "one"):
            first, second = (runtime.generate(PROMPT, adapter=adapter, max_tokens=LENGTH) for _ in range(2))
            assert first.text == second.text
            assert first.timings.accepted < second.timings.accepted == second.timings.drafted
            assert second.timings.tokens_per_step > 10
        for name in ("one", "two"):
            runtime.remove_adapter(name)
        runtime.add_adapter(bundle, "one")
        again = [runtime.generate(PROMPT, adapter=adapter, max_tokens=LENGTH).timings for adapter in ("one", None)]
        assert again[0].tokens_per_step < 2 and again[1].tokens_per_step > 10
        runtime.clear_cache()
        assert runtime.generate(PROMPT, max_tokens=LENGTH).timings.tokens_per_step < 2


def test_what_was_learned_stays_on_disk_until_it_is_forgotten(
    bundle: Path, opening: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokens_per_step(learn_drafts: str) -> float:
        with Runtime.open(bundle, **opening, cache_folder=tmp_path, learn_drafts=learn_drafts) as runtime:
            return runtime.generate(PROMPT, max_tokens=LENGTH).timings.tokens_per_step

    assert tokens_per_step("memory") < 2
    assert tokens_per_step("disk") < 2
    assert tokens_per_step("disk") > 10
    assert main(["cache", "clear", "--cache-folder", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["past_answers"] == 1
    assert tokens_per_step("disk") < 2


def test_calls_at_the_same_time_learn_from_each_other(bundle: Path, opening: dict[str, Any]) -> None:
    with Runtime.open(bundle, **opening, contexts=3, learn_drafts="memory") as runtime:

        def answer(prompt: str) -> str:
            return runtime.generate(prompt, adapter="one", max_tokens=LENGTH).text

        expected = {prompt: answer(prompt) for prompt in ("turn", "play", "stop")}
        with ThreadPoolExecutor(3) as threads:
            prompts = [*expected] * 4
            assert list(threads.map(answer, prompts)) == [expected[prompt] for prompt in prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_drafts": "yes"}, "learn_drafts is 'yes'"),
        ({"learn_drafts": "disk", "drafts": False}, "drafts is False"),
    ],
)
def test_learning_without_drafts_or_somewhere_else_is_refused(
    bundle: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Runtime.open(bundle, **options)

"""The triage example: its rows and recipes, and its app with both bundles built on tiny bases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from edgetune_runtime import Runtime
from examples.conftest import EXAMPLES
from recipes import write_rows

from edgetune.cli.main import main
from edgetune.recipe.model import Recipe

TRIAGE = EXAMPLES / "triage"
DATA = TRIAGE / "data"
SPLITS = ("train", "test")
LABELS = Recipe.from_file(TRIAGE / "sort.yaml").adapters["topic"].labels
TOPICS = {"what is the time": "hours", "set the heat": "booking", "open the blind": "price", "play red warm": "spam"}


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("split", "count"), list(zip(SPLITS, (30, 8), strict=True)))
def test_each_topic_has_the_same_number_of_messages(split: str, count: int) -> None:
    assert Counter(row["label"] for row in rows(f"topic-{split}")) == dict.fromkeys(LABELS or [], count)


def test_no_message_of_the_test_rows_is_trained() -> None:
    texts = {split: {row["text"].lower() for row in rows(f"topic-{split}")} for split in SPLITS}
    messages = {split: {row["prompt"].partition("\n")[2] for row in rows(f"reply-{split}")} for split in SPLITS}
    assert not texts["train"] & texts["test"]
    assert not messages["train"] & messages["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_reply_reports_the_numbers_and_days_of_its_fact_and_no_others(split: str) -> None:
    for row in rows(f"reply-{split}"):
        fact, _, message = row["prompt"].partition("\n")
        assert message
        assert fact.partition(":")[0] in set(LABELS or []) - {"spam"}
        assert figures(row["completion"]) == figures(fact), row


def figures(text: str) -> set[str]:
    """The numbers and days in a text."""
    words = {word.strip(",.:?") for word in text.split()}
    return {word for word in words if word[:1].isdigit() or word.endswith("day")} - {"today"}


@pytest.fixture(scope="module")
def bundles(
    tiny_gguf: Callable[[str], Path], tiny_encoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Both recipes on tiny bases. The encoder knows few words, so it learns the messages of TOPICS instead."""
    folder = tmp_path_factory.mktemp("triage")
    rows = [{"text": text, "label": label} for text, label in TOPICS.items()]
    topics, again = (write_rows(folder / f"{name}.jsonl", rows) for name in ("topics", "again"))
    data = f"adapters.topic.data={{train: {topics}, validation: {again}}}"
    learned = (
        "context_length=64",
        data,
        "adapters.topic.training.epochs=40",
        "adapters.topic.training.learning_rate=1e-2",
    )
    build_tiny("sort", folder, tiny_encoder("bert"), *learned)
    build_tiny("reply", folder, tiny_gguf("llama"), "adapters.reply.data.rows=40", "training.max_steps=2")
    return folder / "sort", folder / "reply"


def build_tiny(name: str, folder: Path, base: Path, *settings: str) -> None:
    """Build NAME.yaml with the command of the README and these settings."""
    settings = (f"base={base}", "threads=1", "training.precision=fp32", *settings)
    changes = [word for setting in settings for word in ("--set", setting)]
    assert main(["build", str(TRIAGE / f"{name}.yaml"), "--out", str(folder / name), *changes]) == 0


def test_the_rows_of_the_encoder_fit_its_recipe(tiny_encoder: Callable[[str], Path]) -> None:
    base = tiny_encoder("bert")
    assert main(["plan", str(TRIAGE / "sort.yaml"), "--set", f"base={base}", "--set", "context_length=64"]) == 0


@pytest.fixture
def app() -> ModuleType:
    """app.py as a module."""
    spec = spec_from_file_location("triage_app", TRIAGE / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_app_sorts_with_one_bundle_and_replies_with_the_other(
    app: ModuleType, bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", *map(str, bundles), *TOPICS])
    app.main()
    lines = capsys.readouterr().out.splitlines()
    with Runtime.open(bundles[1]) as writer:
        for message, topic in TOPICS.items():
            start = lines.index(f"> {message}")
            assert lines[start + 1].split()[:2] == ["topic", topic]
            reply = "(none)"
            if topic != "spam":
                prompt = f"{topic}: {app.look_up(topic, message)}\n{message}"
                reply = writer.generate(prompt, adapter="reply", max_tokens=60).text
            assert lines[start + 2] == f"  reply    {reply}".splitlines()[0]


def test_a_message_without_a_clear_topic_gets_no_reply(
    app: ModuleType, bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = next(iter(TOPICS))
    with Runtime.open(bundles[0]) as sorter, Runtime.open(bundles[1]) as writer:
        mailbox = app.Mailbox(sorter, writer)
        assert mailbox.answer(message) is not None
        monkeypatch.setattr(app, "SURE", 1.01)
        assert mailbox.answer(message) is None


def test_a_price_is_looked_up_by_the_word_in_the_message(app: ModuleType) -> None:
    assert app.look_up("price", "What would a new Chain cost?") == "a new chain, 35 euros"
    assert app.look_up("price", "and a tandem?") == "not in the list"


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(TRIAGE / "app.py"), str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

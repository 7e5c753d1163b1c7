from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from edgetune_devices import boards
from edgetune_export.backends.base import EncoderSource
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.bundle.records import Scope
from recipes import adapter_of, lights, write_recipe, write_rows
from runtime.bundles import Adapter, change_manifest, low_rank, write_bundle
from runtime.encoders import write_encoder_bundle

from edgetune.building.encoder.verify import Agreement
from edgetune.cli.main import main
from edgetune.report import answers
from edgetune.report.facts import facts_of
from edgetune.report.render import HEIGHT, WIDTH, card, curve
from edgetune.tasks.data import read_rows
from edgetune.tasks.evaluation import Evaluation, ScoredRow
from edgetune.tasks.splitting import split

HISTORY = [
    {"step": 10, "train_loss": 2.0, "val_loss": 1.5},
    {"step": 20, "train_loss": 1.0, "val_loss": 0.5},
    {"step": 40, "train_loss": 0.5, "val_loss": 0.75},
]
TRAINING: dict[str, Any] = {
    "train_loss": 0.5, "val_loss": 0.5, "shipped_step": 20, "steps": 40, "overfit_step": 20, "tokens": 12345,
    "seconds": 3.0, "history": HISTORY,
}  # fmt: skip
BINS = [[0.55, 0.5, 10], [0.95, 0.9, 40]]
SURE: dict[str, Any] = {
    "rows": 50, "right": 0.82, "slope": 0.5, "offset": 0.1, "error": 0.0321, "error_if_exact": 0.05, "bins": BINS,
}  # fmt: skip
NAME = "<b>task"


class Page(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapters `task`, whose training is known, and `other`."""
    base = tiny_gguf("llama")
    adapters = {"task": Adapter(low_rank(base, seed=1), system=NAME), "other": Adapter(low_rank(base, seed=2))}
    path = write_bundle(tmp_path_factory.mktemp("report") / "home", base, adapters, context_length=64)
    parity = {"gguf": {"kl": 0.02, "top1": 0.975, "greedy": 0, "tokens": 80}}
    recipe = {"training": {"seed": 0}, "adapters": {"task": {"data": {"train": "rows.jsonl"}}}}
    change_manifest(path, lambda raw: raw["adapters"]["task"].update(training=TRAINING, parity=parity))
    curves = {"value": SURE, "question": {"rows": 3, "right": 1.0}}
    change_manifest(path, lambda raw: raw["adapters"]["task"].update(confidence={"gguf": curves}))
    change_manifest(path, lambda raw: raw.update(versions={"edgetune": "1.2"}, recipe=recipe))
    return path


@pytest.fixture(scope="module")
def text(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the bundle, in a folder that was not there."""
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert main(["report", str(bundle), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_shows_training_parity_and_boards_without_reaching_outside(text: str) -> None:
    page = Page(text)
    for part in ("rows.jsonl: 12,345 tokens in 40 steps", "validation rose after step 20", NAME):
        assert part in page.text
    assert "2.0e-02 97.5% 0 80" in " ".join(page.text.split())
    assert all(name in page.text for name in boards.names())
    assert "MB, f16" in page.text, "the type of most of the base's values"
    assert "script" not in page.tags
    assert "b" not in page.tags, "the texts of a bundle are escaped"
    assert page.links == []
    assert "http" not in text


def test_the_page_of_an_encoder_shows_its_parity(
    encoder_source: Callable[[str], EncoderSource], tmp_path: Path
) -> None:
    bundle = write_encoder_bundle(encoder_source("bert"), tmp_path)
    parity = {"onnx": asdict(Agreement(kl=0.02, top1=0.975, difference=0.1, rows=8))}
    change_manifest(bundle, lambda raw: raw["adapters"]["place"].update(parity=parity, training=TRAINING))
    change_manifest(bundle, lambda raw: raw["base"].update(parity={"onnx": {"difference": 0.1, "cosine": 0.99}}))
    change_manifest(bundle, lambda raw: raw.update(versions={"edgetune": "1.2"}))
    assert main(["report", str(bundle), "--out", str(tmp_path / "page.html")]) == 0
    text = " ".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).text.split())
    assert "placeonnx 2.0e-02 97.5% - 8" in text and "baseonnx - - 0.9900 -" in text
    assert "Loss in nats per row" in text and "of the labels' distribution" in text and "KV cache" not in text
    lines = card(facts_of(bundle, read_manifest(bundle))).splitlines()
    assert [line for line in lines if line.startswith(("| base | onnx", "| place | onnx"))] == [
        "| base | onnx | - | - | 0.9900 |",
        "| place | onnx | 2.0e-02 | 97.5% | - |",
    ]


def test_the_page_draws_how_well_the_confidence_is_calibrated(text: str) -> None:
    assert text.count('class="bin"') == len(BINS)
    assert f'cx="{HEIGHT * 0.55}" cy="{HEIGHT * 0.5}"' in text
    assert "gguf, value" in Page(text).text and "error 0.03 (0.05 if exact)" in Page(text).text
    assert "gguf had only 3 question answers, too few for a confidence" in Page(text).text


def test_the_page_says_what_each_min_confidence_leaves(text: str) -> None:
    # Of 50 answers, 9 are wrong; of the 40 surest ones, 4.
    row = "min_confidence 0.5 0.6 0.7 0.8 0.9 gguf, value 100%, 18.0% wrong 80%, 10.0% wrong 80%, 10.0% wrong"
    assert row in " ".join(Page(text).text.split())


def test_the_page_says_where_answers_have_no_confidence(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    change_manifest(copy, lambda raw: raw["adapters"]["other"].update(metric="rouge_l"))
    said, page = "none was fitted; it takes answers to at least 20 rows", tmp_path / "page.html"
    assert main(["report", str(copy), "--out", str(page)]) == 0
    assert said not in Page(page.read_text(encoding="utf-8")).text
    change_manifest(copy, lambda raw: raw["adapters"]["task"].update(confidence={}))
    assert main(["report", str(copy), "--out", str(page)]) == 0
    assert said in Page(page.read_text(encoding="utf-8")).text


def test_the_page_says_what_is_found_out_of_scope(bundle: Path, tmp_path: Path) -> None:
    copy, page = Path(shutil.copytree(bundle, tmp_path / "bundle")), tmp_path / "page.html"
    scope = {"gguf": asdict(Scope("other", 0.0, 0.05, 0.81))}
    change_manifest(copy, lambda raw: raw["adapters"]["task"].update(scope=scope))
    assert main(["report", str(copy), "--out", str(page)]) == 0
    told = "other, gguffound 81% of texts that fit no label, and refused 5% of the validation rows with one"
    assert told in " ".join(Page(page.read_text(encoding="utf-8")).text.split())


def test_a_score_is_shown_with_its_metric(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "score.json").write_text('{"score": 0.875, "metric": "exact", "rows": 40, "too_long": 0}\n')
    out = tmp_path / "page.html"
    assert main(["report", str(bundle), "--out", str(out), "--score", f"task={tmp_path / 'score.json'}"]) == 0
    assert "exact 0.875 on 40 rows" in Page(out.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("none=", '{"score": 1, "metric": "exact", "rows": 4}', "no adapter 'none'"),
        ("task=", "0.875", "is not the output of edgetune evaluate --json"),
        ("task=", "", "is not the output of edgetune evaluate --json"),
    ],
)
def test_an_invalid_score_file_is_a_one_line_error(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, content: str, message: str
) -> None:
    (tmp_path / "score.json").write_text(content)
    out = tmp_path / "page.html"
    assert main(["report", str(bundle), "--out", str(out), "--score", f"{option}{tmp_path / 'score.json'}"]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not out.exists()


def test_a_report_takes_no_place_of_a_file_that_it_reads(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", lights(3))
    before = rows.read_bytes()
    assert main(["report", str(bundle), "--data", f"task={rows}", "--out", str(rows)]) == 2
    message = f"{rows} is not an .html file, and pages are written as HTML; name it .html"
    assert message in capsys.readouterr().err
    assert rows.read_bytes() == before


def test_a_report_is_not_written_into_the_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(bundle), "--out", str(bundle / "page.html")]) == 2
    assert f"page.html is inside the bundle {bundle}; give a file beside it" in capsys.readouterr().err
    assert not (bundle / "page.html").exists()


def test_a_recipe_of_other_adapters_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, "base.gguf", {"heating": adapter_of()}), tmp_path / "page.html"
    assert main(["report", str(bundle), "--recipe", str(recipe), "--out", str(out)]) == 2
    message = f"{recipe} has none of the adapters task, other; give the recipe that trained them"
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_right_and_wrong_answers_of_a_file_are_shown(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    labels = ("on", "off")
    bundle = write_bundle(tmp_path / "home", base, {"task": Adapter(low_rank(base, seed=1), labels=labels)})
    change_manifest(bundle, lambda raw: raw["adapters"]["task"].update(metric="label"))
    # One of the two answers is right, whichever the adapter gives.
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "say <i>", "label": label} for label in labels])
    out = tmp_path / "page.html"
    assert main(["report", str(bundle), "--data", f"task={rows}", "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "label 0.5 on 2 rows" in text
    assert "A box per answer to 2 rows of rows.jsonl: 1 right, 1 wrong." in text
    right, _, wrong = text.partition("Right answers")[2].partition("Wrong answers")
    assert right.strip() in ("say <i>on", "say <i>off")
    assert wrong.strip().startswith(("say <i>on expected: off", "say <i>off expected: on"))
    assert "i" not in page.tags, "the texts of rows are escaped"


@pytest.mark.parametrize("is_built", [True, False])
def test_the_rows_are_those_that_the_build_held_out_or_the_recipe_if_there_was_none(
    is_built: bool, bundle: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copied")
    other = adapter_of(held_out=0.5, training={"seed": 3, "checkpoint": "last"})
    change_manifest(copied, lambda raw: raw["recipe"]["adapters"].update({"other": other} if is_built else {}))
    own = {"other": adapter_of() if is_built else other}
    adapters, rows = {**own, "more": adapter_of(train="none")}, lights(6)
    recipe = write_recipe(tmp_path, "b", adapters, data={"rows.jsonl": rows})
    out = tmp_path / "page.html"
    assert main(["report", str(copied), "--recipe", str(recipe), "--out", str(out)]) == 0
    _, held_out = split(read_rows(str(tmp_path / "rows.jsonl")), 0.5, 3, "exact")
    text = Page(out.read_text(encoding="utf-8")).text
    assert f"A box per answer to {len(held_out)} rows of its validation data" in text
    assert ("which also chose the checkpoint" in text) is not is_built
    shown = {row["prompt"] for row in rows if row["prompt"] in text}
    assert shown == {row.messages[-1]["content"] for row in held_out if row.messages}


def test_the_report_doubts_a_split_of_other_rows_than_the_build_had(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, out = shutil.copytree(bundle, tmp_path / "copied"), tmp_path / "page.html"
    own, plan = adapter_of(training={"seed": 0}), {"adapters": {"other": {"rows": {"train": 5, "validation": 1}}}}
    change_manifest(copied, lambda raw: raw["recipe"]["adapters"].update({"other": own}))
    change_manifest(copied, lambda raw: raw.update(plan=plan))
    doubt = "the rows or data options changed since the build, so some validation rows may have been trained on"
    for count, is_doubted in ((6, False), (7, True)):
        recipe = write_recipe(tmp_path, "b", {"other": adapter_of()}, data={"rows.jsonl": lights(count)})
        assert main(["report", str(copied), "--recipe", str(recipe), "--out", str(out)]) == 0
        assert (f"warning: other: {doubt}: build again" in capsys.readouterr().err) is is_doubted
        assert (doubt in Page(out.read_text(encoding="utf-8")).text) is is_doubted


@pytest.mark.parametrize(
    ("metric", "points", "best", "worst"),
    [
        ("exact", (1, 1, 1, 1, 1, 1, 1), "abc", ""),
        ("exact", (1, 0, 1, 0, 0, 0, 0), "a", "aed"),
        ("rouge_l", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), "abc", "aed"),
    ],
)
def test_the_best_and_the_worst_answers_are_shown_where_prompts_repeat(
    metric: str, points: tuple[float, ...], best: str, worst: str
) -> None:
    rows = [ScoredRow("", prompt, "", "", point) for prompt, point in zip("abacdea", points, strict=True)]
    score = answers._score(Evaluation(0.5, metric, len(rows), 0, tuple(rows)), "rows")
    assert ["".join(answer.prompt for answer in shown) for shown in (score.best, score.worst)] == [best, worst]


def test_a_golden_answer_is_shown_where_no_row_is_answered(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copied")
    golden = {"gguf": {"prompt": "hi <u>", "answer": "hello <u>", "max_tokens": 4}}
    change_manifest(copied, lambda raw: raw["adapters"]["task"].update(golden=golden))
    out = tmp_path / "page.html"
    assert main(["report", str(copied), "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert "hi <u>" in page.text and "hello <u>" in page.text and "u" not in page.tags


def test_a_curve_spans_the_plot_and_marks_the_checkpoint_that_ships_and_what_follows(bundle: Path) -> None:
    task, other = facts_of(bundle, read_manifest(bundle)).adapters
    drawn = curve(task)
    assert drawn is not None
    assert (drawn.highest, drawn.lowest, drawn.first_step, drawn.last_step) == (2.0, 0.5, 10, 40)
    assert (drawn.rose_from, drawn.ships) == (WIDTH / 3, (WIDTH / 3, HEIGHT))
    assert drawn.train == f"0.0,0.0 {WIDTH / 3:.1f},{HEIGHT * 2 / 3:.1f} {WIDTH:.1f},{HEIGHT:.1f}"
    assert curve(other) is None


def test_the_model_card_has_metadata_and_a_row_per_adapter(bundle: Path) -> None:
    text = card(facts_of(bundle, read_manifest(bundle)))
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["tags"] == ["edgetune", "gguf"]
    assert metadata["pipeline_tag"] == "text-generation"
    rows = [line for line in body.splitlines() if line.startswith(("| task", "| other"))]
    assert [row.split(" | ")[3] for row in rows if "gguf | 2.0e-02" not in row] == ["rows.jsonl", "-"]
    assert "| task | gguf | 2.0e-02 | 97.5% |" in rows
    assert "`edgetune-run adapters ls .` lists those that it has now" in body


def test_the_model_card_classifies_with_adapters_that_have_labels(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copied")
    assert "\nedgetune-run generate . --adapter task " in card(facts_of(copied, read_manifest(copied)))
    change_manifest(copied, lambda raw: raw["adapters"]["task"].update(labels=["on", "off"]))
    assert "\nedgetune-run classify . --adapter task " in card(facts_of(copied, read_manifest(copied)))


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) != 0
    assert "is not a bundle" in capsys.readouterr().err

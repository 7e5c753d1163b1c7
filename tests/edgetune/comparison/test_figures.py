from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from matplotlib.figure import Figure

from edgetune.bases import Base, load_torch
from edgetune.comparison import figures, plots
from edgetune.comparison.columns import busy_notes, engine_rows, placement_rows
from edgetune.comparison.figures import BoardFit, EngineFigures, TrialResult, standard_error
from edgetune.comparison.page import page
from edgetune.comparison.recommend import Recommendation, recommend
from edgetune.comparison.sweep import Comparison
from edgetune.comparison.torch_engine import TorchEngine
from edgetune.shipping.verify import logits_of
from edgetune.training.job import Point, TrainResult

TRAINED = TrainResult(
    train_loss=0.2,
    val_loss=0.3,
    shipped_step=10,
    steps=10,
    overfit_step=None,
    trainable_parameters=1000,
    total_parameters=100_000,
    tokens=5000,
    tokens_per_s=500.0,
    peak_memory_mb=900.0,
    seconds=10.0,
    precision="fp32",
    device="cpu",
    history=[Point(5, 0.5, 1.0, 0.9, 1e-3), Point(10, 1.0, 0.2, 0.3, 1e-3)],
)


def engine(score: float, size: int, *, error: float = 0.02, speed: float = 50.0) -> EngineFigures:
    return EngineFigures("low_rank", size, score, error, 1e-3, 90.0, speed, 88.0, 4.0, 20.0)


def outcome(name: str, board: BoardFit | None = None, metric: str = "exact", **engines: EngineFigures) -> TrialResult:
    return TrialResult(name, name, None, "done", "", TRAINED, metric, 100, 0.9, engines, {}, board)


def recommended(*outcomes: TrialResult) -> Recommendation:
    found = recommend(outcomes)
    assert found is not None
    return found


def test_the_smallest_within_one_standard_error_is_recommended() -> None:
    found = recommended(
        outcome("large", gguf=engine(0.95, 9_000_000)),
        outcome("middle", gguf=engine(0.935, 4_000_000), onnx=engine(0.94, 8_000_000)),
        outcome("small", gguf=engine(0.92, 1_000_000)),
    )
    assert (found.name, found.target) == ("middle", "gguf")
    assert found.reason == (
        "middle in gguf is the smallest adapter (4.00 MB) whose exact on the device's engine (0.935) is within one "
        "standard error (0.02) of the best (0.95, large in gguf)"
    )


def test_the_best_is_recommended_where_no_smaller_one_is_as_good() -> None:
    found = recommended(outcome("small", onnx=engine(0.5, 1)), outcome("large", gguf=engine(0.9, 9_000_000)))
    assert (found.name, found.target) == ("large", "gguf")
    assert "large in gguf has the best exact (0.9)" in found.reason


def test_of_adapters_of_the_same_size_the_better_one_is_recommended() -> None:
    found = recommended(outcome("one", gguf=engine(0.9, 10)), outcome("two", gguf=engine(0.91, 10)))
    assert found.name == "two"


def test_what_the_board_cannot_hold_is_not_recommended() -> None:
    small = BoardFit("pi-zero-2w", True, 300, 380)
    large = BoardFit("pi-zero-2w", False, 500, 380)
    found = recommended(outcome("large", large, gguf=engine(0.99, 10)), outcome("small", small, gguf=engine(0.8, 20)))
    assert found.name == "small"
    assert "pi-zero-2w" in found.reason
    alone = recommended(outcome("large", large, gguf=engine(0.99, 10)))
    assert alone.name == "large"
    assert "none fits pi-zero-2w" in alone.reason


def test_a_lower_perplexity_is_better() -> None:
    found = recommended(
        outcome("worse", metric="perplexity", gguf=engine(9.0, 1)),
        outcome("better", metric="perplexity", gguf=engine(7.0, 2)),
    )
    assert found.name == "better"


def test_nothing_is_recommended_when_no_trial_succeeded() -> None:
    assert recommend([TrialResult("lora", "lora", None, "failed", "why")]) is None


def test_trials_that_all_scored_0_are_not_told_apart_by_the_score() -> None:
    found = recommended(
        outcome("large", gguf=engine(0, 9_000_000, error=0)), outcome("small", gguf=engine(0, 1_000_000, error=0))
    )
    assert found.undecided == (
        "all 2 trials scored 0; train longer or on more rows, and check in the answers that exact is the right metric"
    )
    assert found.reason == "small in gguf, only by size: the smallest adapter (1.00 MB)"
    alone = recommended(outcome("alone", gguf=engine(0, 10, error=0)))
    assert alone.undecided.startswith("the trial scored 0; ")


def test_trials_within_one_standard_error_of_each_other_are_not_told_apart_by_the_score() -> None:
    close = [outcome(f"m{n}", gguf=engine(0.90 + n / 100, 10 - n, error=0.05), onnx=engine(0.92, 50)) for n in range(4)]
    found = recommended(*close)
    assert found.undecided == (
        "all 4 trials are within one standard error (0.05) of each other; score on more than 100 rows, or train longer"
    )
    assert found.name == "m3"
    # One of them apart, and the score decides.
    found = recommended(*close, outcome("bad", gguf=engine(0.5, 1, error=0.05)))
    assert (found.name, found.undecided) == ("m3", "")
    perplexities = [outcome(f"p{n}", metric="perplexity", gguf=engine(9 + n / 100, 10 - n)) for n in range(2)]
    assert "within one standard error" in recommended(*perplexities).undecided


@pytest.mark.parametrize("rows", [7, 30, 100, 1000])
def test_one_answer_decides_nothing_beside_a_perfect_score(rows: int) -> None:
    error = standard_error("exact", 1, [1.0] * rows)
    found = recommended(
        outcome("all", gguf=engine(1, 9, error=error)), outcome("most", gguf=engine(1 - 1 / rows, 2, error=error))
    )
    assert found.name == "most"
    assert found.undecided.startswith("all 2 trials are within one standard error")


def test_the_same_score_decides_nothing() -> None:
    found = recommended(outcome("one", gguf=engine(1, 9, error=0.02)), outcome("two", gguf=engine(1, 2, error=0.02)))
    assert (found.name, found.undecided) == (
        "two",
        "all 2 trials scored 1; score on more than 100 rows, or on harder ones",
    )


def test_a_single_trial_with_a_score_is_recommended_by_it() -> None:
    assert recommended(outcome("alone", gguf=engine(0.9, 10), onnx=engine(0.9, 20))).undecided == ""


def test_the_page_and_the_json_say_that_the_score_decides_nothing() -> None:
    outcomes = [outcome("one", gguf=engine(0, 9, error=0)), outcome("two", gguf=engine(0, 2, error=0))]
    compared = Comparison("lights", "tiny", "exact", 100, "its validation data", outcomes, recommend(outcomes))
    shown = page(compared, [])
    assert "<b>No trial can be recommended by score:</b> all 2 trials scored 0; " in shown
    assert "By size alone: take two." in shown
    told = compared.to_json()
    assert told["undecided"].startswith("all 2 trials scored 0; ")
    assert (told["recommended"], told["reason"]) == (
        "two",
        "two in gguf, only by size: the smallest adapter (0.0000 MB)",
    )


def test_the_page_escapes_what_a_recipe_and_errors_say() -> None:
    failed = TrialResult("lora", "lora", None, "failed", "no module <q> & 'k'")
    shown = page(Comparison("<script>", "b&w", "exact", 100, "its validation data", [failed], None), [])
    assert "<script" not in shown and "<q>" not in shown
    assert "Base b&amp;w." in shown
    assert '<td class="reason" colspan="10">failed: no module &lt;q&gt; &amp; &#39;k&#39;</td>' in shown


def test_times_taken_on_a_busy_machine_are_marked_and_change_no_recommendation() -> None:
    quick, slow = engine(0.9, 10), replace(engine(0.9, 10, speed=5.0), slow=True, busy="load 3.1 on 2 cores")
    calm, busy = outcome("calm", gguf=quick), outcome("busy", gguf=slow, onnx=replace(slow, busy=None))
    (first, *_), (row, _) = list(engine_rows([calm])), list(engine_rows([busy]))
    assert [cell for cell in first if cell.endswith("*")] == []
    assert [cell for cell in row if cell.endswith("*")] == ["5.0*", "88.0*", "90.0*", "4.0*", "20.0*"]
    assert busy_notes([calm]) == []
    assert busy_notes([calm, busy])[0] == (
        "* timed on a busy machine, so these times and speeds are not used: busy in gguf (load 3.1 on 2 cores), "
        "busy in onnx"
    )
    shown = page(Comparison("lights", "tiny", "exact", 100, "its validation data", [calm, busy], None), [])
    assert "busy in gguf (load 3.1 on 2 cores)" in shown and "88.0*" in shown
    quiet = replace(busy, engines={name: replace(of, slow=False, busy=None) for name, of in busy.engines.items()})
    assert recommended(calm, busy) == recommended(calm, quiet)


def test_the_plot_of_speeds_marks_what_was_timed_on_a_busy_machine(tmp_path: Path) -> None:
    outcomes = [outcome("calm", gguf=engine(0.9, 10)), outcome("busy", gguf=replace(engine(0.8, 10), slow=True))]
    assert _legend(plots._speeds(outcomes)) == ["gguf", "calm", "busy*"]
    assert _legend(plots._sizes(outcomes)) == ["gguf", "calm", "busy"]
    captions = [picture.caption for picture in plots.plots(outcomes, tmp_path)]
    assert [caption for caption in captions if "busy machine" in caption] == [captions[1]]
    assert not any("busy machine" in picture.caption for picture in plots.plots(outcomes[:1], tmp_path))


def test_the_plot_of_losses_rings_the_checkpoint_that_ships() -> None:
    trained = replace(
        TRAINED, val_loss=0.5, shipped_step=15, history=[*TRAINED.history, Point(15, 1.5, 0.1, 0.5, 1e-3)]
    )
    ring = plots._losses([replace(outcome("lora"), training=trained)]).axes[0].lines[1]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([1.5], [0.5])


def test_figures_of_an_earlier_version_are_read_as_of_a_quiet_machine(tmp_path: Path) -> None:
    figures.write_outcome(outcome("lora", gguf=engine(0.9, 10)), tmp_path, "key")
    values = json.loads((tmp_path / figures.OUTCOME_FILE).read_text())
    for key in ("slow", "busy"):
        del values["outcome"]["engines"]["gguf"][key]
    (tmp_path / figures.OUTCOME_FILE).write_text(json.dumps(values))
    found = figures.read_outcome(tmp_path, "key")
    assert found is not None and not found.engines["gguf"].slow


def test_the_standard_error_is_binomial_where_answers_are_right_or_wrong() -> None:
    assert standard_error("exact", 0.75, [1.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 4))
    assert standard_error("exact", 1.0, [1.0]) == pytest.approx(math.sqrt(3 / 5 * 2 / 5))
    # Conversations whose first call is right and whose second one is wrong.
    assert standard_error("json", 0.5, [0.5] * 40) > 1 / 80
    points = [0.2, 0.4, 0.9]
    assert standard_error("rouge_l", 0.5, points) == pytest.approx(np.std(points, ddof=1) / math.sqrt(3))
    assert standard_error("perplexity", 8.0, points) == pytest.approx(8 * np.std(points, ddof=1) / math.sqrt(3))


@pytest.mark.parametrize(
    ("metric", "scores", "points"),
    [("rouge_l", (0.9, 0.2), [0.9]), ("perplexity", (8.0, 12.0), [2.08])],
)
def test_one_row_with_a_graded_score_tells_no_trials_apart(
    metric: str, scores: tuple[float, float], points: list[float]
) -> None:
    error = standard_error(metric, scores[0], points)
    close = [outcome(str(n), metric=metric, gguf=engine(score, n, error=error)) for n, score in enumerate(scores)]
    assert "within one standard error" in recommended(*close).undecided


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    board = BoardFit("pi-5", True, 300.5, 3800)
    busy = replace(engine(0.8, 20), slow=True, busy="load 3.1 on 2 cores")
    whole = outcome("lora-r4", board, gguf=engine(0.9, 10), onnx=busy)
    figures.write_outcome(whole, tmp_path, "key")
    assert figures.read_outcome(tmp_path, "key") == whole and figures.read_outcome(tmp_path, "other") is None


def test_placements_have_a_row_each_and_the_chosen_one_is_marked() -> None:
    tried = [
        {"target_modules": ["q_proj", "v_proj"], "r": 16, "cost": 0.081, "val_loss": 0.5},
        {"target_modules": "all-linear", "r": 16, "cost": 0.234, "val_loss": None},
    ]
    plain = outcome("dora", gguf=engine(0.9, 10))
    placed = replace(plain, name="lora", placement={**tried[0], "tried": tried})
    assert list(placement_rows([plain, placed])) == [
        ("lora", "q_proj, v_proj", "16", "8.1", "0.500", "yes"),
        ("lora", "all-linear", "16", "23.4", "-", ""),
    ]
    shown = page(Comparison("lights", "tiny", "exact", 100, "its validation data", [placed], None), [])
    assert "Choosing the modules" in shown
    assert "q_proj, v_proj" in shown
    noisy = replace(placed, placement={**tried[0], "tried": tried, "busy": "costs varied by 34%"})
    assert busy_notes([placed, noisy]) == [
        "lora: modules chosen by speeds measured on a busy machine (costs varied by 34%)"
    ]
    assert "Choosing the modules" not in page(
        Comparison("lights", "tiny", "exact", 100, "its validation data", [plain], None), []
    )


@pytest.mark.parametrize("trials", [9, 15, 32])
def test_each_trial_has_a_colour_in_a_legend_that_covers_no_point(trials: int, tmp_path: Path) -> None:
    crowd = [outcome(f"method-r{n}", gguf=engine(0.9 + n / 500, 1_000_000 * (n + 1))) for n in range(trials)]
    figure = plots._sizes(crowd)
    figure.savefig(tmp_path / "sizes.png")
    assert _legend(figure) == ["gguf", *(one.name for one in crowd)]
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert len({line.get_color() for line in legend.get_lines()}) == trials + 1
    box = legend.get_window_extent()
    assert not box.overlaps(axes.bbox)
    assert box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0 and box.y1 <= figure.bbox.y1


def _legend(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


@pytest.fixture(scope="module")
def model(tiny_base: Callable[[str], Base]) -> torch.nn.Module:
    return load_torch(tiny_base("llama"), torch.float32)


class Counted:
    """A model that counts its passes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.passes = model, 0

    def __call__(self, **inputs: torch.Tensor) -> Any:  # noqa: ANN401 - transformers' output
        self.passes += 1
        return self.model(**inputs)


def answer_of(engine: TorchEngine, prompt: Sequence[int], length: int = 6) -> list[int]:
    tokens = [int(engine.decode(prompt).argmax())]
    while len(tokens) < length:
        tokens.append(int(engine.decode_all(tokens[-1:])[0].argmax()))
    return tokens


def test_answers_in_torch_do_not_depend_on_the_guess(model: torch.nn.Module, tiny_base: Callable[[str], Base]) -> None:
    with closing(GgufTokenizer(tiny_base("llama").path)) as tokenizer:
        prompt = tokenizer.tokenize("turn on the light")
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(int(logits_of(model)(sequence)[-1].argmax()))
        right = b"".join(map(tokenizer.piece, sequence[len(prompt) :])).decode("utf-8", "replace")
        for guesses, most in (((), 6), (("set red",), 6), ((right,), 6)):
            counted = Counted(model)
            engine = TorchEngine(counted, tokenizer, context_length=64, guesses=guesses)
            assert answer_of(engine, prompt) == sequence[len(prompt) :]
            assert counted.passes <= most


def test_a_right_guess_takes_one_pass(model: torch.nn.Module, tiny_base: Callable[[str], Base]) -> None:
    with closing(GgufTokenizer(tiny_base("llama").path)) as tokenizer:
        counted = Counted(model)
        engine = TorchEngine(counted, tokenizer, context_length=64, guesses=("reply on",))
        answer = tokenizer.tokenize("reply on", continues=True)
        engine.decode(tokenizer.tokenize("turn on the light"))
        for token in answer:
            engine.decode_all([token])
        assert counted.passes == 1
        assert engine.truncate(3) == 3


def test_labels_in_torch_are_scored_by_their_tokens(model: torch.nn.Module, tiny_base: Callable[[str], Base]) -> None:
    with closing(GgufTokenizer(tiny_base("llama").path)) as tokenizer:
        engine = TorchEngine(model, tokenizer, context_length=64)
        prompt, labels = tokenizer.tokenize("set heat"), [[5, 9], [7]]
        engine.decode(prompt)
        expected = []
        for label in labels:
            rows = torch.from_numpy(logits_of(model)([*prompt, *label])).double().log_softmax(-1)
            expected.append(sum(float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(label)))
        assert engine.score(labels) == pytest.approx(expected, abs=1e-5)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_runtime.engines.gguf import GgufTokenizer
from matplotlib.text import Annotation

from edgetune.bases import Base, load_torch
from edgetune.compare import plots
from edgetune.compare.columns import placement_rows
from edgetune.compare.figures import OnBoard, OnEngine, Outcome, Training, standard_error
from edgetune.compare.page import page
from edgetune.compare.recommend import Recommendation, recommend
from edgetune.compare.sweep import Comparison
from edgetune.compare.torch_engine import TorchEngine
from edgetune.verify import logits_of

TRAINED = Training(1000, 100_000, 10.0, 500.0, 900.0, 0.2, 0.3, 5, 10, None, ((0.5, 1.0, 0.9), (1.0, 0.2, 0.3)))


def engine(score: float, size: int, *, error: float = 0.02, speed: float = 50.0) -> OnEngine:
    return OnEngine("low_rank", size, score, error, 1e-3, 90.0, speed, 88.0, 4.0, 20.0)


def outcome(name: str, board: OnBoard | None = None, metric: str = "exact", **engines: OnEngine) -> Outcome:
    return Outcome(name, name, None, "done", "", TRAINED, metric, 100, 0.9, engines, {}, board)


def recommended(*outcomes: Outcome) -> Recommendation:
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
    small = OnBoard("pi-zero-2w", True, 300, 380)
    large = OnBoard("pi-zero-2w", False, 500, 380)
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
    assert recommend([Outcome("lora", "lora", None, "failed", "why")]) is None


def test_the_standard_error_is_binomial_where_answers_are_right_or_wrong() -> None:
    assert standard_error("exact", 0.75, [1.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    points = [0.2, 0.4, 0.9]
    assert standard_error("rouge_l", 0.5, points) == pytest.approx(np.std(points, ddof=1) / math.sqrt(3))
    assert standard_error("perplexity", 8.0, points) == pytest.approx(8 * np.std(points, ddof=1) / math.sqrt(3))
    assert standard_error("exact", 1.0, [1.0]) == 0


def test_an_outcome_is_read_as_it_was_written() -> None:
    board = OnBoard("pi-5", True, 300.5, 3800)
    whole = outcome("lora-r4", board, gguf=engine(0.9, 10), onnx=engine(0.8, 20))
    assert Outcome.of_json(whole.to_json()) == whole


def test_placements_have_a_row_each_and_the_chosen_one_is_marked() -> None:
    tried = [
        {"modules": ["q_proj", "v_proj"], "rank": 16, "cost": 0.081, "val_loss": 0.5},
        {"modules": "all-linear", "rank": 16, "cost": 0.234, "val_loss": None},
    ]
    plain = outcome("dora", gguf=engine(0.9, 10))
    placed = replace(plain, name="lora", placement={**tried[0], "tried": tried})
    assert list(placement_rows([plain, placed])) == [
        ("lora", "q_proj, v_proj", "16", "8.1", "0.500", "yes"),
        ("lora", "all-linear", "16", "23.4", "-", ""),
    ]
    shown = page(Comparison("lights", "tiny", "exact", 100, [placed], None), [])
    assert "Choosing the modules" in shown
    assert "q_proj, v_proj" in shown
    assert "Choosing the modules" not in page(Comparison("lights", "tiny", "exact", 100, [plain], None), [])


def test_labels_of_a_plot_cover_no_other_label(tmp_path: Path) -> None:
    crowd = [outcome(f"method-r{n}", gguf=engine(0.9 + n / 500, 1_000_000 * (n + 1))) for n in range(9)]
    figure = plots._sizes(crowd)
    figure.savefig(tmp_path / "sizes.png")
    renderer: Any = figure.canvas
    texts = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    boxes = [plots._extent(text, renderer.get_renderer()) for text in texts]
    assert len(boxes) == 9
    assert not [(a, b) for a in range(9) for b in range(a) if boxes[a].overlaps(boxes[b])]


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
        assert engine.forget(3) == 3


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

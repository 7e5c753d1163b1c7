from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.backends.base import Source
from edgetune_runtime import Classification, PromptTooLongError, Runtime, VerificationError
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.inference.adapter_choice import Adapters
from edgetune_runtime.inference.label_search import LabelTree, score_labels
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.options import AnswerForm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime.bundles import add_onnx, write_bundle
from runtime.conftest import adapters_of
from runtime.gguf_files import rewritten
from runtime.serving.waiting import opening
from tiny import WORDS

PROMPT = "turn on the warm light in the kitchen"
TOKENS = st.lists(st.integers(5, 12), min_size=1, max_size=4).map(tuple)
TEXTS = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=4).map(" ".join)
SHARP, FLAT, NOT_A_NUMBER = 12.0, 1.0, math.nan


@pytest.fixture(scope="module")
def sharpened(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """`sharpened(sharpness)`: a bundle of both formats whose base has logits that many times as large.

    One with much larger logits is sure of its next token, as a trained one.
    """
    import torch  # noqa: PLC0415 - only where a test needs a base

    from edgetune.bases import Base, load_torch  # noqa: PLC0415

    def make(sharpness: float) -> Path:
        root, plain = tmp_path_factory.mktemp("sharp"), tiny_gguf("llama")
        (width,) = read_header(plain).tensors["output_norm.weight"].shape
        norm = {"output_norm.weight": np.full(width, sharpness, np.float32)}
        path = rewritten(plain, root / "sharp.gguf", tensors=norm)
        # The values of the plain base, as those of the other one are refused if they are no numbers.
        model = load_torch(Base("llama", plain, sha256_of(plain), read_header(plain)), torch.float32)
        model.get_submodule("model.norm").weight.data.fill_(sharpness)
        bundle = write_bundle(root / "home", path, adapters_of(path))
        add_onnx(bundle, Source(path, sha256_of(path), model, root), adapters_of(path))
        return bundle

    return cache(make)


@pytest.fixture(scope="module")
def open_(
    sharpened: Callable[[float], Path], both_of: Callable[[str], Path]
) -> Iterator[Callable[[str, float], Runtime]]:
    """`open_(engine, sharpness)`: a runtime, opened once."""

    def bundle(sharpness: float) -> Path:
        return both_of("llama") if sharpness == FLAT else sharpened(sharpness)

    with opening(both_of("llama"), "gguf", contexts=1, exact=False) as make:
        yield cache(lambda engine, sharpness: make(bundle(sharpness), engine=engine))


@pytest.mark.parametrize("sharpness", [SHARP, FLAT])
@pytest.mark.parametrize("engine", ["gguf", "onnx"])
@given(labels=st.lists(TEXTS, min_size=1, max_size=40, unique=True), adapter=st.sampled_from([None, "command", "tone"]))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_search_finds_the_label_that_scoring_all_labels_finds(
    open_: Callable[[str, float], Runtime], engine: str, sharpness: float, labels: list[str], adapter: str | None
) -> None:
    runtime = open_(engine, sharpness)
    found = runtime.classify(PROMPT, labels, adapter=adapter)
    everything = runtime.classify(PROMPT, labels, adapter=adapter, exact=True)
    assert list(everything.probabilities) == labels
    assert everything.unseen == pytest.approx(0, abs=1e-9)
    check_bounds(found, everything)


@pytest.mark.parametrize("adapter", [None, "tone", {"tone": 1.0, "command": 1.0}])
def test_all_labels_are_computed_on_request(open_: Callable[[str, float], Runtime], adapter: Adapters) -> None:
    loaded = loaded_bundle(open_("gguf", FLAT))
    for exact in (False, True):
        choice = loaded.call(PROMPT, adapter, form=AnswerForm(labels=["red", "blue"], exact=exact)).labels
        assert choice is not None
        assert (choice.exact, choice.labels) == (exact, ["red", "blue"])


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_base_that_computes_no_numbers_is_one_clear_error(
    open_: Callable[[str, float], Runtime], engine: str
) -> None:
    runtime = open_(engine, NOT_A_NUMBER)
    calls: tuple[Callable[[], object], ...] = (
        lambda: runtime.generate(PROMPT),
        lambda: runtime.generate(PROMPT, choices=["yes", "no"]),
        lambda: runtime.classify(PROMPT, ["yes", "no"]),
        lambda: runtime.classify(PROMPT, ["yes", "no"], exact=True),
        lambda: runtime.perplexity(PROMPT),
    )
    for call in calls:
        with pytest.raises(VerificationError, match="the model computed nan in place of a number; use smaller scales"):
            call()


def check_bounds(found: Classification, everything: Classification) -> None:
    """The label is the most likely one, and no probability is outside of what was said of it."""
    exact, rounding, smallest = everything.probabilities, 0.02, 1e-9
    # llama.cpp's last bits depend on the other tokens in a step, and may decide between labels that are equally likely.
    assert exact[found.label] >= exact[everything.label] * (1 - rounding)
    assert found.probabilities[found.label] == max(found.probabilities.values())
    # How sure it is does not depend on how many labels were computed.
    assert found.log_odds == pytest.approx(everything.log_odds, rel=rounding, abs=rounding)
    for label, lowest in found.probabilities.items():
        # Sharp logits multiply their rounding, too, which shows in the smallest probabilities.
        assert lowest * (1 - rounding) - smallest <= exact[label]
        assert exact[label] <= (lowest + found.unseen) * (1 + rounding) + smallest
    others = math.fsum(share for label, share in exact.items() if label not in found.probabilities)
    assert others <= found.unseen * (1 + rounding) + smallest


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
@pytest.mark.parametrize("count", [21, 77])
def test_a_sure_answer_takes_few_of_the_tokens_of_many_labels(
    open_: Callable[[str, float], Runtime], engine: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = loaded_bundle(open_(engine, SHARP)).call(PROMPT, "command")
    rng = np.random.default_rng(count)
    with call.lease() as context:
        logits = context.run(call.job).logits
        likely = []
        for _ in range(5):
            likely.append(int(logits.argmax()))
            logits = context.extend(likely[-1:])[-1]
        first = context.run(call.job).logits
        # Some begin as the likely one does.
        labels = [(*likely[: rng.integers(0, 4)], *map(int, rng.integers(5, 300, 3))) for _ in range(count - 1)]
        labels.append(tuple(likely))
        decoded, extend = [], context.extend

        def counting(tokens: list[int], *, last: int | None = None) -> np.ndarray:
            decoded.extend(tokens)
            return extend(tokens, last=last)

        monkeypatch.setattr(context, "extend", counting)
        scores = score_labels(context, first, labels, {})
        assert context.tokens == list(call.job.tokens)
        assert scores.values[-1] == max(value for value in scores.values if value is not None)
        assert len(decoded) * 5 <= LabelTree(labels, first, {}).size
        context.run(call.job)
        everything = context.score(labels)
        assert scores.values[-1] == pytest.approx(max(everything), abs=0.01) == everything[-1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_expected_label_takes_one_step_if_it_is_the_likeliest(place: int) -> None:
    labels = [(1, 2, 9), (1, 3, 4, 9), (1, 3, 5, 9)]
    rows = np.zeros((len(labels[place]), 10), np.float32)
    rows[range(len(labels[place])), labels[place]] = 9.0
    tree = LabelTree(labels, rows[0], {labels[place]: 0.9, labels[place - 1]: 0.5})
    path, count = tree.next()
    # The last token ends the label, so nothing is computed after it.
    assert (path, count) == (labels[place][:-1], len(labels[place]) - 1)
    tree.add(rows[1:])
    assert tree.is_decided
    assert [*tree.known_scores()] == [labels[place]]


@given(
    labels=st.lists(TOKENS, min_size=1, max_size=12, unique=True), seed=st.integers(0, 1000), has_expected=st.booleans()
)
def test_no_label_is_more_probable_than_the_tree_says(
    labels: list[tuple[int, ...]], seed: int, *, has_expected: bool
) -> None:
    """Also where a label begins as another does, which only labels with control tokens do."""
    rows: dict[tuple[int, ...], np.ndarray] = {}

    def row_after(path: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, *path])
        return rows.setdefault(path, rng.normal(0, 3, 16).astype(np.float32))

    def exact(label: tuple[int, ...]) -> float:
        parts = [row_after(label[:end]) for end in range(len(label))]
        return sum(float(row[token] - np.logaddexp.reduce(row)) for row, token in zip(parts, label, strict=True))

    values = np.random.default_rng(seed).random(len(labels)).tolist()
    # Some have no value.
    tree = LabelTree(labels, row_after(()), dict(zip(labels[::2], values[::2], strict=True)) if has_expected else {})
    while not tree.is_decided:
        path, count = tree.next()
        tree.add(np.stack([row_after(path[: len(path) - count + 1 + number]) for number in range(count)]))
    expected, known_scores = {label: exact(label) for label in labels}, tree.known_scores()
    assert known_scores == pytest.approx({label: expected[label] for label in known_scores}, abs=1e-4)
    assert max(known_scores, key=known_scores.__getitem__) == max(expected, key=expected.__getitem__)
    others = math.fsum(math.exp(expected[label]) for label in labels if label not in known_scores)
    assert others <= math.exp(tree.unseen()) + 1e-6


def test_a_label_that_does_not_fit_is_refused_before_the_search(open_: Callable[[str, float], Runtime]) -> None:
    runtime = open_("gguf", SHARP)
    with pytest.raises(PromptTooLongError, match="of a label do not fit in a context of 256"):
        runtime.classify(PROMPT, ["on", "warm light " * 120])
    assert runtime.classify(PROMPT, ["on", "off"]).label in ("on", "off")

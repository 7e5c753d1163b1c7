from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, ToolCall
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.inference.measuring import loaded_bundle
from recipes import write_rows
from runtime.bundles import Adapter, change_manifest, low_rank, write_bundle

from edgetune.common.progress import Progress
from edgetune.tasks import metrics
from edgetune.tasks.evaluation import Evaluation, evaluate, text_to_score

SYSTEM = "answer in one word"
LABELS = ("red", "green", "warm red", "warm")
PROMPTS = ("turn on the light", "what is the time", "set heat to warm", "close the blind", "play", "open the hall")
TEXTS = PROMPTS[:4]
COLUMNS = {"prompt": "asked", "completion": "wanted"}


@pytest.fixture(scope="session")
def plain_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapters `task` (a system prompt, labels) and `other` (neither)."""
    base = tiny_gguf("llama")
    adapters = {
        "task": Adapter(low_rank(base, seed=1), system=SYSTEM, labels=LABELS),
        "other": Adapter(low_rank(base, seed=2)),
    }
    return write_bundle(tmp_path_factory.mktemp("evaluate") / "home", base, adapters, context_length=160)


@pytest.fixture
def bundle_with(plain_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """`bundle_with(metric, columns=None)`: a copy of the bundle where `task` has that metric and those columns."""

    def make(metric: str, columns: dict[str, Any] | None = None) -> Path:
        bundle = shutil.copytree(plain_bundle, tmp_path / metric)
        recipe = {"adapters": {"task": {"data": {"columns": columns}}}}
        change_manifest(bundle, lambda raw: raw["adapters"]["task"].update(metric=metric))
        change_manifest(bundle, lambda raw: raw.update(recipe=recipe))
        return bundle

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(*rows)`: a JSONL file of these rows."""

    return lambda *rows: write_rows(tmp_path / "rows.jsonl", rows)


def score(bundle: Path, data: Path, adapter: str | None = "task", limit: int | None = None) -> Evaluation:
    return evaluate(bundle, adapter, data, limit=limit, progress=Progress(quiet=True))


def test_answers_are_those_of_the_runtime_with_the_adapters_system_prompt(
    bundle_with: Callable[..., Path], write: Callable[..., Path]
) -> None:
    bundle = bundle_with("exact")
    with Runtime.open(bundle) as runtime:
        answers = [runtime.generate(prompt, adapter="task", max_tokens=19).text for prompt in PROMPTS[:2]]
    data = write(*({"prompt": prompt, "completion": "on"} for prompt in PROMPTS[:2]))
    assert [row.answer for row in score(bundle, data).details] == answers
    assert [row.answer for row in score(bundle, data, "other").details] != answers


def test_the_score_is_the_mean_of_the_rows_by_the_adapters_metric(
    bundle_with: Callable[..., Path], write: Callable[..., Path]
) -> None:
    result = score(bundle_with("chrf"), write(*({"prompt": prompt, "completion": prompt} for prompt in PROMPTS)))
    _, scores = metrics.score("chrf", [row.answer for row in result.details], PROMPTS)
    assert [row.score for row in result.details] == scores
    assert result.to_json() == {"score": sum(scores) / 6, "metric": "chrf", "rows": 6, "too_long": 0}
    assert [(row.prompt, row.reference) for row in result.details] == [(prompt, prompt) for prompt in PROMPTS]
    assert [row.where.rpartition(":")[2] for row in result.details] == list("123456")


def test_label_accuracy_is_that_of_classify(bundle_with: Callable[..., Path], write: Callable[..., Path]) -> None:
    bundle = bundle_with("label")
    with Runtime.open(bundle) as runtime:
        chosen = [runtime.classify(prompt, adapter="task").label for prompt in PROMPTS]
    wrong = next(label for label in LABELS if label != chosen[0])
    labels = [wrong, *chosen[1:]]
    data = write(*({"text": text, "label": label} for text, label in zip(PROMPTS, labels, strict=True)))
    result = score(bundle, data)
    assert (result.metric, result.score, result.rows) == ("label", pytest.approx(5 / 6), 6)
    assert [row.answer for row in result.details] == chosen


def test_perplexity_of_texts_and_of_completions(bundle_with: Callable[..., Path], write: Callable[..., Path]) -> None:
    bundle = bundle_with("perplexity")
    with Runtime.open(bundle) as runtime:
        losses = [runtime.negative_log_likelihood(text, adapter="task") for text in TEXTS]
        _, shares = runtime.classify("play", ["on", "off"], adapter="task", exact=True)
    result = score(bundle, write(*({"text": text} for text in TEXTS)))
    expected = math.exp(sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses))
    assert (result.metric, result.score) == ("perplexity", pytest.approx(expected, rel=1e-4))
    on, off = score(bundle, write(*({"prompt": "play", "completion": text} for text in ("on", "off")))).details
    with Runtime.open(bundle) as runtime:
        tokenizer = loaded_bundle(runtime).context()[0].engine.tokenizer
        counts = [len(tokenizer.tokenize(text, continues=True)) + 1 for text in ("on", "off")]
    ratio = math.exp(off.score * counts[1] - on.score * counts[0])
    assert ratio == pytest.approx(shares["on"] / shares["off"], rel=1e-3)


def test_keys_and_values_are_kept_as_asked(plain_bundle: Path, write: Callable[..., Path]) -> None:
    data = write({"text": TEXTS[0]})
    # The tiny base's heads of 16 are too narrow for q8_0, which shows that it was asked for.
    with pytest.raises(IncompatibleError, match="q8_0 with block size 32 does not divide"):
        evaluate(plain_bundle, None, data, kv="q8_0", progress=Progress(quiet=True))
    in_halves = evaluate(plain_bundle, None, data, kv="f16", progress=Progress(quiet=True))
    assert in_halves == score(plain_bundle, data, None)


def test_the_base_alone_is_scored_by_the_metric_that_fits_the_rows(
    plain_bundle: Path, write: Callable[..., Path]
) -> None:
    data = write({"prompt": "play", "completion": {"service": "media.play"}})
    assert score(plain_bundle, data, adapter=None).metric == "json"
    labelled = score(plain_bundle, write(*({"text": text, "label": "on"} for text in PROMPTS)), adapter=None)
    assert (labelled.metric, labelled.score) == ("label", 1.0)
    several = write(*({"text": text, "label": label} for label in ("red", "warm") for text in PROMPTS))
    # The labels to choose from are those of all rows.
    (limited,) = score(plain_bundle, several, adapter=None, limit=1).details
    assert limited in score(plain_bundle, several, adapter=None).details


def test_the_trainings_columns_hold_for_the_data(bundle_with: Callable[..., Path], write: Callable[..., Path]) -> None:
    bundle = bundle_with("exact", COLUMNS)
    named = score(bundle, write({"asked": "play", "wanted": "on", "text": "play"})).details[0]
    plain = score(bundle, write({"prompt": "play", "completion": "on"})).details[0]
    assert (named.prompt, named.reference, named.answer) == (plain.prompt, plain.reference, plain.answer)
    assert named.prompt == "play"


def test_a_row_that_lacks_a_column_is_not_taken_for_plain_text(
    bundle_with: Callable[..., Path], write: Callable[..., Path]
) -> None:
    data = write({"text": "play", "asked": "play", "wanted": "on"}, {"text": "stop", "asked": "stop"})
    with pytest.raises(UsageError, match=r"rows\.jsonl:2: has no 'wanted'"):
        score(bundle_with("perplexity", COLUMNS), data)


def test_each_answer_of_a_conversation_is_scored_after_the_turns_before(
    bundle_with: Callable[..., Path], write: Callable[..., Path]
) -> None:
    bundle = bundle_with("rouge_l")
    messages = [
        {"role": "user", "content": "play"},
        {"role": "assistant", "content": "on"},
        {"role": "user", "content": "stop"},
        {"role": "assistant", "content": "off"},
    ]
    with Runtime.open(bundle) as runtime:
        answer = runtime.generate(messages[:-1], adapter="task", max_tokens=20).text
    # The first turns of both are one prompt.
    result = score(bundle, write({"messages": messages}, {"messages": messages[:2] + messages[:2]}))
    assert [(row.prompt, row.reference) for row in result.details] == [("play", "on"), ("stop", "off"), ("play", "on")]
    assert answer.startswith(result.details[1].answer[:10])
    assert score(bundle, write({"messages": messages}), limit=1).rows == 1


def test_a_limit_spreads_over_a_sorted_file(bundle_with: Callable[..., Path], write: Callable[..., Path]) -> None:
    data = write(*({"text": text, "label": label} for label in LABELS for text in PROMPTS[:3]))
    result = score(bundle_with("label"), data, limit=4)
    assert [row.reference for row in result.details] == list(LABELS)
    assert score(bundle_with("exact"), data, limit=99).rows == 12


def test_rows_that_do_not_fit_are_counted_and_not_scored(
    bundle_with: Callable[..., Path], write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write({"prompt": "play " * 200, "completion": "on"}, {"prompt": "play", "completion": "on"})
    result = evaluate(bundle_with("exact"), "task", data, progress=Progress())
    assert (result.rows, result.too_long) == (1, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "leaving out 1 of 2 rows, which do not fit in the context of 160 tokens" in err


@pytest.mark.parametrize(
    ("metric", "row", "error", "message"),
    [
        ("label", {"text": "play", "label": "read"}, UsageError, "rows.jsonl:1: 'read' is not one of the labels"),
        ("json", {"prompt": "play", "completion": "{on"}, UsageError, "rows.jsonl:1: the answer '{on' is not JSON"),
        ("exact", {"text": "play"}, UsageError, "rows.jsonl:1: is plain text, but metric exact compares answers"),
        ("perplexity", {"text": "play"}, UsageError, "rows.jsonl:1: has 1 token, so there is nothing to predict"),
        ("exact", {"prompt": "play " * 200, "completion": "on"}, UsageError, "none of 1 rows fits in the context"),
        ("exakt", {"prompt": "play", "completion": "on"}, VerificationError, "unknown metric 'exakt'"),
    ],
)
def test_rows_that_cannot_be_scored_are_one_error(
    bundle_with: Callable[..., Path],
    write: Callable[..., Path],
    metric: str,
    row: dict[str, Any],
    error: type[EdgetuneError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        score(bundle_with(metric), write(row))


def test_an_unknown_adapter_and_missing_data_are_named(plain_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no adapter 'tusk'.*task, other"):
        score(plain_bundle, tmp_path / "rows.jsonl", adapter="tusk")
    with pytest.raises(NotFoundError, match=r"no data file .*rows\.jsonl"):
        score(plain_bundle, tmp_path / "rows.jsonl")


def test_a_damaged_recipe_in_the_manifest_is_an_error(
    bundle_with: Callable[..., Path], write: Callable[..., Path]
) -> None:
    with pytest.raises(VerificationError, match="has invalid columns"):
        score(bundle_with("exact", {"prompt": 3}), write({"prompt": "play", "completion": "on"}))


def test_calls_are_compared_by_name_and_arguments(
    tiny_gguf: Callable[[str], Path], write: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_gguf("llama")
    bundle = write_bundle(tmp_path / "home", base, {"task": Adapter(low_rank(base, seed=1))}, context_length=512)
    tools = [{"name": "stop"}]
    with Runtime.open(bundle) as runtime:
        answer = runtime.generate("play", adapter="task", tools=tools, max_tokens=60)
        cut_off = runtime.generate("play", adapter="task", tools=tools, tool_choice="required", max_tokens=2)
    # The second of two calls that has begun belongs to the answer.
    answered = ToolCall("stop", {})
    half = replace(cut_off, content="", text="stop, and sto", tool_calls=(answered,))
    whole = replace(half, stop_reason="end")
    assert metrics.score("json", [*map(text_to_score, (half, whole))], [text_to_score(whole)] * 2)[1] == [0, 1]
    # A call that cannot be read is one, though an app does not get it.
    unread = replace(half, stop_reason="end", tool_calls=(), text='stop {"n": 1e999}')
    assert metrics.score("json", [text_to_score(unread)], ["No."], offers_tools=[True])[0] == 0
    # A call that has begun is not an answer without any.
    assert metrics.score("json", [text_to_score(cut_off)], ["No."], offers_tools=[True])[0] == 0
    assert metrics.score("json", [text_to_score(answer)], ["No."], offers_tools=[True])[0] == 1
    asked = {"role": "user", "content": "play"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "stop"}}]}
    said = {"role": "assistant", "content": answer.text}
    rows = write({"messages": [asked, call], "tools": tools}, {"messages": [asked, said], "tools": tools})
    result = score(bundle, rows)
    assert [row.reference for row in result.details] == [
        '{"tool_calls": [{"name": "stop", "arguments": {}}]}',
        answer.text,
    ]
    # An untrained adapter does not call the tool: its answer is the text that it gives in the runtime.
    assert result.details[0].score < 1
    assert result.details[1].answer.startswith(answer.text)
    assert [row.written.strip() for row in result.details] == [row.answer.strip() for row in result.details]

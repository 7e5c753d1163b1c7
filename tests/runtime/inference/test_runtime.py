from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from damage import flip
from edgetune_runtime import (
    AsyncRuntime,
    IncompatibleError,
    NotFoundError,
    Runtime,
    Sampling,
    UsageError,
    VerificationError,
)
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.text.chat import messages_for, render
from runtime.bundles import Adapter, change_manifest, low_rank, make_foreign, write_bundle
from runtime.conftest import LABELS, SYSTEM

Adapters = str | dict[str, float] | None
PROMPT = "turn on the warm light in the kitchen"


@pytest.fixture(scope="module")
def shared(engine: str, both_of: Callable[[str], Path]) -> Iterator[Runtime]:
    """The bundle in each engine."""
    with Runtime.open(both_of("llama"), engine=engine, contexts=1, disk_mb=0, exact=False) as opened:
        yield opened


@pytest.fixture
def runtime(shared: Runtime) -> Runtime:
    """The same with a cold cache. Tests share it; the fixture of this name for all others opens the bundle anew."""
    shared.clear_cache()
    return shared


def greedy(runtime: Runtime, prompt: str, adapter: Adapters, steps: int = 4) -> tuple[list[int], list[float]]:
    """The likeliest tokens one after another, and their logits."""
    context, active = loaded_bundle(runtime).context(adapter)
    tokenizer = context.engine.tokenizer
    messages = messages_for(prompt, SYSTEM if adapter == "command" else None)
    tokens = tokenizer.tokenize(render(tokenizer.chat_template, messages, add_generation_prompt=True))
    chosen: list[int] = []
    values: list[float] = []
    with context.hold():
        logits = context.start(active, tokens).logits
        while len(chosen) < steps:
            chosen.append(int(logits.argmax()))
            values.append(float(logits.max()))
            logits = context.extend(chosen[-1:])[0]
    return chosen, values


def test_switching_back_restores_the_first_answer_without_computing_the_prompt(runtime: Runtime) -> None:
    first = runtime.generate(PROMPT, adapter="command", max_tokens=5)
    other = runtime.generate(PROMPT, adapter="tone", max_tokens=5)
    again = runtime.generate(PROMPT, adapter="command", max_tokens=5)
    assert first.text == again.text != other.text
    assert (first.timings.reused_tokens, other.timings.reused_tokens) == (0, 0)
    assert again.timings.reused_tokens == again.timings.prompt_tokens - 1


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs(runtime: Runtime) -> None:
    first = runtime.generate(PROMPT + " red", adapter="command", max_tokens=2)
    second = runtime.generate(PROMPT + " green", adapter="command", max_tokens=2)
    assert 0 < second.timings.reused_tokens < first.timings.prompt_tokens


def test_a_cleared_cache_computes_everything(runtime: Runtime) -> None:
    runtime.generate(PROMPT, adapter="command", max_tokens=2)
    runtime.generate(PROMPT, adapter="tone", max_tokens=2)
    runtime.clear_cache()
    assert runtime.generate(PROMPT, adapter="command", max_tokens=2).timings.reused_tokens == 0
    assert runtime.generate(PROMPT, adapter="tone", max_tokens=2).timings.reused_tokens == 0


def test_without_a_budget_nothing_is_kept_but_the_last_sequence(bundle: Path) -> None:
    with Runtime.open(bundle, cache_mb=0, disk_mb=0, exact=False) as runtime:
        for adapter, reused in (("command", False), ("command", True), ("tone", False), ("command", False)):
            answer = runtime.generate(PROMPT, adapter=adapter, max_tokens=2)
            assert bool(answer.timings.reused_tokens) == reused


def test_scale_zero_is_the_base(runtime: Runtime) -> None:
    assert runtime.generate(PROMPT, adapter={"tone": 0}, unconstrained=True).text == runtime.generate(PROMPT).text


def test_a_merged_adapter_answers_as_a_bundle_of_its_model(runtime: Runtime, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "home", runtime.bundle / "adapters/whole/model.gguf", {})
    with Runtime.open(bundle) as alone:
        expected, _ = greedy(alone, PROMPT, None)
    assert greedy(runtime, PROMPT, "whole")[0] == expected != greedy(runtime, PROMPT, None)[0]


@pytest.mark.parametrize("adapter", [{"whole": 1, "tone": 1}, {"whole": 0.5}])
def test_a_merged_adapter_cannot_be_scaled_or_added(runtime: Runtime, adapter: Adapters) -> None:
    with pytest.raises(IncompatibleError, match="merged"):
        runtime.generate(PROMPT, adapter=adapter)


def test_a_name_alone_takes_the_manifests_scale_and_a_mapping_its_own(runtime: Runtime) -> None:
    runs = []
    for adapter in ("tone", {"tone": 0.5}, {"tone": 1.0}):
        # What is left of a prompt may be computed in another batch, which changes last bits.
        runtime.clear_cache()
        runs.append(greedy(runtime, PROMPT, adapter))
    by_name, at_half, at_one = runs
    assert by_name == at_half != at_one


def test_the_adapters_system_prompt_is_used_unless_the_messages_bring_one(runtime: Runtime) -> None:
    user = {"role": "user", "content": PROMPT}
    own, none = (runtime.generate(PROMPT, adapter=name, max_tokens=1).timings for name in ("command", "tone"))
    same = runtime.generate([{"role": "system", "content": SYSTEM}, user], adapter="command", max_tokens=1).timings
    other = runtime.generate([{"role": "system", "content": "stop"}, user], adapter="command", max_tokens=1).timings
    several = runtime.generate(PROMPT, adapter={"tone": 1, "command": 1}, max_tokens=1).timings
    assert own.prompt_tokens == same.prompt_tokens > other.prompt_tokens > none.prompt_tokens == several.prompt_tokens


def test_a_stream_gives_the_text_that_generate_gives(runtime: Runtime) -> None:
    answer = runtime.generate(PROMPT, adapter="tone", max_tokens=30, temperature=1.0, seed=4)
    stream = runtime.stream(PROMPT, adapter="tone", max_tokens=30, temperature=1.0, seed=4)
    pieces = list(stream)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1
    assert stream.answer is not None
    assert (stream.answer.text, stream.answer.tokens) == (answer.text, answer.tokens)


def test_timings_have_switch_first_token_and_speed(runtime: Runtime) -> None:
    # An earlier test may have left this adapter active.
    runtime.generate(PROMPT, max_tokens=1)
    timings = runtime.generate(PROMPT, adapter="command", max_tokens=9).timings
    assert 0 < timings.switch_us < timings.ttft_ms * 1e3
    assert timings.tokens_per_s > 0
    assert runtime.generate(PROMPT, max_tokens=1).timings.tokens_per_s == 0


def test_an_answer_ends_at_max_tokens(runtime: Runtime) -> None:
    answer = runtime.generate(PROMPT, max_tokens=4)
    assert (answer.tokens, answer.stop_reason) == (4, "length")


def test_an_answer_that_does_not_end_fills_the_context(runtime: Runtime) -> None:
    answers = [runtime.generate(PROMPT, adapter=adapter, max_tokens=1000) for adapter in (None, "command", "tone")]
    full = [answer for answer in answers if answer.stop_reason == "length"]
    assert full
    # The last token is not decoded, so it needs no room.
    assert {answer.timings.prompt_tokens + answer.tokens for answer in full} == {256 + 1}


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"deadline_s": "1"}, "deadline_s is '1'; give a number of seconds above 0"),
        ({"deadline_s": math.nan}, "deadline_s is nan; give a number of seconds above 0"),
        ({"cancel": True}, "cancel is True; give a threading.Event"),
        ({"cancel": threading.Event}, "cancel is <class 'threading.Event'>; give a threading.Event"),
    ],
)
def test_a_limit_of_a_wrong_kind_is_refused(runtime: Runtime, limit: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        runtime.stream(PROMPT, **limit)
    with pytest.raises(UsageError, match=told):
        asyncio.run(AsyncRuntime(runtime).generate(PROMPT, **limit))


def test_a_deadline_may_be_as_far_as_anybody_likes(runtime: Runtime) -> None:
    for deadline_s in (math.inf, 10**400):
        assert runtime.generate(PROMPT, max_tokens=2, deadline_s=deadline_s).stop_reason == "length"


def test_an_answer_ends_before_a_stop_text(runtime: Runtime) -> None:
    whole = runtime.generate(PROMPT, adapter="command", max_tokens=12).text
    place = len(whole) // 2
    stop = whole[place : place + 2]
    answer = runtime.generate(PROMPT, adapter="command", max_tokens=12, stop=[stop])
    assert (answer.text, answer.stop_reason) == (whole[: whole.index(stop)], "stop")


def test_an_answer_ends_with_the_turn(runtime: Runtime) -> None:
    options = {"temperature": 3.0, "top_k": 0, "top_p": 1, "min_p": 0}
    answers = (runtime.generate(PROMPT, **options, seed=seed) for seed in range(40))
    ended = list(islice((answer for answer in answers if answer.stop_reason == "end"), 3))
    assert len(ended) == 3
    assert all(answer.tokens < 256 and "im_end" not in answer.text for answer in ended)


def test_overrides_change_single_fields_of_the_sampling(runtime: Runtime) -> None:
    sampling = Sampling(temperature=1.0, seed=1, max_tokens=3)
    assert runtime.generate(PROMPT, sampling=sampling).tokens == 3
    assert runtime.generate(PROMPT, sampling=sampling, max_tokens=2).tokens == 2
    with pytest.raises(UsageError, match=r"sampling is \{'temperature': 1\.0\}; give a Sampling"):
        runtime.generate(PROMPT, sampling={"temperature": 1.0}, max_tokens=2)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("temprature", "temperature"), ("min_confidense", "min_confidence"), ("adaptor", "adapter")]
)
def test_an_unknown_option_of_a_call_is_refused_with_the_nearest_one(runtime: Runtime, wrong: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"a call has no option '{wrong}'; did you mean '{meant}'"):
        runtime.generate(PROMPT, max_tokens=2, **{wrong: 1})


def test_a_session_has_no_options_that_only_other_calls_have(runtime: Runtime) -> None:
    with runtime.session() as session, pytest.raises(UsageError, match="a call has no option 'raw'"):
        session.send(PROMPT, raw=True)


def test_classify_gives_probabilities_over_the_labels(runtime: Runtime) -> None:
    label, scores = runtime.classify(PROMPT, adapter="tone", exact=True)
    assert tuple(scores) == LABELS
    assert sum(scores.values()) == pytest.approx(1)
    assert scores[label] == max(scores.values())
    some = runtime.classify(PROMPT, ["red", "green"], adapter="tone", exact=True).probabilities
    assert some["red"] / some["green"] == pytest.approx(scores["red"] / scores["green"], rel=0.05)


def test_classify_scores_a_label_as_generation_would_end_it(runtime: Runtime) -> None:
    context, active = loaded_bundle(runtime).context("tone")
    tokenizer = context.engine.tokenizer
    text = render(tokenizer.chat_template, messages_for(PROMPT, None), add_generation_prompt=True)
    losses = []
    for label in LABELS:
        ending = [*tokenizer.tokenize(label, continues=True), tokenizer.end_token]
        with context.hold():
            rows = [context.start(active, tokenizer.tokenize(text)).logits, *context.extend(ending)]
        losses.append(sum(np.log(np.exp(row - row[token]).sum()) for row, token in zip(rows, ending, strict=False)))
    weights = np.exp(-np.array(losses))
    _, scores = runtime.classify(PROMPT, adapter="tone", exact=True)
    assert list(scores.values()) == pytest.approx(list(weights / weights.sum()), abs=0.02)


@pytest.mark.parametrize(
    ("labels", "adapter"), [(None, None), (None, "command"), ([], "tone"), (["a", "a"], "tone"), ([""], None)]
)
def test_labels_that_are_missing_empty_or_twice_are_refused(
    runtime: Runtime, labels: list[str] | None, adapter: Adapters
) -> None:
    with pytest.raises(UsageError, match="labels"):
        runtime.classify(PROMPT, labels, adapter=adapter)


def test_negative_log_likelihood_sums_over_all_tokens_but_the_first(runtime: Runtime) -> None:
    context, active = loaded_bundle(runtime).context("tone")
    tokens = context.engine.tokenizer.tokenize(PROMPT)
    with context.hold():
        rows = [context.start(active, tokens[:1]).logits, *context.extend(tokens[1:])]
    expected = sum(np.log(np.exp(row - row[token]).sum()) for row, token in zip(rows, tokens[1:], strict=False))
    loss = runtime.negative_log_likelihood(PROMPT, adapter="tone")
    assert loss == (pytest.approx(float(expected), rel=0.01), len(tokens) - 1)
    assert runtime.perplexity(PROMPT, adapter="tone") == loss.perplexity == math.exp(loss.nats / loss.tokens)


def test_negative_log_likelihood_of_a_text_longer_than_the_context_counts_each_token_once(runtime: Runtime) -> None:
    text = "turn on the lamp " * 200
    loss, counted = runtime.negative_log_likelihood(text)
    assert counted == len(loaded_bundle(runtime).context()[0].engine.tokenizer.tokenize(text)) - 1 > 2 * 256
    assert 0 < loss / counted < 20


def test_a_text_of_one_token_has_no_perplexity(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="perplexity"):
        runtime.perplexity("")
    with pytest.raises(UsageError, match="the text is None; give a string"):
        runtime.perplexity(None)  # type: ignore[arg-type]


def test_the_error_about_a_long_prompt_has_its_length_and_that_of_the_context(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match=r"prompt has \d{3} tokens.* 256"):
        runtime.generate("turn on the lamp " * 100)
    assert runtime.generate(PROMPT, max_tokens=2).tokens == 2


def test_unknown_adapter_error_lists_adapters(runtime: Runtime) -> None:
    for use in (runtime.generate, runtime.stream, runtime.classify, runtime.perplexity):
        with pytest.raises(NotFoundError, match="command, tone, whole"):
            use(PROMPT, adapter="comand")
    with pytest.raises(NotFoundError, match="comand"):
        runtime.generate(PROMPT, adapter={"tone": 1, "comand": 1})


@pytest.mark.parametrize("adapter", [["tone"], {"tone": "1"}, {"tone": float("inf")}, 3])
def test_an_adapter_that_is_neither_name_nor_scales_is_refused(runtime: Runtime, adapter: object) -> None:
    with pytest.raises(UsageError, match="adapter"):
        runtime.generate(PROMPT, adapter=adapter)


def test_a_stream_left_behind_lets_others_run(runtime: Runtime) -> None:
    for _ in runtime.stream(PROMPT, max_tokens=20):
        break
    assert runtime.generate(PROMPT, max_tokens=1).tokens == 1


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_stream_that_was_closed_before_its_end_has_no_answer_to_read(runtime: Runtime, pieces: int) -> None:
    with runtime.stream(PROMPT, max_tokens=20) as stream:
        for _ in range(pieces):
            next(stream)
    with pytest.raises(UsageError, match="closed before its end; read it to its end first"):
        stream.read()


def test_a_stream_checks_its_arguments_at_once(runtime: Runtime) -> None:
    with pytest.raises(UsageError):
        runtime.stream(PROMPT, temperature=-1)
    with pytest.raises(UsageError):
        runtime.stream([])


@pytest.mark.parametrize("file", ["base/model.gguf", "adapters/tone/adapter.gguf"])
def test_a_changed_file_is_refused_before_it_is_loaded(home: Path, file: str) -> None:
    flip(home / file, -1)
    with pytest.raises(VerificationError, match=file):
        Runtime.open(home, preload="all")
    with Runtime.open(home, verify=False) as runtime:
        assert runtime.generate(PROMPT, max_tokens=1).tokens == 1


@pytest.mark.parametrize(("engine", "file"), [("gguf", "model.gguf"), ("onnx", "onnx/model.onnx.data")])
def test_a_changed_merged_adapter_is_refused_when_it_is_used(engine: str, file: str, home_of_both: Path) -> None:
    path = home_of_both / "adapters/whole" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with Runtime.open(home_of_both, engine=engine) as runtime:
        with pytest.raises(VerificationError, match="whole"):
            runtime.generate(PROMPT, adapter="whole")
        assert runtime.generate(PROMPT, max_tokens=1).tokens == 1


@pytest.mark.parametrize(
    ("engine", "file"), [("gguf", "model.gguf"), ("onnx", "onnx/model.onnx.data"), ("onnx", "onnx/model.onnx")]
)
def test_a_cut_off_file_is_refused_even_without_digests(engine: str, file: str, home_of_both: Path) -> None:
    path = home_of_both / "base" / file
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(VerificationError, match=r"^[^\n]*$"):
        Runtime.open(home_of_both, engine=engine, verify=False)


def test_an_adapter_file_made_for_another_base_is_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    foreign = {"alien": Adapter(low_rank(base, 1), fingerprint="0" * 64)}
    path = write_bundle(tmp_path / "bundle", base, foreign)
    with pytest.raises(IncompatibleError, match="'alien' was made for another base"):
        Runtime.open(path, preload=["alien"])


def test_a_base_that_is_not_the_one_of_the_fingerprint_is_refused(home: Path) -> None:
    change_manifest(home, make_foreign)
    with pytest.raises(VerificationError, match="not the base"):
        Runtime.open(home)


def test_an_unknown_shape_is_refused(home: Path) -> None:
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(shapes={"gguf": "round"}))
    with pytest.raises(VerificationError, match=r"'tone' has unknown shapes"):
        Runtime.open(home)


def test_a_backend_that_the_bundle_lacks_is_refused(home: Path) -> None:
    change_manifest(home, lambda raw: raw["base"]["files"].clear())
    with pytest.raises(IncompatibleError, match="no file for engine 'gguf'"):
        Runtime.open(home)


def test_a_context_that_the_memory_cannot_hold_is_refused_before_linux_kills(home: Path) -> None:
    change_manifest(home, lambda raw: raw["base"].update(kv_values_per_token=10**13))
    with pytest.raises(IncompatibleError, match="MB are free"):
        Runtime.open(home)


def test_the_error_about_an_unknown_engine_names_the_nearest_one(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no engine 'onxx'; did you mean 'onnx'"):
        Runtime.open(bundle, engine="onxx")


@pytest.mark.parametrize("name", ["cache_mb", "disk_mb", "disk_mb_per_day", "adapters_mb", "merged_mb"])
@pytest.mark.parametrize("size_mb", [-1, math.nan, "64"])
def test_a_size_that_is_no_number_of_at_least_0_is_refused(bundle: Path, name: str, size_mb: object) -> None:
    with pytest.raises(UsageError, match=f"{name} is {size_mb!r}; give a number of at least 0"):
        Runtime.open(bundle, **{name: size_mb})


def test_sizes_may_be_without_a_limit(bundle: Path, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("cache_mb", "disk_mb", "disk_mb_per_day", "adapters_mb", "merged_mb"), math.inf)
    with Runtime.open(bundle, cache_folder=tmp_path, **sizes) as runtime:
        first = runtime.generate(PROMPT, adapter="command", max_tokens=4)
        runtime.generate(PROMPT, adapter="whole", max_tokens=4)
        assert runtime.generate(PROMPT, adapter="command", max_tokens=4).text == first.text
    assert [*tmp_path.rglob("*.kv")]


def test_an_unknown_option_of_opening_is_refused_with_the_nearest_one(bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"Runtime\.open has no option 'thread'; did you mean 'threads'"):
        Runtime.open(bundle, thread=1)


@pytest.mark.parametrize("options", [{"context_length": 0}, {"context_length": 513}, {"threads": -1}, {"threads": 0}])
def test_options_that_cannot_be_are_refused(bundle: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Runtime.open(bundle, **options)


def test_a_shorter_context_limits_the_answer(bundle: Path) -> None:
    with Runtime.open(bundle, context_length=64) as runtime:
        answer = runtime.generate("play", max_tokens=500)
    assert answer.stop_reason == "length"
    assert answer.timings.prompt_tokens + answer.tokens == 65

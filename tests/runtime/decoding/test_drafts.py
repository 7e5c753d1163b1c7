from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from edgetune_export.drafts import Row, table_of
from edgetune_runtime import IncompatibleError, Runtime, VerificationError
from edgetune_runtime.decoding.drafts import END, Drafter, DraftTable, read_table, write_table
from edgetune_runtime.engines.gguf.ggml import cpu_backend
from edgetune_runtime.engines.gguf.llama import library
from edgetune_runtime.inference.measuring import loaded_bundle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runtime.bundles import add_draft_table

HAS_LLAMAFILE = "LLAMAFILE" in cpu_backend(library()).features
TOKENIZER = "a" * 64
STOP = 9
# An answer of four tokens that always follows the prompt's last one, and a token copied from the prompt.
ROWS = [Row([1, copied, 5, 20, 21, copied, 22, STOP], 3) for copied in (100, 101, 102, 103)]


@pytest.fixture
def table() -> DraftTable:
    return table_of(ROWS, lambda token: token == STOP, TOKENIZER)


def drafted(table: DraftTable, tokens: list[int], limit: int = 8) -> list[int]:
    return Drafter(table, tokens).propose(limit)[0]


def test_a_draft_follows_the_training_answers(table: DraftTable) -> None:
    assert drafted(table, [1, 100, 5]) == [20, 21]
    assert drafted(table, [1, 100, 5], limit=1) == [20]


def test_a_draft_ends_where_the_answers_end(table: DraftTable) -> None:
    assert table.next([20, 21, 100, 22])[0] == END
    assert drafted(table, [1, 100, 5, 20, 21, 100, 22]) == []


def test_a_longer_context_decides() -> None:
    rows = [*ROWS, *ROWS, *[Row([1, 7, 5, 30, 21, 40, STOP], 3)] * 4]
    both = table_of(rows, lambda token: token == STOP, TOKENIZER)
    assert both.next([1, 104, 5])[0] == 20
    assert both.next([1, 7, 5])[0] == 30


def test_what_the_prompt_repeats_is_drafted() -> None:
    copied = DraftTable.of({}, [0.5, 0.9, 0.9, 0.9, 0.9, 0.9], TOKENIZER)
    draft, chances = Drafter(copied, [1, 2, 3, 4, 5, 8, 1, 2]).propose(8)
    assert draft == [3, 4, 5, 8, 1, 2]
    assert chances == pytest.approx([0.9**n for n in range(1, 7)])


def test_wrong_drafts_make_an_answer_trust_them_less(table: DraftTable) -> None:
    drafter = Drafter(table, [1, 100, 5])
    before = drafter.propose(8)[1]
    drafter.learn([1.0] * 8, 0)
    after = drafter.propose(8)[1]
    assert after[0] == pytest.approx(before[0] * 2 / 10)
    drafter.learn([0.0] * 8, 8)
    assert drafter.propose(8)[1] == pytest.approx(before)


def test_the_last_answer_is_drafted_until_this_one_differs(table: DraftTable) -> None:
    drafter = Drafter(table, [1, 100, 5], [40, *range(50, 70)])
    drafter.add([40])
    draft, chances = drafter.propose(99)
    assert draft == list(range(50, 65))
    assert chances == pytest.approx([0.98**n for n in range(1, 16)])
    assert drafter.propose(3)[0] == [50, 51, 52]
    drafter.add(range(50, 70))
    assert drafter.propose(99) == ([], [])
    other = Drafter(table, [1, 100, 5], [40, 41])
    other.add([20])
    assert other.propose(8)[0] == [21]


def test_a_table_survives_its_file(table: DraftTable, tmp_path: Path) -> None:
    write_table(tmp_path / "draft.bin", table)
    found = read_table(tmp_path / "draft.bin", TOKENIZER, 999)
    assert list(found.keys) == list(table.keys)
    assert list(found.tokens) == list(table.tokens)
    assert list(found.confidences) == list(table.confidences)
    assert found.copied == table.copied


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\x07", lambda _: b"{}\n"])
def test_a_damaged_table_is_refused(table: DraftTable, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "draft.bin"
    write_table(path, table)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VerificationError, match=r"draft\.bin is not a draft table"):
        read_table(path, TOKENIZER, 999)


def test_a_table_with_tokens_outside_of_the_vocabulary_is_refused(table: DraftTable, tmp_path: Path) -> None:
    write_table(tmp_path / "draft.bin", table)
    most = max(token for token in table.tokens if token != END)
    assert read_table(tmp_path / "draft.bin", TOKENIZER, most + 1)
    with pytest.raises(VerificationError, match=rf"draft\.bin is .* outside of the vocabulary of {most}"):
        read_table(tmp_path / "draft.bin", TOKENIZER, most)


def test_the_table_of_another_tokenizer_is_refused(table: DraftTable, tmp_path: Path) -> None:
    write_table(tmp_path / "draft.bin", table)
    with pytest.raises(IncompatibleError, match="another tokenizer"):
        read_table(tmp_path / "draft.bin", "b" * 64, 999)


PROMPTS = ("turn on the warm light", "play", "stop " * 12)


@pytest.fixture(scope="module")
def drafting(prompted_of: Callable[[str], Path], engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter `one` has a table of what it answers to some prompts."""
    bundle = Path(shutil.copytree(prompted_of("llama"), tmp_path_factory.mktemp("drafting") / "home"))
    add_draft_table(bundle, engine, PROMPTS)
    return bundle


CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from([*PROMPTS, "turn", "stop stop the light", "something else"]),
            "adapter": st.sampled_from([None, "one", {"one": 0.5}]),
            "max_tokens": st.integers(1, 40),
        },
        optional={
            "temperature": st.sampled_from([0.0, 0.7, 1.5]),
            "seed": st.integers(0, 3),
            "top_k": st.sampled_from([0, 5]),
            "repeat_penalty": st.sampled_from([1.0, 1.2]),
            "stop": st.sampled_from(["light", "a", "the "]),
            "choices": st.just(["the warm light", "the hall", "light of the hall"]),
        },
    ),
    min_size=1,
    max_size=4,
)


FIXED: list[dict[str, Any]] = [
    {"prompt": prompt, "adapter": "one", "max_tokens": most, **sampling}
    for sampling in ({}, {"temperature": 1.2, "seed": 5}, {"repeat_penalty": 1.3})
    for prompt in (*PROMPTS, "something else")
    for most in (1, 2, 7, 40)
]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS)
@example(calls=FIXED)
def test_a_series_of_calls_gives_the_answers_that_it_gives_without_drafts(
    fast: Runtime, expected: Callable[[str], Told], calls: list[dict[str, Any]]
) -> None:
    for call in calls:
        # Without a seed, a drawn answer is another one each time.
        asked = {"seed": 0, **call}
        assert told(fast, asked) == expected(json.dumps(asked))


Told = tuple[str, int, str]


def told(runtime: Runtime, asked: dict[str, Any]) -> Told:
    options = dict(asked)
    answer = runtime.generate(options.pop("prompt"), **options)
    return answer.text, answer.tokens, answer.stop_reason


@pytest.fixture(scope="module", params=["off", "memory"])
def fast(drafting: Path, engine: str, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A runtime with drafts, that may learn them."""
    with Runtime.open(drafting, engine=engine, disk_mb=0, learn_drafts=request.param) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(drafting: Path, engine: str) -> Iterator[Callable[[str], Told]]:
    """`expected(call)`: what a runtime without drafts answers to a call, as JSON; each is asked once."""
    with Runtime.open(drafting, engine=engine, disk_mb=0, drafts=False) as runtime:
        yield cache(lambda call: told(runtime, json.loads(call)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5}])
def test_drafts_change_no_constrained_answer_and_no_log_probability(
    drafting: Path, engine: str, sampling: dict[str, Any]
) -> None:
    forms = [{}, {"regex": r"(.|\n){1,20}and the warm light(.|\n){1,20}is in the hall"}]
    options: dict[str, Any] = {"engine": engine, "disk_mb": 0}
    with Runtime.open(drafting, **options) as fast, Runtime.open(drafting, **options, drafts=False) as plain:
        for prompt in (*PROMPTS, "something else"):
            for form in forms:
                asked: dict[str, Any] = {"adapter": "one", "max_tokens": 60, **form, **sampling}
                found, expected = (runtime.generate(prompt, logprobs=2, **asked) for runtime in (fast, plain))
                assert found.text == expected.text == fast.generate(prompt, **asked).text
                assert found.logprobs is not None
                assert expected.logprobs is not None
                assert [one.token for one in found.logprobs] == [one.token for one in expected.logprobs]
                figures = [[one.logprob, *(each.logprob for each in one.top)] for one in expected.logprobs]
                for one, row in zip(found.logprobs, figures, strict=True):
                    found_figures = [one.logprob, *(each.logprob for each in one.top)]
                    assert found_figures == pytest.approx(row, abs=0.005 if engine == "gguf" and HAS_LLAMAFILE else 0)


def test_drafts_shorten_an_answer_that_was_given_before(drafting: Path, engine: str) -> None:
    with Runtime.open(drafting, engine=engine, disk_mb=0) as runtime:
        timings = runtime.generate(PROMPTS[0], adapter="one", max_tokens=40).timings
    assert timings.accepted > 20
    assert timings.tokens_per_step > 3


def test_a_stop_text_within_a_draft_ends_the_answer_there(drafting: Path, engine: str) -> None:
    with Runtime.open(drafting, engine=engine, disk_mb=0, drafts=False) as plain:
        whole = plain.generate(PROMPTS[0], adapter="one", max_tokens=40).text
        stop = whole[len(whole) // 2 :][:3]
        expected = plain.generate(PROMPTS[0], adapter="one", max_tokens=40, stop=stop)
    with Runtime.open(drafting, engine=engine, disk_mb=0) as runtime:
        found = runtime.generate(PROMPTS[0], adapter="one", max_tokens=40, stop=stop)
        assert (found.text, found.tokens, found.stop_reason) == (expected.text, expected.tokens, "stop")
        call = loaded_bundle(runtime).call(PROMPTS[0], "one")
        assert len(call.pool.first.tokens) <= len(call.job.tokens) + found.tokens


def test_a_session_continues_after_drafted_answers(drafting: Path, engine: str) -> None:
    answers = []
    for drafts in (True, False):
        opened = Runtime.open(drafting, engine=engine, disk_mb=0, drafts=drafts)
        with opened as runtime, runtime.session("one") as session:
            answers.append([session.send(prompt, max_tokens=12).text for prompt in PROMPTS])
    assert answers[0] == answers[1]


def test_a_context_that_fills_up_ends_a_drafted_answer_where_it_ends_without(drafting: Path, engine: str) -> None:
    found = []
    for drafts in (True, False):
        with Runtime.open(drafting, engine=engine, disk_mb=0, drafts=drafts, context_length=120) as runtime:
            answer = runtime.generate(PROMPTS[0], adapter="one", max_tokens=200)
            found.append((answer.text, answer.tokens, answer.stop_reason))
    assert found[0] == found[1]
    assert found[0][2] == "length"

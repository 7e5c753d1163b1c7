from __future__ import annotations

import gc
import json
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError
from pydantic import BaseModel
from runtime.decoding.answers import random_answer
from runtime.decoding.schemas import FORMS

Opened = tuple[Tokenizer, Grammars]

EXAMPLE = Path(__file__).parents[3] / "examples/smart-home/data"
COMMAND = output_of(
    schema={
        "type": "object",
        "properties": {"service": {"enum": ["light.on", "light.off"]}, "area": {"type": "string"}},
        "required": ["service"],
    },
    spacing="spaced",
)


ONE_OF_EACH = [("gguf", "tiny"), ("onnx", "smollm2")]
"""Each base in one engine: a constraint knows only tokens, which are the same in both engines."""


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_a_tokenizer_gives_all_tokens_at_once_as_one_by_one_and_alike_in_both_engines(
    name: str, opened: Callable[..., Opened]
) -> None:
    (gguf, _), (onnx, _) = (opened(engine, name) for engine in ("gguf", "onnx"))
    for tokenizer in (gguf, onnx):
        every = range(tokenizer.vocab_size)
        assert tokenizer.pieces() == [tokenizer.piece(token) for token in every]
        assert tokenizer.ends() == [token for token in every if tokenizer.is_end(token)]
    assert gguf.pieces() == onnx.pieces()
    assert gguf.ends() == onnx.ends()


def allowed_by(constraint: Constraint) -> np.ndarray | None:
    """Whether each token [vocab] may come next; None at a dead end."""
    masked = constraint.mask(np.zeros(constraint._vocabulary.size, np.float32))
    return None if masked is None else masked == 0


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(map(tokenizer.piece, tokens)).decode()


@pytest.mark.parametrize("base", ONE_OF_EACH, ids="-".join, indirect=True)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_random_answers_fit_their_schema(form: type[BaseModel], base: Opened) -> None:
    tokenizer, grammars = base
    random = np.random.default_rng(0)
    for spacing in ("any", "compact", "spaced"):
        spec = output_of(schema=form, spacing=spacing)
        for number in range(10 if tokenizer.vocab_size < 1000 else 2):
            answer = random_answer(grammars.constraint(spec), tokenizer, random, force=number % 2 == 0)
            assert isinstance(spec.parse(answer.decode()), form)


CHOICES = ["on", "off", "warm", "warm red", "café ☕", 'a "b"\\\n']
GRAMMAR = 'start: "turn " STATE (" the " NAME)?\nSTATE: "on" | "off"\nNAME: /[a-z]{1,5}/'


@pytest.mark.parametrize("base", ONE_OF_EACH, ids="-".join, indirect=True)
@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (output_of(regex=r"[a-z]{1,4}(-\d{2}){0,2}"), r"[a-z]{1,4}(-\d{2}){0,2}"),
        (output_of(grammar=GRAMMAR), "turn (on|off)( the [a-z]{1,5})?"),
        (output_of(choices=CHOICES), "|".join(map(re.escape, CHOICES))),
    ],
    ids=["regex", "grammar", "choices"],
)
def test_random_answers_fit_choices_regex_and_grammar(spec: OutputSpec, pattern: str, base: Opened) -> None:
    tokenizer, grammars = base
    random = np.random.default_rng(0)
    found = set()
    for number in range(60):
        answer = random_answer(grammars.constraint(spec), tokenizer, random, force=number % 2 == 0).decode()
        assert spec.parse(answer) == answer
        assert re.fullmatch(pattern, answer)
        found.add(answer)
    assert len(found) >= len(CHOICES)


@pytest.mark.parametrize("text", ["turn on the lamp", "  lamp, 23 °C 🙂", "<|im_end|> is text", "a\n\nb"])
def test_a_forced_text_has_the_tokens_of_training(text: str, base: Opened) -> None:
    tokenizer, grammars = base
    constraint = grammars.constraint(output_of(choices=[text]))
    tokens = constraint.forced()
    assert text_of(tokenizer, tokens) == text
    if "<" not in text:
        assert tokens == tokenizer.tokenize(text, continues=True)
    constraint.accept(*tokens)
    assert constraint.is_complete
    assert constraint.forced() == []


def test_forced_tokens_stop_where_another_token_may_go_on(base: Opened) -> None:
    tokenizer, grammars = base
    constraint = grammars.constraint(output_of(choices=["turn on the lamp", "turn on the light"]))
    tokens = constraint.forced()
    for whole in ("turn on the lamp", "turn on the light"):
        expected = tokenizer.tokenize(whole, continues=True)
        assert expected[: len(tokens)] == tokens
        assert constraint.valid_prefix(expected) == len(expected)


def test_only_end_tokens_may_come_where_nothing_else_fits(base: Opened) -> None:
    tokenizer, grammars = base
    ends = tokenizer.ends()
    assert len(ends) > 1
    constraint = grammars.constraint(output_of(choices=["lamp"]))
    before = allowed_by(constraint)
    assert before is not None
    assert not before[ends].any()
    assert not constraint.may_end
    with pytest.raises(UsageError, match=f"token {ends[0]} may not come next"):
        constraint.accept(ends[0])
    constraint.accept(*tokenizer.tokenize("lamp", continues=True))
    after = allowed_by(constraint)
    assert after is not None
    assert np.flatnonzero(after).tolist() == ends
    assert [constraint.valid_prefix([end]) for end in ends] == [1] * len(ends)
    constraint.accept(ends[-1])
    assert constraint.valid_prefix([ends[0]]) == 0
    assert allowed_by(constraint) is None
    assert constraint.is_complete
    with pytest.raises(UsageError, match="may not come next"):
        constraint.accept(ends[0])


def test_an_answer_may_end_or_go_on_where_both_fit(tiny: Opened) -> None:
    tokenizer, grammars = tiny
    constraint = grammars.constraint(output_of(choices=["warm", "warm red"]))
    constraint.accept(*tokenizer.tokenize("warm", continues=True))
    assert constraint.may_end
    assert not constraint.is_complete
    assert constraint.forced() == []
    count = len(constraint.tokens)
    rest = tokenizer.tokenize("warm red", continues=True)[count:]
    assert constraint.valid_prefix([*rest, tokenizer.end_token, tokenizer.end_token]) == len(rest) + 1
    constraint.accept(*rest, tokenizer.end_token)
    whole = count + len(rest)
    assert [n for n in range(whole + 1) if constraint.may_end_after(n)] == [count, whole]


def test_the_mask_keeps_the_logits_of_what_may_come_next(base: Opened) -> None:
    tokenizer, grammars = base
    random = np.random.default_rng(0)
    constraint = grammars.constraint(COMMAND)
    constraint.accept(*tokenizer.tokenize('{"service": "light.on", "area": "', continues=True))
    logits = random.normal(0, 3, tokenizer.vocab_size).astype(np.float32)
    kept = logits.copy()
    masked, allowed = constraint.mask(logits), allowed_by(constraint)
    assert masked is not None
    assert allowed is not None
    assert masked.dtype == np.float32
    np.testing.assert_array_equal(logits, kept)
    np.testing.assert_array_equal(masked, np.where(allowed, logits, -np.inf))
    assert 100 < allowed.sum() < tokenizer.vocab_size
    # Some engines pad the vocabulary.
    padded = constraint.mask(np.append(logits, np.zeros(100, np.float32)))
    assert padded is not None
    np.testing.assert_array_equal(padded, np.append(masked, np.full(100, -np.inf)))


def test_a_token_is_valid_as_the_mask_says_where_none_is_forced(base: Opened) -> None:
    tokenizer, grammars = base
    random, compared = np.random.default_rng(0), 0
    for form in FORMS[:3]:
        constraint = grammars.constraint(output_of(schema=form))
        for _ in range(30):
            if constraint.is_complete:
                break
            allowed = allowed_by(constraint)
            assert allowed is not None
            tested = random.integers(0, tokenizer.vocab_size, 200)
            if not constraint.forced():
                assert [constraint.valid_prefix([int(token)]) for token in tested] == allowed[tested].tolist()
                compared += 1
            constraint.accept(int(random.choice(np.flatnonzero(allowed))))
    assert compared > 10


def test_drafts_are_valid_up_to_the_first_token_that_does_not_fit(base: Opened) -> None:
    tokenizer, grammars = base
    constraint = grammars.constraint(COMMAND)
    good = tokenizer.tokenize('{"service": "light.off"}', continues=True)
    bad = tokenizer.tokenize("]]", continues=True)
    assert constraint.valid_prefix([]) == 0
    assert constraint.valid_prefix(good) == len(good)
    assert constraint.valid_prefix([*good, tokenizer.end_token]) == len(good) + 1
    assert constraint.valid_prefix([*good[:3], *bad]) == 3
    assert constraint.valid_prefix([*good[:3], tokenizer.vocab_size, *good[3:]]) == 3
    assert constraint.valid_prefix([-1]) == 0
    assert constraint.tokens == []


def test_a_token_outside_the_constraint_is_refused_and_the_answer_continues(tiny: Opened) -> None:
    tokenizer, grammars = tiny
    constraint = grammars.constraint(COMMAND)
    good = tokenizer.tokenize('{"service": "light.off"}', continues=True)
    for token in (-1, tokenizer.vocab_size, *tokenizer.tokenize("]", continues=True)):
        with pytest.raises(UsageError, match=f"token {token} may not come next"):
            constraint.accept(token)
    constraint.accept(*good)
    assert constraint.is_complete


def test_a_dead_end_gives_no_mask(tiny: Opened) -> None:
    tokenizer, grammars = tiny
    # No text is both of these.
    constraint = grammars.constraint(output_of(grammar='start: "a" BOTH | "lamp"\nBOTH: /b/ & /c/'))
    (a,) = tokenizer.tokenize("a", continues=True)
    assert allowed_by(constraint) is not None
    constraint.accept(a)
    assert allowed_by(constraint) is None
    assert constraint.mask(np.zeros(tokenizer.vocab_size, np.float32)) is None
    assert constraint.forced() == []
    assert constraint.valid_prefix([a, tokenizer.end_token]) == 0
    assert not constraint.may_end
    assert not constraint.is_complete
    with pytest.raises(UsageError, match="may not come next"):
        constraint.accept(a)


def test_an_end_token_that_a_grammar_names_does_not_end_it(tiny: Opened) -> None:
    tokenizer, grammars = tiny
    end = tokenizer.end_token
    constraint = grammars.constraint(output_of(grammar=f'start: "lamp" <[{end}]> "on"'))
    constraint.accept(*tokenizer.tokenize("lamp", continues=True))
    assert allowed_by(constraint) is None
    assert constraint.mask(np.zeros(tokenizer.vocab_size, np.float32)) is None
    anything = allowed_by(grammars.constraint(output_of(grammar='start: <[*]> "on"')))
    assert anything is not None
    assert anything.sum() > 300
    assert not anything[end]


def go_on(constraint: Constraint, ends: list[int], random: np.random.Generator, steps: int) -> None:
    """Accept random tokens that do not end the answer."""
    for _ in range(steps):
        allowed = allowed_by(constraint)
        assert allowed is not None
        allowed[ends] = False
        if not allowed.any():
            break
        constraint.accept(int(random.choice(np.flatnonzero(allowed))))


@pytest.mark.parametrize("regex", [r"((a{1,1000}){1,1000}){1,1000}", r"(a?){5000}a{5000}"])
def test_an_exploding_regex_is_an_error_and_the_next_call_works(regex: str, tiny: Opened) -> None:
    tokenizer, grammars = tiny
    ends = tokenizer.ends()
    random = np.random.default_rng(0)
    spec = output_of(regex=regex)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"too many .*; simplify"):
            go_on(grammars.constraint(spec), ends, random, steps=1000)
    assert random_answer(grammars.constraint(COMMAND), tokenizer, random, force=True)


def test_answers_go_on_when_the_automaton_that_they_share_is_full(tiny: Opened) -> None:
    tokenizer, grammars = tiny
    ends = tokenizer.ends()
    random = np.random.default_rng(0)
    # A state for each of the last 41 letters: some 10,000 tokens fill the automaton.
    spec = output_of(regex="(a|b)*a(a|b){40}")
    for _ in range(8):
        constraint = grammars.constraint(spec)
        go_on(constraint, ends, random, steps=2000)
        assert len(constraint.tokens) == 2000


def test_a_control_token_that_the_base_lacks_is_refused(tiny: Opened) -> None:
    _, grammars = tiny
    with pytest.raises(UsageError, match=r"unknown special token: \"<\|tool_call\|>\".*; name a control token"):
        grammars.constraint(output_of(grammar='start: <|tool_call|> "a"'))


def test_control_tokens_that_the_template_names_can_be_named(opened: Callable[..., Opened]) -> None:
    for engine in ("gguf", "onnx"):
        tokenizer, grammars = opened(engine, "smollm2")
        (start,) = tokenizer.tokenize("<|im_start|>", continues=True)
        constraint = grammars.constraint(output_of(grammar='start: <|im_start|> "lamp"'))
        allowed = allowed_by(constraint)
        assert allowed is not None
        assert np.flatnonzero(allowed).tolist() == [start]


def test_answers_of_several_threads_do_not_mix(opened: Callable[..., Opened]) -> None:
    tokenizer, grammars = opened("gguf", "tiny")
    spec = output_of(schema=FORMS[1])
    alone = [
        random_answer(grammars.constraint(spec), tokenizer, np.random.default_rng(seed), force=False)
        for seed in range(8)
    ]
    found: dict[int, bytes] = {}

    def answer(seed: int) -> None:
        random = np.random.default_rng(seed)
        found[seed] = random_answer(Grammars.constraint(grammars, spec), tokenizer, random, force=False)

    threads = [threading.Thread(target=answer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == alone


def test_the_best_token_is_that_of_the_mask(base: Opened) -> None:
    tokenizer, grammars = base
    random = np.random.default_rng(0)
    for form in FORMS[:3]:
        constraint = grammars.constraint(output_of(schema=form, spacing="spaced"))
        for _ in range(40):
            if constraint.is_complete:
                break
            logits = random.normal(0, 2, tokenizer.vocab_size).astype(np.float32)
            allowed, masked = allowed_by(constraint), constraint.mask(logits)
            assert allowed is not None
            assert masked is not None
            # As often as not the likeliest token is one that may come next.
            logits[random.choice(np.flatnonzero(allowed))] += random.choice([0, 20])
            best = constraint.best(logits)
            assert best is not None
            assert best == np.where(allowed, logits, -np.inf).argmax()
            constraint.accept(best)
    ended = grammars.constraint(output_of(choices=["lamp"]))
    ended.accept(*tokenizer.tokenize("lamp", continues=True))
    assert tokenizer.is_end(ended.best(np.zeros(tokenizer.vocab_size, np.float32)) or 0)
    stuck = grammars.constraint(output_of(grammar=f'start: "lamp" <[{tokenizer.end_token}]> "on"'))
    stuck.accept(*tokenizer.tokenize("lamp", continues=True))
    assert stuck.best(np.zeros(tokenizer.vocab_size, np.float32)) is None


def test_answers_of_the_example_are_forced_as_they_are_trained(base: Opened) -> None:
    tokenizer, grammars = base
    lines = (EXAMPLE / "command-test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["completion"] for line in lines]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: {"enum": list(dict.fromkeys(row[name] for row in rows if name in row))} for name in names}
    schema = {"type": "object", "properties": values, "required": ["service"]}
    for spacing, least in (("any", 0.1), ("spaced", 0.4)):
        spec, total, forced = output_of(schema=schema, spacing=spacing), 0, 0
        for row in rows:
            text = json.dumps({name: row[name] for name in names if name in row})
            tokens, constraint = tokenizer.tokenize(text, continues=True), grammars.constraint(spec)
            total += len(tokens)
            while tokens:
                must = constraint.forced()
                assert tokens[: len(must)] == must
                following = must or tokens[:1]
                allowed = allowed_by(constraint)
                assert allowed is not None
                assert allowed[following[0]]
                constraint.accept(*following)
                forced, tokens = forced + len(must), tokens[len(following) :]
            assert constraint.is_complete
        assert forced > least * total


def test_a_vocabulary_is_freed_with_its_forms(opened: Callable[..., Opened]) -> None:
    tokenizer, _ = opened("onnx", "tiny")
    grammars = Grammars(tokenizer)
    constraint = grammars.constraint(output_of(choices=["<|im_end|>"]))
    assert text_of(tokenizer, constraint.forced()) == "<|im_end|>"
    vocabulary = weakref.ref(constraint._vocabulary)
    del grammars, constraint
    gc.collect()
    assert vocabulary() is None

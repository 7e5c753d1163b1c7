"""Measure what drafts from past answers save on the days of a household: the decode cost, in steps of one token.

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/learned_drafts.py build/smart-home --out benchmarks/results

The runtime answers each request of the days once, greedily. Then its own decoding goes through all answers again,
without a model: with draft tables alone, with the last answer to the same prompt (`learn_drafts`), and as if every
prompt had come before. The cost is that of `BATCH_COST`, so other processes do not change it. Prefill is not in it.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result
from benchmarks.harness.tables import markdown, progress

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_runtime import Runtime
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.inference.answer import Outcome
from edgetune_runtime.inference.call import Call
from edgetune_runtime.inference.generation import generate
from edgetune_runtime.inference.loaded import LoadedBundle
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.limits import CallLimits
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.jobs import PrefillResult, PromptJob
from edgetune_runtime.serving.pool import Pool

from benchmarks.household import Household

MOST_TOKENS = 60
TABLE, PAST, KNOWN = "table", "past answers", "every prompt known"


class Replay(Context):
    """A context that gives the logits of an answer that is known, and adds up the cost of steps."""

    def __init__(self, context: Context, answer: Sequence[int]) -> None:
        super().__init__(context.engine, context.shared)
        self.cost = 0.0
        self._answer, self._known = answer, list[int]()

    def run(self, job: PromptJob) -> PrefillResult:
        self._known, self.tokens = [*job.tokens, *self._answer], list(job.tokens)
        return PrefillResult(self._rows(1)[0], 0, 0.0)

    def extend(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        count = len(tokens) if last is None else last
        self.cost += self.batch_cost.of(len(tokens), count - 1)
        self.tokens += tokens
        return self._rows(count)

    def truncate(self, count: int) -> None:
        del self.tokens[count:]

    def _rows(self, count: int) -> Logits:
        """After each of the last tokens, that of the answer; after its end and where a draft was wrong, any."""
        rows = np.zeros((count, self.engine.tokenizer.vocab_size), np.float32)
        for row, place in zip(rows, range(len(self.tokens) - count + 1, len(self.tokens) + 1), strict=True):
            row[self._known[min(place, len(self._known) - 1)]] = 1
        return rows


def main() -> None:
    """Draw the days, answer their requests, and add up what their answers cost."""
    parser = BENCHMARK.parser(only=ENGINES, threads=2)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--days", type=int, default=3)
    parser.add_argument("--new", type=float, default=0.25, help="share of sentences that are not a habit")
    parser.add_argument("--reworded", type=float, default=0.3, help="share of habits that are said in other words")
    parser.add_argument("--seed", type=int, default=0)
    options = BENCHMARK.options(parser, days=1)
    days = [{"engine": engine, **figures} for engine in options.only for figures in measure(options, engine)]
    BENCHMARK.report(options, {"days": days})


def measure(options: argparse.Namespace, engine: str) -> Iterator[dict[str, Any]]:
    """The cost of each day's answers in each setup."""
    household, texts = Household(options.seed, options.new, options.reworded), dict[tuple[str, str], str]()
    opening: dict[str, Any] = {"engine": engine, "threads": options.threads, "disk_mb": 0}
    plain = Runtime.open(options.bundle, **opening)
    learning, knowing = (Runtime.open(options.bundle, **opening, learn_drafts="memory") for _ in range(2))

    def answer(adapter: str, prompt: str) -> str:
        if (adapter, prompt) not in texts:
            texts[adapter, prompt] = plain.generate(prompt, adapter=adapter, max_tokens=MOST_TOKENS).text
        return texts[adapter, prompt]

    with plain, learning, knowing:
        runtimes = {TABLE: plain, PAST: learning, KNOWN: knowing}
        for day in range(1, options.days + 1):
            costs, answers, again = defaultdict[str, float](float), 0, 0
            for adapter, prompt in household.day(answer):
                again += (adapter, prompt) in texts
                answers += 1
                text = answer(adapter, prompt)
                for setup, runtime in runtimes.items():
                    costs[setup] += cost_of(loaded_bundle(runtime), adapter, prompt, text, is_known=setup == KNOWN)
            progress(f"{engine}, day {day}: {answers} answers")
            yield {
                "day": day,
                "answers": answers,
                "again": again,
                **{name: round(cost) for name, cost in costs.items()},
            }


def cost_of(loaded: LoadedBundle, adapter: str, prompt: str, text: str, *, is_known: bool) -> float:
    """The cost of the steps that give this answer."""
    call = loaded.call(prompt, adapter)
    tokenizer = call.pool.first.engine.tokenizer
    tokens = tokenizer.tokenize(text, continues=True)
    if is_known and call.past is not None:
        call.past.keep(tokens)
        call = loaded.call(prompt, adapter)
    return replayed(call, [*tokens, tokenizer.end_token], text)


def replayed(call: Call, answer: list[int], text: str) -> float:
    """Go through the steps of an answer; the cost of all of them."""
    replay, outcome = Replay(call.pool.first, answer), Outcome()
    limits = CallLimits(None, None)
    for _ in generate(replace(call, pool=Pool(replay)), outcome, limits, max_tokens=MOST_TOKENS):
        pass
    assert outcome.answer is not None
    assert outcome.answer.text == text, "decoding gives another answer"
    return replay.cost


def table(result: Result) -> str:
    """A row per engine and day."""
    about = (
        f"{result['new']:.0%} of the sentences are new, {result['reworded']:.0%} of the habits in other words. "
        "Cost of decoding in steps of one token."
    )
    rows = [{**day, "saved": 1 - day[PAST] / day[TABLE], "most": 1 - day[KNOWN] / day[TABLE]} for day in result["days"]]
    columns = {
        "engine": "{engine}",
        "day": "{day}",
        "answers": "{answers}",
        "came before": "{again}",
        "cost with tables": "{table}",
        "and past answers": "{past answers}",
        "saved": "{saved:.1%}",
        "saved if every prompt were known": "{most:.1%}",
    }
    return f"{about}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

"""Measure how a step of several tokens rounds, and how many answers that changes.

    edgetune build examples/smart-home/recipe.yaml --out build/smart-home
    python benchmarks/rounding.py build/smart-home=examples/smart-home/recipe.yaml

The validation rows of each adapter are answered greedily, with its scale and with a small one, as a task that was
trained too little. `steps` compares the logits of steps of several tokens with those of single steps: after keys and
values of single steps (`own`), and of a single step after keys and values of steps of several tokens (`kept`).
`answers` compares answers with drafts with those without, one at a time and four at once.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown
from benchmarks.harness.worker import in_own_process

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_runtime import Answer, Runtime
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.inference.measuring import loaded_bundle

from benchmarks.decoding_setups import Prompt, prompt_of
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task

PARTS = ("steps", "answers")
SCALES = (1.0, 0.3)
SIZES = (2, 4, 8)
LONGEST = 40
CALLERS = 4

Pairs = Iterator[tuple[str, Logits, Logits]]
"""What is compared, its logits [rows, vocab], and those of single steps."""

Asked = tuple[str, float, Prompt]
"""An adapter, its scale and a prompt."""


def greedy(engine: Engine, logits: Logits) -> tuple[list[int], Logits]:
    """A greedy answer in single steps, and the logits after each of its tokens."""
    tokens, rows = [int(logits.argmax())], list[Logits]()
    while len(tokens) <= LONGEST and not engine.tokenizer.is_end(tokens[-1]):
        rows.append(engine.decode_all(tokens[-1:])[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens[: len(rows)], np.array(rows)


def compared_steps(engine: Engine, start: int, tokens: Sequence[int], single: Logits) -> Pairs:
    """Steps of each size from the answer's tokens, which follow `start` others."""
    for size in SIZES:
        engine.truncate(start)
        for place in range(0, len(tokens) - size + 1, size):
            step = tokens[place : place + size]
            yield f"own, {size} tokens", engine.decode_all(step), single[place : place + size]
            engine.truncate(start + place)
            for token in step:
                engine.decode_all([token])
        engine.truncate(start)
        for place in range(size, len(tokens), size):
            engine.decode_all(tokens[place - size : place])
            yield f"kept, {size} tokens", engine.decode_all([tokens[place]]), single[place : place + 1]
            engine.truncate(start + place)


def margins_of(logits: Logits, best: Sequence[int], second: Sequence[int]) -> Logits:
    """By how much the best token of single steps leads the second."""
    rows = np.arange(len(logits))
    margins: Logits = logits[rows, best] - logits[rows, second]
    return margins


def measure_steps(runtime: Runtime, adapter: str, scale: float, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Figures of each kind of step."""
    loaded, differences = loaded_bundle(runtime), defaultdict[str, list[tuple[float, float, bool]]](list)
    context, _ = loaded.context(adapter)
    for prompt in prompts:
        tokens = loaded.call(prompt, adapter).job.tokens
        with context.hold():
            answer, single = greedy(context.engine, context.start({adapter: scale}, tokens).logits)
            for kind, rows, expected in compared_steps(context.engine, len(tokens), answer, single):
                second, best = np.argsort(expected, -1)[:, -2:].T
                moved = np.abs(margins_of(rows, best, second) - margins_of(expected, best, second))
                apart, others = np.abs(rows - expected).max(-1), rows.argmax(-1) != best
                differences[kind] += zip(apart.tolist(), moved.tolist(), others.tolist(), strict=True)
            context.reset()
    return [{"kind": kind, **figures(values)} for kind, values in differences.items()]


def figures(values: Sequence[tuple[float, float, bool]]) -> dict[str, Any]:
    apart, moved, others = map(np.array, zip(*values, strict=True))
    return {
        "rows": len(values),
        "unequal": int((apart > 0).sum()),
        "logit_max": round(float(apart.max()), 4),
        "margin_p50": round(float(np.median(moved)), 4),
        "margin_max": round(float(moved.max()), 4),
        "other_token": int(others.sum()),
    }


def answers_to(runtime: Runtime, asked: Sequence[Asked], callers: int = 1) -> list[Answer]:
    """The greedy answers, with so many callers at once."""

    def answer(one: Asked) -> Answer:
        adapter, scale, prompt = one
        return runtime.generate(prompt, adapter={adapter: scale}, max_tokens=LONGEST)

    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(answer, asked))


def measure_answers(fast: Runtime, plain: Runtime, asked: Sequence[Asked]) -> list[Result]:
    """By adapter and scale: how many answers drafts change, alone and among neighbours, and the steps and tokens."""
    answers = answers_to(plain, asked), answers_to(fast, asked), answers_to(fast, asked, CALLERS)
    results = dict[tuple[str, float], Result]()
    for (adapter, scale, _), expected, alone, among in zip(asked, *answers, strict=True):
        zeros = dict.fromkeys(("answers", "differ", "differ_among_neighbours", "tokens", "steps"), 0)
        sums = results.setdefault((adapter, scale), {"adapter": adapter, "scale": scale, **zeros})
        per_step = alone.timings.tokens_per_step
        sums["answers"] += 1
        sums["differ"] += alone.text != expected.text
        sums["differ_among_neighbours"] += among.text != expected.text
        sums["tokens"] += alone.tokens
        sums["steps"] += round((alone.tokens - 1) / per_step) if per_step else 0
    return [results[key] for key in sorted(results)]


def measure(bundle: Path, engine: str, prompts: dict[str, list[Prompt]], parts: Sequence[str], threads: int) -> Result:
    """All figures of an engine, by adapter and scale."""
    options: dict[str, Any] = {"engine": engine, "threads": threads, "disk_mb": 0}
    results = {"steps": list[Result](), "answers": list[Result]()}
    with Runtime.open(bundle, **options, contexts=1, drafts=False) as plain:
        if "steps" in parts:
            for adapter, given in prompts.items():
                for scale in SCALES:
                    setup = {"engine": engine, "adapter": adapter, "scale": scale}
                    results["steps"] += [setup | row for row in measure_steps(plain, adapter, scale, given)]
        if "answers" in parts:
            asked = [(adapter, scale, one) for adapter, given in prompts.items() for scale in SCALES for one in given]
            random.Random(0).shuffle(asked)  # so that neighbours have other adapters
            with Runtime.open(bundle, **options, contexts=CALLERS) as fast:
                results["answers"] = [{"engine": engine} | row for row in measure_answers(fast, plain, asked)]
    return results


def main() -> None:
    """Measure each engine in a process of its own."""
    parser = BENCHMARK.parser(only=PARTS, threads=2)
    parser.add_argument("bundle", metavar="BUNDLE=RECIPE", help="a bundle, and the recipe with its rows")
    parser.add_argument("--rows", type=int, default=40, help="validation rows per adapter")
    options = BENCHMARK.options(parser, rows=1)
    bundle, recipe = map(Path, options.bundle.split("=", 1))
    manifest, prompts = read_manifest(bundle), dict[str, list[Prompt]]()
    for adapter in manifest.adapters:
        rows = read_task(adapter, Recipe.from_file(recipe)).validation[: options.rows]
        prompts[adapter] = [prompt_of(row) for row in rows]
    result: Result = {"steps": [], "answers": []}
    for engine in manifest.base.files:
        measured: Result = in_own_process(measure, bundle, engine, prompts, options.only, options.threads)
        result = {part: result[part] + measured[part] for part in result}
    BENCHMARK.report(options, result)


def table(result: Result) -> str:
    """Markdown: the steps, and the answers."""
    setup = {"engine": "{engine}", "adapter": "{adapter}", "scale": "{scale}"}
    steps = {
        **setup,
        "step": "{kind}",
        "rows": "{rows}",
        "unequal": "{unequal}",
        "largest difference of a logit": "{logit_max}",
        "change of the margin, median": "{margin_p50}",
        "largest": "{margin_max}",
        "other token": "{other_token}",
    }
    answers = {
        **setup,
        "answers": "{answers}",
        "differ": "{differ}",
        "among three neighbours": "{differ_among_neighbours}",
        "tokens": "{tokens}",
        "steps": "{steps}",
    }
    parts = [
        f"{result['rows']} validation rows per adapter, {said_of_machine(result)}.",
        markdown(result["steps"], steps),
        markdown(result["answers"], answers),
    ]
    return "\n\n".join(parts)


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

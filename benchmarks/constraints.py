"""Answer random prompts under ten real JSON schemas: how many answers fit, and what the constraint costs.

    pip install -e '.[demo,bench]'
    python benchmarks/constraints.py build/smart-home --json --out benchmarks/results

Tokens are drawn at temperature 1.5 without filters, the hardest case: the model's likeliest tokens help least. The
jsonschema library judges every answer that is complete; those cut off at `--max-tokens` are counted apart. The cost is
the time in the constraint's calls relative to the time from the first token to the last, and, once per process, that of
reading the base's vocabulary. Exits with 1 if any complete answer does not fit. `--prompts 1000` takes ten times as
long as the default; `--temperature 0` measures greedy answers, and `--filtered` those with the default top_k, top_p and
min_p.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown, progress

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import jsonschema
from edgetune_runtime import Answer, Runtime
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.text.sampling import Sampling

SCHEMAS = Path(__file__).with_name("schemas")
CALLS = ("accept", "best", "forced", "mask", "valid_prefix")
UNFILTERED = Sampling(top_k=0, top_p=1.0, min_p=0.0)
WORDS = (
    "light kitchen weather tomorrow invoice package sensor garden music folder berlin window heater ticket river "
    "morning blue seven quickly please send open describe count without every paper number alarm winter"
)


@dataclass
class Clock:
    """Seconds in the calls of all constraints."""

    seconds: float = 0.0
    _depth: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the calls while the block runs."""
        before = {name: getattr(Constraint, name) for name in CALLS}
        for name, call in before.items():
            setattr(Constraint, name, self._timed(call))
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(Constraint, name, call)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the call takes and returns
            begin = time.perf_counter()
            self._depth += 1
            try:
                return call(*arguments)
            finally:
                self._depth -= 1
                # Calls within calls are counted once.
                self.seconds += 0.0 if self._depth else time.perf_counter() - begin

        return timed


def main() -> int:
    parser = BENCHMARK.parser(threads=2)
    parser.add_argument("bundle", type=Path, help="a bundle for text generation")
    parser.add_argument("--engine", help="gguf or onnx (default: the bundle's first)")
    parser.add_argument("--adapter", help="answer with this adapter (default: the plain base)")
    parser.add_argument("--prompts", type=int, default=100, help="random prompts per schema")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--temperature", type=float, default=1.5, help="0: greedy")
    parser.add_argument("--filtered", action="store_true", help="with the default top_k, top_p and min_p")
    options = BENCHMARK.options(parser, prompts=2)
    result = measure(options)
    BENCHMARK.report(options, result)
    return int(any(figures["misfits"] for figures in result["schemas"].values()))


def measure(options: argparse.Namespace) -> Result:
    """The figures of each schema."""
    figures, clock = {}, Clock()
    opened = Runtime.open(options.bundle, engine=options.engine, threads=options.threads, disk_mb=0)
    with opened as runtime, clock.running():
        begin = time.perf_counter()
        Grammars(loaded_bundle(runtime).context()[0].engine.tokenizer)
        vocabulary_ms = round((time.perf_counter() - begin) * 1e3)
        # The runtime reads it once, for the first constrained call.
        runtime.generate("?", choices=["yes", "no"])
        for path in sorted(SCHEMAS.glob("*.json")):
            progress(f"{path.stem} ...")
            figures[path.stem] = _figures(runtime, json.loads(path.read_text(encoding="utf-8")), options, clock)
        about = {"bundle": runtime.manifest.name, "base": runtime.manifest.base.name, "engine": runtime.engine}
    return {**about, "vocabulary_ms": vocabulary_ms, "schemas": figures}


def _figures(runtime: Runtime, schema: dict[str, Any], options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Counts of the answers under one schema, and costs per token; an answer that ended by itself has to fit."""
    rng = random.Random(0)
    answers: list[Answer] = []
    decode_s = clock.seconds = 0.0
    for seed in range(options.prompts):
        prompt = " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 12)))
        begin = time.perf_counter()
        answer = runtime.generate(
            prompt,
            adapter=options.adapter,
            schema=schema,
            sampling=None if options.filtered else UNFILTERED,
            seed=seed,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
        )
        decode_s += time.perf_counter() - begin - answer.timings.ttft_ms / 1e3
        answers.append(answer)
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    misfits = [answer for answer in answers if not fit(answer.text, judge)]
    tokens = sum(answer.tokens for answer in answers)
    return {
        "answers": len(answers),
        "fit": len(answers) - len(misfits),
        "stop_reasons": Counter(answer.stop_reason for answer in answers),
        "misfits": [answer.text for answer in misfits if answer.stop_reason == "end"],
        "tokens": round(tokens / len(answers), 1),
        "tokens_per_s": round(tokens / decode_s, 1),
        "constraint_us_per_token": round(clock.seconds / tokens * 1e6, 1),
        "constraint_share": round(clock.seconds / decode_s, 4),
    }


def fit(text: str, judge: jsonschema.protocols.Validator) -> bool:
    """Whether the text is JSON of this schema."""
    try:
        return bool(judge.is_valid(json.loads(text)))
    except ValueError:
        return False


def table(result: Result) -> str:
    """Markdown: a row for each schema."""
    filters = "default filters" if result["filtered"] else "no filters"
    about = (
        f"{result['base']}, {result['engine']}, {result['prompts']} prompts per schema, temperature "
        f"{result['temperature']:g}, {filters}, at most {result['max_tokens']} tokens, {said_of_machine(result)}. "
        f"The vocabulary is read in {result['vocabulary_ms']} ms."
    )
    rows = [
        {
            "schema": name,
            "cut": figures["answers"] - figures["stop_reasons"].get("end", 0),
            "misfit": len(figures["misfits"]),
            **figures,
        }
        for name, figures in result["schemas"].items()
    ]
    columns = {
        "schema": "{schema}",
        "answers": "{answers}",
        "fit": "{fit}",
        "cut off": "{cut}",
        "complete, but do not fit": "{misfit}",
        "tokens": "{tokens:.0f}",
        "tokens/s": "{tokens_per_s:.0f}",
        "constraint, µs per token": "{constraint_us_per_token:.0f}",
        "share of decode": "{constraint_share:.1%}",
    }
    return f"{about}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    sys.exit(main())

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

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

import jsonschema
from edgetune_runtime import Answer, Runtime
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.options import SamplingOptions

from benchmarks.machine import this_machine

SCHEMAS = Path(__file__).with_name("schemas")
CALLS = ("accept", "best", "forced", "mask", "valid_prefix")
UNFILTERED: SamplingOptions = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
WORDS = (
    "light",
    "kitchen",
    "weather",
    "tomorrow",
    "invoice",
    "package",
    "sensor",
    "garden",
    "music",
    "folder",
    "berlin",
    "window",
    "heater",
    "ticket",
    "river",
    "morning",
    "blue",
    "seven",
    "quickly",
    "please",
    "send",
    "open",
    "describe",
    "count",
    "without",
    "every",
    "paper",
    "number",
    "alarm",
    "winter",
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


@dataclass
class Tally:
    """What came of the answers under one schema."""

    answers: int = 0
    fit: int = 0
    stop_reasons: dict[str, int] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    tokens: int = 0
    decode_s: float = 0.0
    constraint_s: float = 0.0

    def add(self, answer: Answer, judge: jsonschema.protocols.Validator) -> None:
        """Count an answer; one that ended by itself has to fit."""
        self.answers += 1
        self.tokens += answer.tokens
        self.stop_reasons[answer.stop_reason] = self.stop_reasons.get(answer.stop_reason, 0) + 1
        fits = fit(answer.text, judge)
        self.fit += fits
        if answer.stop_reason == "end" and not fits:
            self.misfits.append(answer.text)

    def to_json(self) -> dict[str, Any]:
        """Counts, and costs per token."""
        return {
            "answers": self.answers,
            "fit": self.fit,
            "stop_reasons": self.stop_reasons,
            "misfits": self.misfits,
            "tokens": round(self.tokens / self.answers, 1),
            "tokens_per_s": round(self.tokens / self.decode_s, 1),
            "constraint_us_per_token": round(self.constraint_s / self.tokens * 1e6, 1),
            "constraint_share": round(self.constraint_s / self.decode_s, 4),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge and time answers under ten JSON schemas.")
    parser.add_argument("bundle", type=Path, help="a bundle for text generation")
    parser.add_argument("--engine", help="gguf or onnx (default: the bundle's first)")
    parser.add_argument("--adapter", help="answer with this adapter (default: the plain base)")
    parser.add_argument("--prompts", type=int, default=100, help="random prompts per schema")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--temperature", type=float, default=1.5, help="0: greedy")
    parser.add_argument("--filtered", action="store_true", help="with the default top_k, top_p and min_p")
    parser.add_argument("--threads", type=int, default=2, help="threads of the engine")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write constraints.json and constraints.md here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "constraints.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "constraints.md").write_text(table(result), encoding="utf-8")
    print(json.dumps(result) if options.json else table(result))
    return int(any(found["misfits"] for found in result["schemas"].values()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each schema."""
    found, clock = {}, Clock()
    opened = Runtime.open(options.bundle, engine=options.engine, threads=options.threads, disk_mb=0)
    with opened as runtime, clock.running():
        begin = time.perf_counter()
        Grammars(loaded_bundle(runtime).context()[0].engine.tokenizer)
        vocabulary_ms = round((time.perf_counter() - begin) * 1e3)
        # The runtime reads it once, for the first constrained call.
        runtime.generate("?", choices=["yes", "no"])
        for path in sorted(SCHEMAS.glob("*.json")):
            print(f"{path.stem} ...", file=sys.stderr)
            found[path.stem] = _tally(runtime, json.loads(path.read_text(encoding="utf-8")), options, clock).to_json()
        settings = {"bundle": runtime.manifest.name, "base": runtime.manifest.base.name, "engine": runtime.engine}
    names = ("adapter", "prompts", "max_tokens", "temperature", "filtered", "threads")
    asked = {name: getattr(options, name) for name in names}
    return {"machine": this_machine(), **settings, **asked, "vocabulary_ms": vocabulary_ms, "schemas": found}


def _tally(runtime: Runtime, schema: dict[str, Any], options: argparse.Namespace, clock: Clock) -> Tally:
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    tally, words = Tally(), random.Random(0)
    for seed in range(options.prompts):
        prompt, clock.seconds = " ".join(words.choices(WORDS, k=words.randint(1, 12))), 0.0
        begin = time.perf_counter()
        answer = runtime.generate(
            prompt,
            adapter=options.adapter,
            schema=schema,
            seed=seed,
            temperature=options.temperature,
            **({} if options.filtered else UNFILTERED),
            max_tokens=options.max_tokens,
        )
        tally.decode_s += time.perf_counter() - begin - answer.timings.ttft_ms / 1e3
        tally.constraint_s += clock.seconds
        tally.add(answer, judge)
    return tally


def fit(text: str, judge: jsonschema.protocols.Validator) -> bool:
    """Whether the text is JSON of this schema."""
    try:
        return bool(judge.is_valid(json.loads(text)))
    except ValueError:
        return False


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each schema."""
    machine, filters = result["machine"], "default filters" if result["filtered"] else "no filters"
    lines = [
        f"{result['base']}, {result['engine']}, {result['prompts']} prompts per schema, temperature "
        f"{result['temperature']:g}, {filters}, at most {result['max_tokens']} tokens, {result['threads']} threads, "
        f"{machine['cpu']} ({machine['kind']}). The vocabulary is read in {result['vocabulary_ms']} ms.",
        "",
        "| schema | answers | fit | cut off | complete, but do not fit | tokens | tokens/s | constraint, µs per token "
        "| share of decode |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in result["schemas"].items():
        cut = found["answers"] - found["stop_reasons"].get("end", 0)
        counts = [found["answers"], found["fit"], cut, len(found["misfits"]), f"{found['tokens']:.0f}"]
        costs = [f"{found['tokens_per_s']:.0f}", f"{found['constraint_us_per_token']:.0f}"]
        lines.append(f"| {name} | {' | '.join(map(str, counts + costs))} | {found['constraint_share']:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

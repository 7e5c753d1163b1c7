"""Measure `classify` with many labels: the search for the most likely one, against scoring them all.

    python benchmarks/labels.py build/banking77 --adapter banking77 --rows DIR/banking77/test.jsonl --labels 21 77

The adapter has labels; the rows are of text and label. Of N labels, only rows with the first N are asked. "prompt" is
the time of the prompt alone, which both modes need.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import in_turns, spread
from benchmarks.harness.worker import Worker

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edgetune_runtime import Runtime

from edgetune.common.spread import spread as spread_rows
from edgetune.tasks.data import labelled_text, read_rows

SEARCH, ALL, PROMPT = MODES = ("search", "all", "prompt")


class Pass(NamedTuple):
    """One pass over the sentences: milliseconds per sentence, the labels, and the mean of `unseen`."""

    ms: float
    labels: list[str]
    unseen: float


def asks(bundle: Path, engine: str, threads: int, adapter: str) -> Callable[[Sequence[str], int, str], Pass]:
    """Open the bundle; returns a function that asks for the label of each sentence among the first so many."""
    runtime = Runtime.open(bundle, engine=engine, threads=threads, disk_mb=0, contexts=1)

    def ask(sentences: Sequence[str], count: int, mode: str) -> Pass:
        labels, begin = runtime.manifest.adapter(adapter).labels[:count], time.perf_counter()
        if mode == PROMPT:
            for sentence in sentences:
                runtime.generate(sentence, adapter=adapter, unconstrained=True, max_tokens=1)
            return Pass((time.perf_counter() - begin) / len(sentences) * 1e3, [], 0.0)
        answers = [runtime.classify(sentence, labels, adapter=adapter, exact=mode == ALL) for sentence in sentences]
        ms = (time.perf_counter() - begin) / len(sentences) * 1e3
        return Pass(ms, [each.label for each in answers], sum(each.unseen for each in answers) / len(answers))

    return ask


def main() -> None:
    parser = BENCHMARK.parser(only=ENGINES, threads=2)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", required=True, metavar="NAME")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="rows of text and label")
    parser.add_argument("--labels", type=int, nargs="+", default=[21, 77], metavar="N", help="(default: 21 77)")
    parser.add_argument("--sentences", type=int, default=40, help="per number of labels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    options = BENCHMARK.options(parser, rounds=1, sentences=4)
    with Runtime.open(options.bundle, disk_mb=0) as runtime:
        labels = runtime.manifest.adapter(options.adapter).labels
    rows = read_rows(str(options.rows), labels=labels)
    results = {}
    for engine in options.only:
        with ExitStack() as stack:
            worker = stack.enter_context(Worker(asks, options.bundle, engine, options.threads, options.adapter))
            for count in options.labels:
                fitting = [row for row in rows if row.completion in labels[:count]]
                chosen = spread_rows(fitting, options.sentences)
                sentences = [labelled_text(row) for row in chosen]
                runs = {mode: partial(worker, sentences, count, mode) for mode in MODES}
                passes = in_turns(runs, options.rounds, warmups=1)
                expected = [str(row.completion) for row in chosen]
                results[f"{engine} {count}"] = figures(passes, expected)
    BENCHMARK.report(options, {"classify": results})


def figures(passes: dict[str, list[Pass]], expected: Sequence[str]) -> dict[str, object]:
    """The times of each mode, and the labels of the search against those of all and against the rows'."""
    ms = {mode: spread([each.ms for each in own]) for mode, own in passes.items()}
    search, everything = passes[SEARCH][0], passes[ALL][0]
    return {
        "ms": ms,
        "times_as_fast": round(ms[ALL]["median"] / ms[SEARCH]["median"], 1),
        "same": share(search.labels, everything.labels),
        "right": share(search.labels, expected),
        "unseen": search.unseen,
    }


def share(labels: Sequence[str], others: Sequence[str]) -> float:
    """The share of labels that are the same."""
    return sum(map(str.__eq__, labels, others)) / len(labels)


def table(result: Result) -> str:
    rows = [
        {
            "engine": name.split()[0],
            "labels": name.split()[1],
            **measured,
            **{mode: measured["ms"][mode] for mode in MODES},
        }
        for name, measured in result["classify"].items()
    ]
    columns = {
        "engine": "{engine}",
        "labels": "{labels}",
        **{f"{mode}, ms": f"{{{mode}[median]:.0f}} ({{{mode}[min]:.0f}} to {{{mode}[max]:.0f}})" for mode in MODES},
        "times as fast": "{times_as_fast}",
        "same label": "{same:.0%}",
        "right": "{right:.0%}",
        "unseen": "{unseen:.4f}",
    }
    return f"{said_of_machine(result)}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

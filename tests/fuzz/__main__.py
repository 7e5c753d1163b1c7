"""`make fuzz`: open many mutations of each kind of file, and write down each that ends a process, hangs, or raises.

    make fuzz ARGS="--kind gguf-base --cases 500"
    make fuzz ARGS="--kind gguf-base --case 123"

Case N of a kind and a seed has the same edits in every run; cases with the same file are opened once. A finding is a
JSON line in OUT/KIND.jsonl with its edits; the first one of a cause only has those that it needs. Where atheris is
installed, as many cases follow that the coverage of the code guides; they have no number. `contained` are files
that would do harm if no child process opened the bundle first. tests/corpus has the findings of earlier runs, which
`make test` opens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from . import corpus, guided
from .forms.raw import Edit
from .kinds import KINDS
from .pool import CONTAINED, Outcome, Worker
from .seeds import make_seeds

CASES = 10_000
GENERATOR = 5
"""Version of the edits that a case has: raise it with a change of forms or seeds that gives cases other edits."""
SEEDS = f"seeds-{GENERATOR}"
_CASES_PER_START = 100
_SAME_CAUSE = 3
"""Findings of one cause that are written down; more are counted."""


def main() -> int:
    """Run the cases; 1 if any is a finding."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Open mutations of each kind of file.")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="one kind; may be repeated (default: all)")
    parser.add_argument("--cases", type=int, default=CASES, help="cases per kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run one case, and print its edits and its outcome")
    parser.add_argument("--seed", type=int, default=1, help="seed of all cases (default: %(default)s)")
    # They wait for each other's threads and for this process.
    workers = (os.cpu_count() or 1) + 1
    parser.add_argument("--workers", type=int, default=workers, help="processes (default: cores + 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz"), help="folder for findings (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="add the first finding of each cause to tests/corpus")
    options = parser.parse_args()
    seeds = (options.out / SEEDS).resolve()
    if not seeds.is_dir():
        make_seeds(seeds)
    if options.case is not None:
        return run_case(options, seeds)
    found = {kind: run_kind(kind, options, seeds) for kind in options.kind or KINDS}
    return 1 if any(found.values()) else 0


def run_case(options: argparse.Namespace, seeds: Path) -> int:
    """Run one case, and keep its changed file."""
    (kind,) = options.kind
    changed = options.out / f"{kind}-{options.case}"
    with closing(Runner(kind, seeds)) as runner:
        edits = runner.edits_of(options.seed, options.case)
        changed.write_bytes(runner.file_of(edits))
        outcome = runner.run(runner.file_of(edits))
    print(json.dumps({**asdict(outcome), "edits": edits}, indent=1))
    print(f"the changed file is {changed}", file=sys.stderr)
    return int(outcome.is_finding)


def run_kind(kind: str, options: argparse.Namespace, seeds: Path) -> int:
    """Run the cases of a kind; the number of findings."""
    begin = time.monotonic()
    cases = range(options.first, options.first + options.cases)
    outcomes: Counter[str] = Counter()
    causes: Counter[tuple[str, str]] = Counter()
    with (options.out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
        numbered = _lines(kind, cases, options, seeds, outcomes)
        for line in chain(numbered, _guided_lines(kind, options, seeds) if guided.is_installed() else ()):
            cause = (line["outcome"], line["cause"])
            causes[cause] += 1
            if causes[cause] <= _SAME_CAUSE:
                file.write(json.dumps(line) + "\n")
                file.flush()
            if options.keep and causes[cause] == 1:
                corpus.add(kind, line["cause"], line["edits"])
    rate = len(cases) / (time.monotonic() - begin)
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    files = f"{len(cases)} cases with {outcomes.total()} files{', as many guided' if guided.is_installed() else ''}"
    print(f"{kind}: {files}, {rate:.0f} cases per second: {counts}", flush=True)
    for (outcome, what), count in causes.most_common():
        print(f"    {count} x {outcome}: {what}", flush=True)
    return sum(count for (outcome, _), count in causes.items() if outcome != CONTAINED)


def _lines(
    kind: str, cases: Iterable[int], options: argparse.Namespace, seeds: Path, outcomes: Counter[str]
) -> Iterator[dict[str, Any]]:
    """A line for each case that is not just opened or refused; the first of a cause only has the edits it needs."""
    known, opened = set[str](), set[bytes]()
    left = iter(cases)
    found: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def run_cases() -> None:
        try:
            with closing(Runner(kind, seeds)) as runner:
                # `next` of a range's iterator is atomic.
                while (case := next(left, None)) is not None:
                    edits = runner.edits_of(options.seed, case)
                    file = runner.file_of(edits)
                    digest = hashlib.sha256(file).digest()
                    if digest in opened:
                        continue
                    opened.add(digest)
                    outcome = runner.run(file)
                    outcomes[outcome.kind] += 1
                    if outcome.is_finding or outcome.kind == CONTAINED:
                        if outcome.cause not in known:
                            known.add(outcome.cause)
                            edits = runner.smallest(edits, outcome)
                        number = {"kind": kind, "seed": options.seed, "case": case, "generator": GENERATOR}
                        names = {"outcome": outcome.kind, "cause": outcome.cause, "text": outcome.text}
                        found.put({**number, **names, "edits": edits})
            found.put(None)
        except BaseException as error:
            found.put(error)

    # A process takes as long to start as to open some hundred files.
    count = min(options.workers, 1 + options.cases // _CASES_PER_START)
    threads = [threading.Thread(target=run_cases) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    for thread in threads:
        thread.join()


def _guided_lines(kind: str, options: argparse.Namespace, seeds: Path) -> Iterator[dict[str, Any]]:
    """A line for each file that does harm among those that atheris makes."""
    with closing(Runner(kind, seeds)) as runner:
        for file in guided.harmful_files(kind, seeds, valid_file(kind, seeds), options.cases, options.seed):
            outcome = runner.run(file)
            # One that harms only a process that has opened others before is written down too.
            name = outcome.kind if outcome.is_finding or outcome.kind == CONTAINED else "guided"
            about = {"kind": kind, "seed": options.seed, "outcome": name, "cause": outcome.cause, "text": outcome.text}
            yield {**about, "edits": guided.as_edits(file)}


class Runner:
    """Runs cases of a kind in a worker, and those that do harm there again in one that is guarded."""

    def __init__(self, kind: str, seeds: Path) -> None:
        self._worker, self._guarded = Worker([kind], seeds), Worker([kind], seeds, is_guarded=True)
        self._kind, self._form, self._valid = kind, KINDS[kind].form, valid_file(kind, seeds)

    def edits_of(self, seed: int, case: int) -> list[Edit]:
        """The edits of a case, as they are written down: none shares a value with another one."""
        edits = self._form.edits(self._valid, random.Random(f"{seed} {self._kind} {case}"))
        return list(json.loads(json.dumps(edits)))

    def file_of(self, edits: list[Edit]) -> bytes:
        """The valid file with these edits."""
        return self._form.applied(self._valid, edits)

    def run(self, file: bytes) -> Outcome:
        """What becomes of a file."""
        outcome = self._worker.run(file)
        if outcome.is_finding and not self._guarded.run(file).is_finding:
            return replace(outcome, kind=CONTAINED, text=f"{outcome.kind}: {outcome.text}")
        return outcome

    def smallest(self, edits: list[Edit], outcome: Outcome) -> list[Edit]:
        """The edits without those that the outcome does not need."""
        for edit in list(edits):
            fewer = [other for other in edits if other is not edit]
            if fewer and self._worker.run(self.file_of(fewer)).cause == outcome.cause:
                edits = fewer
        return edits

    def close(self) -> None:
        """End the workers."""
        self._worker.close()
        self._guarded.close()


def valid_file(kind: str, seeds: Path) -> bytes:
    """The file that a kind's edits are made for."""
    return KINDS[kind].read(seeds / KINDS[kind].seed)


if __name__ == "__main__":
    sys.exit(main())

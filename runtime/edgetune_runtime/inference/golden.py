"""Compares what a bundle's adapters answer on this machine with the golden answers that its build stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.bundle import MARK, GoldenAnswer
from edgetune_runtime.errors import NotFoundError, VerificationError, naming

from .runtime import Runtime


@dataclass(frozen=True)
class GoldenComparison:
    """An adapter's golden answer and its answer on this machine; both None if the bundle has no golden answer."""

    golden: GoldenAnswer | None
    answer: str | None

    @property
    def is_different(self) -> bool:
        """Whether the answers differ; False if there is no golden one."""
        return self.golden is not None and self.answer != self.golden.answer

    def to_json(self) -> dict[str, Any] | None:
        """Both answers and the golden one's margin in nats as JSON values; None if there is no golden answer."""
        if self.golden is None:
            return None
        figures = {"expected": self.golden.answer, "answer": self.answer, "margin": self.golden.margin}
        return {**figures, "same": not self.is_different}

    def __str__(self) -> str:
        if self.golden is None:
            return "no golden answer"
        return f"expected {self.golden.answer!r}, got {self.answer!r}" if self.is_different else "same"


def compare(runtime: Runtime) -> Iterator[tuple[str, GoldenComparison]]:
    """Ask each adapter in turn; its name and how its answer compares. Raises what `generate` and `classify` raise.

    The errors name the adapter.
    """
    for name in runtime.adapters:
        golden = runtime.manifest.adapter(name).golden.get(runtime.engine)
        with naming(f"the golden prompt of adapter {name!r}"):
            answer = None if golden is None else ask(runtime, name, golden)
        yield name, GoldenComparison(golden, answer)


def report(runtime: Runtime, *, as_json: bool) -> None:
    """Ask the golden prompt of each adapter, and print how the answers compare: a line per adapter, or one JSON object.

    Raises VerificationError that names the adapters whose answer differs, NotFoundError if no adapter has a golden
    answer for this engine, and what `compare` raises.
    """
    comparisons = {}
    for name, comparison in compare(runtime):
        comparisons[name] = comparison
        if not as_json:
            print(f"{name}\t{comparison}", flush=True)
    if as_json:
        print(json.dumps({name: item.to_json() for name, item in comparisons.items()}, ensure_ascii=False))
    different = [name for name, item in comparisons.items() if item.is_different]
    if different:
        message = f"{len(different)} of {len(comparisons)} adapters answer differently with {runtime.engine}"
        remedy = "compare the margins (--json) and try another engine, or report it as a bug"
        raise VerificationError(f"{message}: {', '.join(different)}", remedy)
    if all(item.golden is None for item in comparisons.values()):
        bundle = f"bundle {runtime.manifest.name!r}"
        message = f"the files are intact, but {bundle} has no golden answer for {runtime.engine}"
        raise NotFoundError(message, "build it again with this version, without golden: false")


def ask(runtime: Runtime, adapter: str, golden: GoldenAnswer) -> str:
    """The adapter's greedy answer to a golden prompt, or the most likely label if the adapter has labels."""
    if runtime.manifest.adapter(adapter).labels:
        # Also if it is too unlikely to be in scope.
        chances = runtime.classify(golden.prompt, adapter=adapter).probabilities
        return max(chances, key=chances.__getitem__)
    return runtime.generate(golden.prompt, adapter=adapter, **options_of(golden)).text


def options_of(golden: GoldenAnswer) -> dict[str, Any]:
    """The options of `generate` for a golden prompt."""
    is_text = isinstance(golden.prompt, str)
    limits = {"temperature": 0.0, "max_tokens": golden.max_tokens}
    return {"raw": is_text, "tools": golden.tools, "unsure": MARK, **limits}

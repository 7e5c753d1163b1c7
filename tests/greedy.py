"""Prints the greedy answers of a bundle's adapters and of its base, with the two likeliest tokens at each place.

    python greedy.py BUNDLE ENGINE TOKENS

Tests run it on this machine and on emulated processors, and compare the two. It needs the runtime alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime

PROMPT = "turn on the light in the hall"
NEAR_NATS = 0.3
"""Log-probabilities of two tokens closer than this are a near tie: quantized activations round differently."""


def main(bundle: str, engine: str, tokens: str) -> None:
    """Print {adapter: [[token, [[likeliest, log probability], [second, log probability]]], …]} as JSON."""
    answers = {}
    with Runtime.open(Path(bundle), engine=engine, threads=1, disk_mb=0, drafts=False) as runtime:
        for name in (None, *runtime.adapters):
            answer = runtime.generate(
                PROMPT, adapter=name, max_tokens=int(tokens), temperature=0, logprobs=2, unconstrained=True
            )
            answers[name or "base"] = [
                [each.token, [[other.token, other.logprob] for other in each.top]] for each in answer.logprobs or ()
            ]
    print(json.dumps(answers))


def first_difference(here: list[Any], there: list[Any]) -> tuple[int, float] | None:
    """Where two answers first differ, and how far apart the two tokens are, on the machine where they are further.

    None if they do not differ; infinity if one machine does not have the other's token among its two likeliest.
    """
    for place, ((mine, my_top), (other, other_top)) in enumerate(zip(here, there, strict=False)):
        if mine != other:
            tops = (dict(map(tuple, my_top)), dict(map(tuple, other_top)))
            gaps = [abs(top[mine] - top[other]) if {mine, other} <= top.keys() else float("inf") for top in tops]
            return place, max(gaps)
    return None


def require_same(here: dict[str, Any], there: dict[str, Any], what: str) -> None:
    """AssertionError if the answers of two machines differ by more than near ties, which are printed after `what`."""
    assert here.keys() == there.keys()
    for name, answer in here.items():
        difference = first_difference(answer, there[name])
        if difference is None:
            assert len(answer) == len(there[name])
            continue
        place, gap = difference
        print(f"{what}, {name}: token {place} differs: here {answer[place]}, there {there[name][place]}")
        assert gap < NEAR_NATS


if __name__ == "__main__":
    main(*sys.argv[1:])

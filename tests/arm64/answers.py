"""Prints the greedy answers of a bundle's adapters and of its base, with the two likeliest tokens at each place.

    python answers.py BUNDLE ENGINE TOKENS

The tests run it on the host and on the board. It needs the runtime alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgetune_runtime import Runtime

PROMPT = "turn on the light in the hall"


def main(bundle: str, engine: str, tokens: str) -> None:
    """Print {adapter: [[token, [[likeliest, log probability], [second, log probability]]], …]} as JSON."""
    answers = {}
    with Runtime.open(Path(bundle), engine=engine, threads=1, disk_mb=0, drafts=False) as runtime:
        for name in (None, *runtime.adapters):
            answer = runtime.generate(
                PROMPT, adapter=name, max_tokens=int(tokens), temperature=0, logprobs=2, free=True
            )
            answers[name or "base"] = [
                [each.token, [[other.token, other.logprob] for other in each.top]] for each in answer.logprobs or ()
            ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])

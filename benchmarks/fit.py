"""Compare what `edgetune devices fit` predicts with measurements on this machine and with published figures of boards.

    pip install -e '.[demo]'
    python benchmarks/fit.py --work build/fit --out benchmarks/results

Memory: SmolLM2-135M in three quantizations with 0, 4 and 16 random rank-8 adapters, in both engines with three context
lengths, each in a process of its own: peak resident memory after one prompt per adapter. Speed: this machine is
calibrated once per engine, as `edgetune-run doctor --calibrate` does, with one quantization; then decode speed is
predicted and measured for all of them. Boards: predictions for the published figures in `published.toml`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

ENGINES = ("gguf", "onnx")
QUANTIZATIONS = ("q8_0", "q4_k_m", "q4_0")
CONTEXTS = (512, 1024, 2048)
ADAPTERS = (0, 4, 16)
WORDS = "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain"


def peak(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of this process after one prompt for the base and for each adapter."""
    from edgetune_runtime import Runtime
    from edgetune_runtime.measuring import loaded_bundle
    from edgetune_runtime.runtime import CACHE_MB
    from edgetune_runtime.threads.machine import peak_mb

    words = WORDS.split()
    with Runtime.open(
        options.worker,
        engine=options.engine,
        context_length=options.context,
        threads=options.threads,
        disk_mb=0,
        contexts=1,
        map_large_blocks=True,
    ) as runtime:
        for name in (None, *runtime.adapters):
            # One token per word, and room for the system prompt, the template and the answer.
            count = int(options.context * (0.5 if name else 0.9)) - 90
            text = " ".join(itertools.islice(itertools.cycle(words), count))
            runtime.generate(text, adapter=name, max_tokens=8)
            if loaded_bundle(runtime).context()[0].shared.cache.bytes > 0.9 * CACHE_MB * 1e6:
                break  # the limit of saved states: more of them evict others
        measured = peak_mb()
    assert measured is not None
    return {"peak_mb": measured}


parser = argparse.ArgumentParser()
parser.add_argument("--worker", type=Path)
parser.add_argument("--engine")
parser.add_argument("--context", type=int)
parser.add_argument("--threads", type=int, default=2)
o = parser.parse_args()
print(json.dumps(peak(o)))

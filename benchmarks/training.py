"""Compare the training speed and memory of edgetune, TRL's SFTTrainer and Unsloth on the same rows; prints JSON.

    pip install -e '.[bench]'
    python benchmarks/training.py --data DIR/snips/train.jsonl --rows 320
    python benchmarks/training.py --data DIR/snips/train.jsonl --rows 128 --precision int8 fp32 --only edgetune
    python benchmarks/training.py --data DIR/snips/train.jsonl --device cuda

Same base (SmolLM2-135M, dequantized from the GGUF file that ships), same LoRA (rank 16, all linear layers), same rows
and batch size, loss on completions, one epoch. `tokens_per_s` counts the tokens of the rows, without padding;
`peak_mb` is that of the process with the base loaded, or of the GPU. edgetune runs in each given precision, the others
in bf16 if that is one of them, else in float32: TRL with its defaults, and again without gradient checkpointing;
Unsloth where it is installed and finds a GPU. Each run has a process of its own, and the rounds alternate, so that
noise affects all equally. `skipped` has the reason of each that could not run. It was never run on a GPU, nor with
Unsloth.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.bundles import resolve_base
from benchmarks.harness.turns import in_turns, spread
from benchmarks.harness.worker import in_own_process

import os
import random
import tempfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgetune_runtime.engines.gguf.base import GgufTokenizer

from benchmarks.training_setups import SETUPS, SpeedTrial
from edgetune.objectives.example import Example
from edgetune.recipe.data import Columns
from edgetune.tasks.data import read_rows
from edgetune.tasks.tokenization import tokenize_rows

SYSTEM = "Turn the sentence into JSON with its intent and slots."


def main() -> None:
    """Run the rounds and print one JSON object with medians, ranges and ratios."""
    parser = BENCHMARK.parser(only=[*SETUPS])
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of SNIPS")
    parser.add_argument("--base", default="smollm2-135m", help="alias or .gguf file (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32", "int8"), default=["bf16"])
    options = BENCHMARK.options(parser, rows=4, rounds=1)
    # With several GPUs, transformers' trainer would use all.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(options.base, work=Path(folder))
        examples = _examples(options.data, options.rows, base.path)
        trial = SpeedTrial(
            base, tuple(examples), options.device, precision="bf16" if "bf16" in options.precision else "fp32"
        )
        trials = {name: (name, trial) for name in options.only if name != "edgetune"}
        if "edgetune" in options.only:
            own = {f"edgetune_{each}": ("edgetune", replace(trial, precision=each)) for each in options.precision}
            trials = {**own, **trials}
        runs = {name: partial(in_own_process, SETUPS[setup], given) for name, (setup, given) in trials.items()}
        results_by_name = in_turns(runs, options.rounds)
    tokens = sum(len(example.tokens) for example in examples)
    skipped = {name: reasons[0] for name, reasons in results_by_name.items() if isinstance(reasons[0], str)}
    measured = {name: results for name, results in results_by_name.items() if name not in skipped}
    speeds = {name: spread([tokens / run.seconds for run in results]) for name, results in measured.items()}
    medians = {name: speed["median"] for name, speed in speeds.items()}
    figures = {
        "tokens_per_s": medians,
        "ranges": speeds,
        "ratio": {f"{first}/{name}": round(medians[first] / medians[name], 2) for first, name in _pairs(medians)},
        "peak_mb": {name: spread([run.peak_mb for run in results], 0) for name, results in measured.items()},
        "skipped": skipped,
    }
    BENCHMARK.report(options, {"rows": len(examples), "tokens": tokens, **figures})


def _pairs(names: dict[str, float]) -> list[tuple[str, str]]:
    """The first name with each of the others."""
    first, *others = names
    return [(first, name) for name in others]


def _examples(data: Path, count: int, base: Path) -> list[Example]:
    rows = read_rows(str(data), Columns(prompt="text", completion=("intent", "slots")))
    random.Random(0).shuffle(rows)
    with closing(GgufTokenizer(base)) as tokenizer:
        return tokenize_rows(rows[:count], tokenizer, system=SYSTEM, loss_on="completion", max_tokens=512)[0]


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

"""Measure what an importance matrix of a task's rows gains, per quantization; prints a Markdown table.

    python benchmarks/importance.py examples/smart-home/recipe.yaml --base FILE.gguf

The base, dequantized if it is quantized, against itself in each quantization, without and with the matrix of the
recipe's training rows: mean KL and top-1 on all tokens of validation rows, and the loss on the tokens that adapters
learn. In torch in float32, so that only weights differ; no adapter is trained.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.bundles import resolve_base
from benchmarks.harness.tables import markdown, progress

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import divergence
from edgetune_runtime.engines.gguf.base import GgufTokenizer

from edgetune import bases
from edgetune.building.decoder.importance import importance_of
from edgetune.common.progress import Progress
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.shipping.verify import LogitsOf, logits_of
from edgetune.tasks.task import read_task

QUANTIZATIONS = ("q4_0", "iq4_nl", "q4_k_m")
COLUMNS = {
    "quantization": "{quantization}",
    "matrix": "{matrix}",
    "MB": "{mb:.1f}",
    "KL": "{kl:.3f}",
    "top-1": "{top1:.3f}",
    "loss": "{loss:.3f}",
}


def main() -> None:
    """Print a row per quantization, without and with the matrix."""
    parser = BENCHMARK.parser(writes=False, only=QUANTIZATIONS)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--base", default="smollm2-135m", help="a .gguf file (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=6, help="validation rows of each adapter (default: %(default)s)")
    options = BENCHMARK.options(parser, rows=1)
    source = resolve_base(options.base).path
    recipe = Recipe.from_file(options.recipe, {"base": str(source)})
    examples = _examples(recipe, source, options.rows)
    exact = _logits(source)
    expected = [exact(list(example.tokens)) for example in examples]
    matrix, lines = importance_of(recipe, Progress()), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "base.gguf")
        for quantization in options.only:
            for importance in (None, matrix):
                progress(f"{quantization}, {'no matrix' if importance is None else 'matrix'}")
                quantize_gguf(source, out, quantization, again=True, importance=importance)
                row = {"quantization": quantization, "matrix": importance is not None, "mb": out.stat().st_size / 1e6}
                lines.append({**row, **_figures(examples, expected, _logits(out))})
    print(markdown(lines, COLUMNS))


def _examples(recipe: Recipe, source: Path, count: int) -> list[Example]:
    """The first validation rows of each adapter."""
    with closing(GgufTokenizer(source)) as tokenizer:
        tasks = [read_task(name, recipe) for name in recipe.adapters]
        return [row for task in tasks for row in task.tokenize(tokenizer, recipe.context_length)[1][:count]]


def _logits(path: Path) -> LogitsOf:
    return logits_of(bases.load_torch(resolve_base(str(path)), torch.float32))


def _figures(examples: Sequence[Example], expected: Sequence[np.ndarray], logits: LogitsOf) -> dict[str, Any]:
    kl, same, nats = 0.0, 0, 0.0
    for example, exact in zip(examples, expected, strict=True):
        rounded = logits(list(example.tokens))
        kl += float(divergence(exact, rounded).sum())
        same += int((exact.argmax(-1) == rounded.argmax(-1)).sum())
        learned = np.flatnonzero(example.learned)
        losses = torch.from_numpy(rounded).log_softmax(-1)
        nats -= float(losses[learned - 1, torch.tensor(example.tokens)[learned]].sum())
    tokens = sum(len(example.tokens) for example in examples)
    return {"kl": kl / tokens, "top1": same / tokens, "loss": nats / sum(sum(row.learned) for row in examples)}


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

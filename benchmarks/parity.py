"""Measure how far llama.cpp is from torch on the same weights, per quantization; prints a Markdown table.

    python benchmarks/parity.py --text DIR/wikitext2/wiki.valid.raw --out build/parity

SmolLM2-135M in each quantization against torch in float32 on the dequantized weights of the same file, with and without
a random rank-16 LoRA on all linear layers, separate (f16 and q8_0) and merged. The tolerances in
`edgetune_export.parity` come from this table.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.bundles import resolve_base
from benchmarks.harness.tables import markdown, progress

import shutil
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.backend import write_adapter, write_merged
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.gguf.engine import GgufEngine

from edgetune import bases, methods
from edgetune.methods.common.peft import module_weight
from edgetune.methods.lora import LoraOptions
from edgetune.shipping.verify import logits_of

QUANTIZATIONS = ("as shipped", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_1", "q4_0")
ROW_TOKENS, ROWS = 128, 6
# Large enough to change the logits about as much as a trained adapter.
B_STD = 0.04


def main() -> None:
    """Print one row of the table per quantization."""
    parser = BENCHMARK.parser(writes=False, only=QUANTIZATIONS)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the quantized bases")
    options = BENCHMARK.options(parser)
    options.out.mkdir(parents=True, exist_ok=True)
    shipped = resolve_base().path
    with closing(GgufTokenizer(shipped)) as tokenizer:
        tokens = tokenizer.tokenize(options.text.read_text(encoding="utf-8")[:60_000])
    rows = [tokens[start : start + ROW_TOKENS] for start in range(300, 300 + 1000 * ROWS, 1000)]
    lines = []
    for quantization in options.only:
        progress(quantization)
        lines.append(_row(quantization, shipped, rows, options.out))
    columns = {
        "base": "{base}",
        "mostly": "{mostly}",
        "base KL": "{plain.kl:.1e}",
        "base top-1": "{plain.top1:.3f}",
        "+ f16 LoRA KL": "{f16.kl:.1e}",
        "+ f16 LoRA top-1": "{f16.top1:.3f}",
        "+ q8_0 LoRA KL": "{q8_0.kl:.1e}",
        "merged KL": "{merged.kl:.1e}",
        "merged top-1": "{merged.top1:.3f}",
    }
    print(markdown(lines, columns))


def _row(quantization: str, shipped: Path, rows: Sequence[Sequence[int]], out: Path) -> dict[str, Any]:
    base = resolve_base(str(shipped if quantization == "as shipped" else _quantized(quantization, shipped, out)))
    model = bases.load_torch(base, torch.float32)
    lora = methods.load("lora")
    with closing(GgufEngine(base.path, context_length=ROW_TOKENS)) as engine:
        comparisons: dict[str, Any] = {"plain": compare(logits_of(model), engine, rows)}
        peft = lora.attach(model, LoraOptions(r=16, lora_alpha=32), 1)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=B_STD)
        peft.eval()
        shutil.rmtree(out / "adapter", ignore_errors=True)
        lora.save(peft, out / "adapter")
        folded = fold_peft(out / "adapter", "random")
        for dtype in ("f16", "q8_0"):
            file = out / f"{dtype}.lora.gguf"
            write_adapter(folded, base.path, file, dtype=dtype, base_fingerprint=sha256_of(base.path))
            engine.load_adapter(dtype, file)
            engine.activate({dtype: 1.0})
            comparisons[dtype] = compare(logits_of(peft), engine, rows)
    plain = bases.load_torch(base, torch.float32)
    merged = merge(folded, partial(module_weight, plain))
    write_merged(merged, Source(base.path, base.fingerprint), out / "merged.gguf")
    with closing(GgufEngine(out / "merged.gguf", context_length=ROW_TOKENS)) as engine:
        comparisons["merged"] = compare(logits_of(peft), engine, rows)
    return {"base": quantization, "mostly": base.header.main_type.name, **comparisons}


def _quantized(quantization: str, shipped: Path, out: Path) -> Path:
    """Dequantize the shipped base to f16 and requantize it to `quantization`."""
    f16, target = out / "f16.gguf", out / f"{quantization}.gguf"
    if not f16.is_file():
        quantize_gguf(shipped, f16, "f16", again=True)
    if not target.is_file():
        quantize_gguf(f16, target, quantization)
    return target


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

"""Measure how far llama.cpp is from torch on the same weights, per quantization; prints a Markdown table.

    python benchmarks/parity.py --text DIR/wikitext2/wiki.valid.raw --out build/parity

SmolLM2-135M in each quantization against torch in float32 on the dequantized weights of the same file, with and without
a random rank-16 LoRA on all linear layers, separate (f16 and q8_0) and merged. The tolerances in
`edgetune_export.parity` come from this table.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import llama_cpp
import torch
from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.backend import write_adapter, write_merged
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import Parity, compare
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.gguf.engine import GgufEngine, GgufTokenizer

from edgetune import bases, methods
from edgetune.methods.common.peft import module_weight
from edgetune.progress import Progress
from edgetune.shipping.verify import logits_of

QUANTIZATIONS = ("as shipped", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_1", "q4_0")
ROW_TOKENS, ROWS = 128, 6
# Large enough to change the logits about as much as a trained adapter.
B_STD = 0.04


def main() -> None:
    """Print one row of the table per quantization."""
    parser = argparse.ArgumentParser(description="Measure the parity of llama.cpp with torch, per quantization.")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the quantized bases")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shipped = _resolve("smollm2-135m").path
    with closing(GgufTokenizer(shipped)) as tokenizer:
        tokens = tokenizer.tokenize(options.text.read_text(encoding="utf-8")[:60_000])
    rows = [tokens[start : start + ROW_TOKENS] for start in range(300, 300 + 1000 * ROWS, 1000)]
    print("| base | mostly | base KL | top-1 | + f16 LoRA KL | top-1 | + q8_0 LoRA KL | merged KL | top-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for quantization in QUANTIZATIONS:
        print(_row(quantization, shipped, rows, options.out), flush=True)


def _resolve(name: str) -> bases.Base:
    progress = Progress(quiet=True)
    return bases.resolve(name, folder=Path(), quantization=None, work=Path(), progress=progress, converter=None)


def _row(quantization: str, shipped: Path, rows: Sequence[Sequence[int]], out: Path) -> str:
    base = _resolve(str(shipped if quantization == "as shipped" else _quantized(quantization, shipped, out)))
    model = bases.load_torch(base, torch.float32)
    lora = methods.load("lora")
    with closing(GgufEngine(base.path, context_length=ROW_TOKENS)) as engine:
        results = [compare(logits_of(model), engine, rows)]
        peft = lora.attach(model, lora.options(r=16, lora_alpha=32), 1)
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
            results.append(compare(logits_of(peft), engine, rows))
    plain = bases.load_torch(base, torch.float32)
    merged = merge(folded, partial(module_weight, plain))
    write_merged(merged, Source(base.path, base.fingerprint), out / "merged.gguf")
    with closing(GgufEngine(out / "merged.gguf", context_length=ROW_TOKENS)) as engine:
        results.append(compare(logits_of(peft), engine, rows))
    return _cells(quantization, base.header.main_type.name, results)


def _quantized(quantization: str, shipped: Path, out: Path) -> Path:
    """Dequantize the shipped base to f16 and requantize it to `quantization`."""
    f16, target = out / "f16.gguf", out / f"{quantization}.gguf"
    if not f16.is_file():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_F16
        params.allow_requantize = True
        llama_cpp.llama_model_quantize(os.fsencode(shipped), os.fsencode(f16), params)
    if not target.is_file():
        quantize_gguf(f16, target, quantization)
    return target


def _cells(quantization: str, mostly: str, results: Sequence[Parity]) -> str:
    plain, f16, q8_0, merged = results
    figures = f"{plain.kl:.1e} | {plain.top1:.3f} | {f16.kl:.1e} | {f16.top1:.3f} | {q8_0.kl:.1e}"
    return f"| {quantization} | {mostly} | {figures} | {merged.kl:.1e} | {merged.top1:.3f} |"


if __name__ == "__main__":
    main()

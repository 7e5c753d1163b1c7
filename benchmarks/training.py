"""Compare the training speed of edgetune and TRL's SFTTrainer on the same rows; prints JSON.

    pip install -e '.[bench]'
    python benchmarks/training.py --data DIR/snips/train.jsonl --rows 320
    python benchmarks/training.py --data DIR/snips/train.jsonl --rows 128 --precision int8 fp32 --no-trl

Same base (SmolLM2-135M, dequantized from the GGUF file that ships), same LoRA (rank 16, all linear layers), same rows
and batch size, loss on completions, one epoch. `tokens_per_s` counts the tokens of the rows, without padding. edgetune
runs in each given precision. TRL runs in bf16 if that is one of them, else in float32, with its defaults, and again
without gradient checkpointing. The rounds alternate, so that noise affects all equally.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.bundles import resolve_base
from benchmarks.harness.turns import in_turns, spread

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from edgetune_runtime.engines.gguf.engine import GgufTokenizer

from edgetune import bases, methods
from edgetune.objectives.example import Example
from edgetune.progress import Progress
from edgetune.recipe.parts import Columns, TrainingSpec
from edgetune.tasks.data import read_rows
from edgetune.tasks.tokenization import tokenize_rows
from edgetune.training.hardware import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SYSTEM = "Turn the sentence into JSON with its intent and slots."
BATCH_SIZE = 16
RANK, ALPHA = 16, 32


def main() -> None:
    """Run the rounds and print one JSON object with medians, ranges and ratios."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of SNIPS")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES), default=["bf16"])
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, default=True)
    options = BENCHMARK.options(parser, rows=4, rounds=1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = resolve_base(work=work)
        examples = _examples(options.data, options.rows, base.path)
        models = {dtype: bases.load_torch(base, dtype) for dtype in {DTYPES[name] for name in options.precision}}
        trainers: dict[str, Callable[[], float]] = {
            f"edgetune_{name}": partial(_edgetune, models[DTYPES[name]], name, examples, work / "edgetune")
            for name in options.precision
        }
        if options.trl:
            model = models.get(torch.bfloat16, models.get(torch.float32))
            # TRL changes settings of the model, such as gradient checkpointing.
            trainers |= {
                name: lambda is_on=is_on: _trl(deepcopy(model), examples, work / "trl", gradient_checkpointing=is_on)
                for name, is_on in (("trl", True), ("trl_no_checkpointing", False))
            }
        seconds = in_turns(trainers, options.rounds)
    tokens = sum(len(example.tokens) for example in examples)
    speeds = {name: spread([tokens / one_s for one_s in found]) for name, found in seconds.items()}
    medians = {name: speed["median"] for name, speed in speeds.items()}
    first, *others = medians
    ratios = {f"{first}/{name}": round(medians[first] / medians[name], 2) for name in others}
    figures = {"tokens_per_s": medians, "ranges": speeds, "ratio": ratios}
    BENCHMARK.report(options, {"rows": len(examples), "tokens": tokens, **figures})


def _examples(data: Path, count: int, base: Path) -> list[Example]:
    rows = read_rows(str(data), Columns(prompt="text", completion=("intent", "slots")))
    random.Random(0).shuffle(rows)
    with closing(GgufTokenizer(base)) as tokenizer:
        return tokenize_rows(rows[:count], tokenizer, system=SYSTEM, loss_on="completion", max_tokens=512)[0]


def _edgetune(model: PreTrainedModel, precision: str, examples: Sequence[Example], folder: Path) -> float:
    """Seconds of one epoch, including a validation on one row at the end."""
    from edgetune.training.job import TrainingJob
    from edgetune.training.loop import train

    lora = methods.load("lora")
    options = lora.options(r=RANK, lora_alpha=ALPHA)
    training = TrainingSpec(epochs=1, batch_size=BATCH_SIZE, precision=precision, evals=1)
    job = TrainingJob("speed", lora, options, training, examples, examples[:1], key=str(time.monotonic()))
    return train(model, job, folder, Progress()).seconds


def _trl(model: PreTrainedModel, examples: Sequence[Example], folder: Path, *, gradient_checkpointing: bool) -> float:
    """Seconds of one epoch with SFTTrainer on the same tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    columns = {
        "input_ids": [list(example.tokens) for example in examples],
        "completion_mask": [[int(learned) for learned in example.learned] for example in examples],
    }
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=1e-3,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=gradient_checkpointing,
        completion_only_loss=True,
        max_length=512,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        peft_config=lora,
        processing_class=_any_tokenizer(PreTrainedTokenizerFast, model.config.vocab_size),
    )
    # It prints to standard output, which is reserved for the figures.
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started


def _any_tokenizer(cls: type, vocab_size: int) -> object:
    """A tokenizer for TRL, which requires one although the rows are already tokens; only its padding token is used."""
    from tokenizers import Tokenizer, models

    words = {f"t{index}": index for index in range(vocab_size)}
    return cls(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")), pad_token="t2", eos_token="t2")


BENCHMARK = Benchmark(__file__, __doc__)

if __name__ == "__main__":
    main()

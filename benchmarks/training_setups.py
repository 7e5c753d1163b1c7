"""The trainers that benchmarks/training.py compares; each trains the same LoRA for one epoch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune_runtime.wording import shortened

from edgetune.bases import Base
from edgetune.objectives.example import Example

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH_SIZE = 16
RANK, ALPHA = 16, 32
MAX_TOKENS = 512
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SpeedTrial:
    """The base, the rows, the kind of device, and the precision."""

    base: Base
    examples: tuple[Example, ...]
    device: str
    precision: Literal["bf16", "fp32", "int8"]


@dataclass(frozen=True)
class SpeedRun:
    """The seconds of one epoch, and the peak memory of the device until its end."""

    seconds: float
    peak_mb: float


def train_with_edgetune(trial: SpeedTrial) -> SpeedRun:
    """One epoch, with a validation on one row at the end."""
    from edgetune import bases, methods
    from edgetune.common.progress import Progress
    from edgetune.methods.lora import LoraOptions
    from edgetune.recipe.training import TrainingSpec
    from edgetune.training.hardware import DTYPES, use_device
    from edgetune.training.job import TrainingJob
    from edgetune.training.loop import train

    use_device(trial.device)
    options = LoraOptions(r=RANK, lora_alpha=ALPHA)
    training = TrainingSpec(epochs=1, batch_size=BATCH_SIZE, precision=trial.precision, evals=1)
    job = TrainingJob("speed", methods.load("lora"), options, training, trial.examples, trial.examples[:1], key="speed")
    model = bases.load_torch(trial.base, DTYPES[trial.precision])
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, job, Path(folder), Progress(quiet=True))
    return SpeedRun(result.seconds, result.peak_memory_mb)


def train_with_trl(trial: SpeedTrial, *, gradient_checkpointing: bool) -> SpeedRun | str:
    """One epoch with SFTTrainer on the same tokens; a text if TRL is not installed."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        return shortened(str(error))
    from peft import LoraConfig

    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return _train_with_sft(trial, _loaded(trial), lora, gradient_checkpointing=gradient_checkpointing)


def train_with_unsloth(trial: SpeedTrial) -> SpeedRun | str:
    """One epoch with Unsloth's model in SFTTrainer; a text if Unsloth is not installed or finds no GPU."""
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return shortened(str(error))
    with tempfile.TemporaryDirectory() as folder:
        model = _loaded(trial)
        model.save_pretrained(folder)
        _any_tokenizer(model.config.vocab_size).save_pretrained(folder)
        sizes: dict[str, Any] = {"max_seq_length": MAX_TOKENS, "dtype": model.dtype, "load_in_4bit": False}
        model, _ = FastLanguageModel.from_pretrained(folder, **sizes)
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "target_modules": [*MODULES]}
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth", **lora)
    return _train_with_sft(trial, model, None, gradient_checkpointing=True)


SETUPS: dict[str, Callable[[SpeedTrial], SpeedRun | str]] = {
    "edgetune": train_with_edgetune,
    "trl": partial(train_with_trl, gradient_checkpointing=True),
    "trl_no_checkpointing": partial(train_with_trl, gradient_checkpointing=False),
    "unsloth": train_with_unsloth,
}


def _train_with_sft(
    trial: SpeedTrial, model: PreTrainedModel, lora: LoraConfig | None, *, gradient_checkpointing: bool
) -> SpeedRun:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from edgetune.training.device_memory import peak_mb

    columns = {
        "input_ids": [list(example.tokens) for example in trial.examples],
        "completion_mask": [[int(learned) for learned in example.learned] for example in trial.examples],
    }
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=1e-3,
            bf16=trial.precision == "bf16",
            use_cpu=trial.device == "cpu",
            gradient_checkpointing=gradient_checkpointing,
            completion_only_loss=True,
            max_length=MAX_TOKENS,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(columns),
            peft_config=lora,
            processing_class=_any_tokenizer(model.config.vocab_size),
        )
        # It prints to standard output, which is reserved for the figures.
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        trainer.train()
        return SpeedRun(time.monotonic() - started, peak_mb(torch.device(trial.device)))


def _loaded(trial: SpeedTrial) -> PreTrainedModel:
    from edgetune import bases
    from edgetune.training.hardware import DTYPES

    return bases.load_torch(trial.base, DTYPES[trial.precision])


def _any_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for TRL, which requires one although the rows are already tokens; only its padding token is used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, "t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t2", eos_token="t2")

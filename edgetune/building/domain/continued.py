"""Continued pretraining of the base on plain text: writes a GGUF file that replaces the base in the rest of the build.

The result is the same as that of two builds in a row, the second with the first one's result as its base.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from edgetune_export import backends
from edgetune_export.adapters.shapes import Floats, Merged
from edgetune_export.backends.base import Source
from edgetune_export.base_file.merge import write_merged
from edgetune_export.base_file.quantize import quantize_rows
from edgetune_runtime import engines
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.base import log_total
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.atomic import TEMPORARY
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from transformers import PreTrainedModel

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.common.digests import key_of
from edgetune.common.files import write_file
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.objectives.example import Example
from edgetune.planning.on_device import domain_grid_types
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import DomainSpec
from edgetune.shipping.parity_engines import GovernedEngine
from edgetune.shipping.verify import logits_of
from edgetune.tasks.task import Texts
from edgetune.training.hardware import processes
from edgetune.training.job import TrainAll, TrainingJob, TrainResult
from edgetune.training.rounding import rounded_layers

from .texts import split_windows

NAME = "domain"
"""Name of the training run and of its folder."""
# Perplexity is measured on windows of about this many tokens in total, spread over the validation text.
MEASURED_TOKENS = 65536
# Windows of the training text used for calibration by quantization methods that need it.
CALIBRATION_WINDOWS = 16
# Of the gain in log perplexity, less than this share is worth a warning.
_LEFT = 0.5
_MORE_BITS = "use more bits, such as quantization: q8_0, or lora on q4_0 or q4_k_m"
# Nats per token above which the exponential overflows.
_MAX_NATS = 700.0
# Tokens per call of an engine when measuring.
_ROWS = 64

Rows = Callable[[list[int]], Iterable[Floats]]
"""Maps tokens to the logits after each."""


def continued(recipe: Recipe, texts: Texts, base: Base, work: Path, *, train_all: TrainAll, progress: Progress) -> Base:
    """Continue pretraining of the base on the texts with the recipe's domain options; keeps the base's quantization.

    The training run is in `work/domain`, the file in `work/domain/base`; finished parts are reused. All processes of a
    launcher must call it. Raises, before any training, UsageError for invalid texts or windows, and IncompatibleError
    for a base of a type that cannot be written; also raises what training raises.
    """
    assert recipe.domain is not None
    _check_writable(base.header)
    job = _job(recipe, recipe.domain, texts, base)
    progress.say(f"{NAME}: {len(job.train)} windows for training, {len(job.validation)} for validation")
    stage = _Stage(recipe, base, job, train_all([job])[NAME], work / NAME, progress)
    with processes().main_process_first():
        figures = stage.finished() or stage.make()
    return stage.base(figures)


def _check_writable(header: GgufHeader) -> None:
    """IncompatibleError if weights of the base have a type that cannot be written."""
    for ggml_type, columns in {(tensor.ggml_type, tensor.shape[0]) for tensor in header.tensors.values()}:
        quantize_rows(np.zeros((1, columns), np.float32), ggml_type)


def _job(recipe: Recipe, spec: DomainSpec, texts: Texts, base: Base) -> TrainingJob[Example]:
    kind, training = methods.load(spec.method.name), recipe.training.under(spec.training)
    with closing(GgufTokenizer(base.path)) as tokenizer:
        length = spec.window or recipe.context_length
        train, validation = split_windows(texts, tokenizer, length, spec.data.held_out)
        options = kind.prepared(spec.method.options, tokenizer, (*train, *validation))
    tokens = sum(len(window.tokens) for window in validation)
    validation = list(spread(validation, math.ceil(len(validation) * min(1.0, MEASURED_TOKENS / tokens))))
    state = [base.fingerprint, spec.method.model_dump(mode="json"), training.model_dump(mode="json"), len(train)]
    key = key_of(state, (window.tokens for window in (*train, *validation)))
    rounds_to = base.path if domain_grid_types(recipe, base.header) else None
    return TrainingJob(NAME, kind, options, training, train, validation, key, kind.objective(options), rounds_to)


@dataclass(frozen=True)
class _Stage:
    """Writes and measures the continued base from a finished training run in `folder`."""

    recipe: Recipe
    source: Base
    job: TrainingJob[Example]
    result: TrainResult
    folder: Path
    progress: Progress

    @property
    def path(self) -> Path:
        """The continued base's file."""
        return self.folder / "base" / f"{NAME}-{self.source.path.name}"

    @property
    def key(self) -> str:
        """Identifies everything that the figures depend on."""
        stored = self.recipe.model_dump(mode="json", include={*self.recipe.format_options})
        return key_of([self.job.key, self.recipe.targets, stored])

    def base(self, figures: Mapping[str, Any]) -> Base:
        """The continued base with its figures, for the rest of the build."""
        digest, header = sha256_of(self.path), read_header(self.path)
        return Base(self.source.name, self.path, digest, header, self.source.quantization, figures)

    def finished(self) -> dict[str, Any] | None:
        """The figures of a continued base that is already written, else None."""
        try:
            stored = json.loads((self.folder / "figures.json").read_text(encoding="utf-8"))
            is_whole = stored["key"] == self.key and stored["sha256"] == sha256_of(self.path)
            return dict(stored["figures"]) if is_whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def make(self) -> dict[str, Any]:
        """Write the base, measure it and save its figures."""
        before, trained = self._written()
        continued, model = self.base({}), None
        # Only now, as the base's own weights are no longer in memory.
        if not all(backends.format_of(target).links_base for target in self.recipe.targets):
            model = bases.load_torch(continued, torch.float32)
        after = self._on_engines(continued, model)
        self._require_finite(after)
        self._report(before, trained, after)
        figures = {
            "method": self.job.method.name,
            "base_fingerprint": self.source.fingerprint,
            **self.result.figures(),
            "perplexity": {"before": before, "trained": trained, "after": after},
            "lost_by_rounding": {target: value / trained - 1 for target, value in after.items()},
            "measured_tokens": sum(len(window.tokens) - 1 for window in self.job.validation),
        }
        stored = {"key": self.key, "sha256": continued.fingerprint, "figures": figures}
        write_file(self.folder / "figures.json", json.dumps(stored, indent=2))
        return figures

    def _written(self) -> tuple[dict[str, float], float]:
        """Write the base; returns the perplexities of the old one in each format, and that of the trained one."""
        model = bases.load_torch(self.source, torch.float32)
        checkpoint = methods.Checkpoint(NAME, self.folder / "adapter", model, self.job.options)
        self._write(checkpoint)
        self.progress.say(f"{NAME}: measuring perplexity before and after")
        with self.job.method.loaded(checkpoint) as tuned, rounded_layers(tuned, self.job.rounds_to):
            trained = _perplexity(logits_of(tuned), self.job.validation)
        return self._on_engines(self.source, model), trained

    def _write(self, checkpoint: methods.Checkpoint) -> None:
        self.progress.say(f"{NAME}: writing the continued base")
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir(parents=True)
        folded = self.job.method.fold(checkpoint, Merged.shape)
        assert isinstance(folded, Merged)
        write_merged(replace(folded, on_grid=self.job.rounds_to is not None), self.source.path, self.path)

    def _on_engines(self, base: Base, model: PreTrainedModel | None) -> dict[str, float]:
        """Perplexity of a base without adapters in each of the recipe's formats, on the runtime's engines."""
        length = max(len(window.tokens) for window in self.job.validation)
        rows = tuple(window.tokens for window in self.job.train[:CALIBRATION_WINDOWS])
        perplexities: dict[str, float] = {}
        for target in self.recipe.targets:
            with TemporaryDirectory(prefix=TEMPORARY, dir=self.folder) as name:
                work, options = Path(name) / "work", self.recipe.format_options
                source = Source(base.path, base.fingerprint, model, work, options, rows)
                path = backends.load(target).write_base(source, Path(name), ())
                engine_class = engines.load(target)
                with closing(engine_class(path, context_length=length)) as engine:
                    perplexities[target] = _perplexity(_rows_of(GovernedEngine(engine)), self.job.validation)
        return perplexities

    def _require_finite(self, after: Mapping[str, float]) -> None:
        for target, value in after.items():
            if not math.isfinite(value):
                message = f"perplexity of the continued base in {target} is {value}: its weights are too large"
                raise VerificationError(message, "lower domain.training.learning_rate")

    def _report(self, before: Mapping[str, float], trained: float, after: Mapping[str, float]) -> None:
        main_type = self.source.header.main_type.name
        for target, old in before.items():
            change = f"perplexity in {target} {old:.2f} before, {after[target]:.2f} after"
            self.progress.say(f"{NAME}: {change}, {trained:.2f} before requantizing to {main_type}")
            if after[target] >= old:
                why = why_worse(old, trained, main_type)
                self.progress.say(f"  warning: {NAME}: the continued base is no better in {target}: {why}")
            elif (kept := math.log(old / after[target])) < (gained := math.log(old / trained)) * _LEFT:
                why = f"requantizing to {main_type} left {kept / gained:.0%} of what training gained in {target}"
                self.progress.say(f"  warning: {NAME}: {why}; {_MORE_BITS}")


def why_worse(before: float, trained: float, main_type: str) -> str:
    """Why a continued base is no better than the original, and the remedy; `trained` is before requantizing."""
    if trained < before:
        return f"requantizing to {main_type} loses more than training gained; {_MORE_BITS}"
    return "training did not improve it; lower domain.training.learning_rate or add more text of the domain"


def _perplexity(rows_of: Rows, windows: Sequence[Example]) -> float:
    """Perplexity of the learned tokens of all windows, from the logits after each token; infinite on overflow, also of
    the logits."""
    nats = math.fsum(
        _nats(row, target)
        for window in windows
        for row, target in zip(rows_of(list(window.tokens)), window.tokens[1:], strict=False)
    )
    mean = nats / sum(len(window.tokens) - 1 for window in windows)
    return math.exp(mean) if mean < _MAX_NATS else math.inf


def _nats(row: Floats, target: int) -> float:
    try:
        return log_total(row) - float(row[target])
    except VerificationError:
        return math.inf


def _rows_of(engine: GovernedEngine) -> Rows:
    def rows(tokens: list[int]) -> Iterator[Floats]:
        engine.truncate(0)
        for start, end in pairwise((*range(0, len(tokens), _ROWS), len(tokens))):
            yield from engine.decode_all(tokens[start:end])

    return rows

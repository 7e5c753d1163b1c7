"""Makes the training jobs of a build with an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer

from edgetune import methods
from edgetune.digests import key_of
from edgetune.prepared import PlannedTraining
from edgetune.progress import Progress
from edgetune.tasks import Task
from edgetune.tokenization import TooLong
from edgetune.training.job import TrainingJob

from .base import TOKENIZER, EncoderBase
from .objective import Classify, Labelled, tokenize_labelled


def plan_trainings(
    tasks: Sequence[Task], base: EncoderBase, context_length: int, progress: Progress
) -> list[PlannedTraining]:
    """A training job per task, tokenized for the base; reports rows that are too long."""
    tokenizer = EncoderTokenizer(base.folder / TOKENIZER)
    todo = []
    for task in tasks:
        train, long_train = tokenize_labelled(task.train, tokenizer, task.labels, context_length)
        validation, long_validation = tokenize_labelled(task.validation, tokenizer, task.labels, context_length)
        where = (*long_train.examples, *long_validation.examples)[:3]
        too_long = TooLong(long_train.count + long_validation.count, where)
        if too_long.count:
            progress.say(f"{task.name}: {too_long.count} rows are longer than {context_length} tokens: {where[0]} …")
        method = task.spec.method
        job = TrainingJob(
            task.name,
            methods.load(method.name),
            method.options,
            task.training,
            train,
            validation,
            _key(task, base, [*train, *validation]),
            Classify(base.hidden_size, len(task.labels)),
        )
        todo.append(PlannedTraining(task, job, too_long))
    return todo


def _key(task: Task, base: EncoderBase, rows: Sequence[Labelled]) -> str:
    options = task.spec.method.model_dump(mode="json")
    state = [CLASSIFICATION, base.fingerprint, options, task.training.model_dump(mode="json"), list(task.labels)]
    return key_of(state, ((row.tokens, row.label) for row in rows))

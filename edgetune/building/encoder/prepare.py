"""Makes the training jobs of a build with an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer

from edgetune import methods
from edgetune.digests import key_of
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.progress import Progress
from edgetune.recipe.parts import TrainingSpec
from edgetune.shipping.exported import PreparedAdapter
from edgetune.tasks.task import Task
from edgetune.tasks.tokenization import TooLong
from edgetune.training.job import TrainingJob

from .base import TOKENIZER, EncoderBase
from .objective import Classify, Labelled, tokenize_labelled


def training_jobs(
    plan: BuildPlan, tasks: Sequence[Task], base: EncoderBase, progress: Progress
) -> list[PreparedAdapter]:
    """A training job per task, tokenized for the base; reports rows that are too long."""
    tokenizer, length = EncoderTokenizer(base.folder / TOKENIZER), plan.recipe.context_length
    prepared = []
    for task in tasks:
        train, long_train = tokenize_labelled(task.train, tokenizer, task.labels, length)
        validation, long_validation = tokenize_labelled(task.choosing, tokenizer, task.labels, length)
        where = (*long_train.examples, *long_validation.examples)[:3]
        too_long = TooLong(long_train.count + long_validation.count, where)
        if too_long.count:
            progress.say(f"{task.name}: {too_long.count} rows are longer than {length} tokens: {where[0]} …")
        planned = plan.adapters[task.name]
        job = TrainingJob(
            task.name,
            methods.load(planned.method),
            planned.options,
            task.training,
            train,
            validation,
            _key(planned, task.training, base, [*train, *validation]),
            Classify(base.hidden_size, len(task.labels)),
        )
        prepared.append(PreparedAdapter(planned, task, job, too_long))
    return prepared


def _key(planned: AdapterPlan, training: TrainingSpec, base: EncoderBase, rows: Sequence[Labelled]) -> str:
    method = {"name": planned.method, **planned.options.model_dump(mode="json")}
    state = [CLASSIFICATION, base.fingerprint, method, training.model_dump(mode="json"), list(planned.labels)]
    return key_of(state, ((row.tokens, row.label) for row in rows))

"""Makes the training jobs of a build with an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer
from edgetune_runtime.wording import first_of

from edgetune import methods
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.shipping.exported import PreparedAdapter
from edgetune.tasks.task import Task
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
        train, long_train = tokenize_labelled(task.trained_rows, tokenizer, task.labels, length)
        validation, long_validation = tokenize_labelled(task.choosing, tokenizer, task.labels, length)
        too_long = long_train + long_validation
        if too_long:
            progress.say(f"{task.name}: {len(too_long)} rows are longer than {length} tokens: {first_of(too_long)}")
        planned = plan.adapters[task.name]
        job = TrainingJob(
            task.name,
            methods.load(planned.method),
            planned.options,
            planned.training,
            train,
            validation,
            _key(planned, base, [*train, *validation]),
            Classify(base.hidden_size, len(task.labels)),
        )
        prepared.append(PreparedAdapter(planned, task, job, too_long))
    return prepared


def _key(planned: AdapterPlan, base: EncoderBase, rows: Sequence[Labelled]) -> str:
    method = {"name": planned.method, **planned.options.model_dump(mode="json")}
    state = [CLASSIFICATION, base.fingerprint, method, planned.training.model_dump(mode="json"), list(planned.labels)]
    return key_of(state, ((row.tokens, row.label, row.weight) for row in rows))

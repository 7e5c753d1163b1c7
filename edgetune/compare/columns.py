"""Outcomes in, the cells of the tables out: of training, of each engine, and of placements that were weighed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .figures import OnEngine, TrainingFigures, TrialResult, megabytes

NONE = "-"
"""A figure that there is not."""
BUSY = "*"
"""Marks times and speeds that were taken on a busy machine."""


@dataclass(frozen=True)
class Column:
    """A column's title, and what it holds in a few words."""

    title: str
    meaning: str


TRAINING = (
    Column("trial", "method and rank"),
    Column("trainable", "parameters that training changes"),
    Column("%", "of the base's parameters"),
    Column("seconds", "of training, validation included"),
    Column("tokens/s", "of training rows"),
    Column("peak MB", "of memory in training, 10^6 bytes"),
    Column("val loss", "nats a token, at the best checkpoint, which is the one that ships"),
    Column("at step", "of the best checkpoint, and of how many"),
    Column("overfit", "step from which validation loss rose"),
    Column("torch score", "of the checkpoint before export"),
)
ON_ENGINE = (
    Column("trial", "method and rank"),
    Column("engine", "what runs it on the device"),
    Column("shape", "what the adapter is there; merged is a whole model"),
    Column("score", "on the engine, after quantization, with one standard error"),
    Column("MB", "of the adapter's files, 10^6 bytes"),
    Column("tokens/s", "decoding with the adapter beside the base"),
    Column("merged", "tokens/s with the adapter merged into the base"),
    Column("base", "tokens/s of the plain base"),
    Column("switch µs", "median of the switch alone"),
    Column("first token ms", "after a switch back to the adapter"),
    Column("KL", "of the exported from the trained, mean over rows"),
)
PLACEMENTS = (
    Column("trial", "method and rank"),
    Column("modules", "that the adapter would be placed on"),
    Column("rank", "of the adapter there"),
    Column("slower %", "what decoding loses by it, in the engine"),
    Column("trial loss", "validation loss after a short training, nats a token; of those within the budget"),
    Column("chosen", "the lowest loss within the budget"),
)
TEXT_COLUMNS = {"trial", "engine", "shape", "modules", "chosen"}
"""Columns that are no numbers."""


def training_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each outcome; one that is not done has its name and the reason alone."""
    for outcome in outcomes:
        training = outcome.training
        if training is None:
            yield outcome.name, f"{outcome.status}: {outcome.reason}"
            continue
        yield (
            outcome.name,
            f"{training.trainable_parameters:,}",
            f"{training.trainable_share:.2%}".removesuffix("%"),
            f"{training.seconds:.0f}" if training.seconds >= 10 else f"{training.seconds:.1f}",
            f"{training.tokens_per_s:.0f}",
            f"{training.peak_memory_mb:.0f}",
            f"{training.val_loss:.3f}",
            f"{training.best_step}/{training.steps}",
            _overfit(training),
            _number(outcome.torch_score),
        )


def engine_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each outcome on each engine; where the format holds no such adapter, the reason."""
    for outcome in outcomes:
        for target, figures in outcome.engines.items():
            yield outcome.name, target, *_on_engine(figures)
        if outcome.status == "refused" or outcome.engines:
            for target, reason in outcome.refused.items():
                yield outcome.name, target, f"refused: {reason}"


def placement_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each placement that was weighed for a trial whose modules are chosen by their cost."""
    for outcome in outcomes:
        found = outcome.placement
        for tried in found["tried"] if found else ():
            modules, rank = tried["modules"], tried["rank"]
            yield (
                outcome.name,
                modules if isinstance(modules, str) else ", ".join(modules),
                str(rank),
                f"{tried['cost'] * 100:.1f}",
                _number(tried["val_loss"]),
                "yes" if found and (found["modules"], found["rank"]) == (modules, rank) else "",
            )


def busy_notes(outcomes: Sequence[TrialResult]) -> list[str]:
    """What the mark at times and speeds means, where there is one: which trials were timed on a busy machine, and why.

    Placements that were weighed on one are named too.
    """
    marked = [
        f"{outcome.name} in {target}{f' ({figures.busy})' if figures.busy else ''}"
        for outcome in outcomes
        for target, figures in outcome.engines.items()
        if figures.slow
    ]
    notes = []
    if marked:
        notes = [
            f"{BUSY} timed on a busy machine, so these times and speeds are not used: {', '.join(marked)}",
            "to time a trial again, delete its trials/NAME/trial.json and run the command on a quiet machine",
        ]
    return notes + [
        f"{outcome.name}: its modules were chosen by speeds measured on a busy machine ({outcome.placement['busy']})"
        for outcome in outcomes
        if outcome.placement and outcome.placement.get("busy")
    ]


def _on_engine(figures: OnEngine) -> tuple[str, ...]:
    mark = BUSY if figures.slow else ""
    return (
        figures.shape,
        f"{_number(figures.score)} ± {figures.standard_error:.3f}",
        megabytes(figures.bytes),
        *(
            _number(value, f"{{:.1f}}{mark}")
            for value in (
                figures.tokens_per_s,
                figures.merged_tokens_per_s,
                figures.base_tokens_per_s,
                figures.switch_us,
                figures.first_token_ms,
            )
        ),
        f"{figures.kl:.1e}",
    )


def _overfit(training: TrainingFigures) -> str:
    return NONE if training.overfit_step is None else str(training.overfit_step)


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return NONE if value is None else form.format(value)

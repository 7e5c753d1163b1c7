"""The cells of the comparison's tables: training, each engine, and the placements that were tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .figures import EngineFigures, TrialResult, megabytes

NONE = "-"
"""Shown for a missing figure."""
BUSY = "*"
"""Marks times and speeds measured on a busy machine."""


@dataclass(frozen=True)
class Column:
    """A column's title and a short description."""

    title: str
    meaning: str


TRAINING = (
    Column("trial", "method and rank"),
    Column("rows", "that were trained on"),
    Column("trainable", "parameters that training changes"),
    Column("%", "of the base's parameters"),
    Column("seconds", "of training, validation included"),
    Column("tokens/s", "of training rows"),
    Column("peak MB", "of memory in training, 10^6 bytes"),
    Column("val loss", "nats per token, at the checkpoint that ships"),
    Column("at step", "step of that checkpoint / number of steps"),
    Column("overfit", "step after which validation loss rose"),
    Column("torch score", "of the checkpoint before export"),
)
ON_ENGINE = (
    Column("trial", "method and rank"),
    Column("engine", "that runs it on the device"),
    Column("shape", "of the adapter in this format; merged is a full model"),
    Column("score", "on the engine, after quantization, with one standard error"),
    Column("MB", "of the adapter's files, 10^6 bytes"),
    Column("tokens/s", "decoding with the adapter, not merged"),
    Column("merged", "tokens/s with the adapter merged into the base"),
    Column("base", "tokens/s of the base without an adapter"),
    Column("switch µs", "median time of the switch itself"),
    Column("first token ms", "time to first token after a switch back to the adapter"),
    Column("KL", "divergence of the exported from the trained model, mean over rows"),
)
PLACEMENTS = (
    Column("trial", "method and rank"),
    Column("modules", "that the adapter would change"),
    Column("rank", "of the adapter"),
    Column("slower %", "loss of decode speed in the engine"),
    Column("trial loss", "validation loss after a short training, nats per token; only within the budget"),
    Column("chosen", "the lowest loss within the budget"),
)
TEXT_COLUMNS = {"trial", "engine", "shape", "modules", "chosen"}
"""Columns that are not numbers."""


def training_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each outcome; one that is not done has only its name and the reason."""
    for outcome in outcomes:
        training = outcome.training
        if training is None:
            yield outcome.name, f"{outcome.status}: {outcome.reason}"
            continue
        yield (
            outcome.name,
            f"{outcome.trained_rows:,}",
            f"{training.trainable_parameters:,}",
            f"{training.trainable_parameters / training.total_parameters:.2%}".removesuffix("%"),
            f"{training.seconds:.0f}" if training.seconds >= 10 else f"{training.seconds:.1f}",
            f"{training.tokens_per_s:.0f}",
            f"{training.peak_memory_mb:.0f}",
            f"{training.val_loss:.3f}",
            f"{training.shipped_step}/{training.steps}",
            _number(training.overfit_step, "{}"),
            _number(outcome.torch_score),
        )


def engine_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each outcome on each engine; the reason if the format does not support the method."""
    for outcome in outcomes:
        for target, figures in outcome.engines.items():
            yield outcome.name, target, *_on_engine(figures)
        if outcome.status == "refused" or outcome.engines:
            for target, reason in outcome.refused.items():
                yield outcome.name, target, f"refused: {reason}"


def placement_rows(outcomes: Sequence[TrialResult]) -> Iterator[tuple[str, ...]]:
    """A row for each placement that was tried for a trial with `target_modules: auto`."""
    for outcome in outcomes:
        placement = outcome.placement
        for candidate in placement["tried"] if placement else ():
            modules, r = candidate["target_modules"], candidate["r"]
            yield (
                outcome.name,
                modules if isinstance(modules, str) else ", ".join(modules),
                str(r),
                f"{candidate['cost'] * 100:.1f}",
                _number(candidate["val_loss"]),
                "yes" if placement and (placement["target_modules"], placement["r"]) == (modules, r) else "",
            )


def busy_notes(outcomes: Sequence[TrialResult]) -> list[str]:
    """Notes on the mark at times and speeds: which trials were timed on a busy machine, and why. Empty without marks.

    Trials whose placement was measured on a busy machine are listed too.
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
            "to time a trial again, delete its trials/NAME/trial.json and run the command again on a quiet machine",
        ]
    return notes + [
        f"{outcome.name}: modules chosen by speeds measured on a busy machine ({outcome.placement['busy']})"
        for outcome in outcomes
        if outcome.placement and outcome.placement.get("busy")
    ]


def _on_engine(figures: EngineFigures) -> tuple[str, ...]:
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


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return NONE if value is None else form.format(value)

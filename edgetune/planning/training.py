"""Chooses the training options that a recipe leaves to `training: auto`, by its rows and its base."""

from __future__ import annotations

import math

from edgetune.recipe.parts import Metric
from edgetune.recipe.training import TO_THE_END, TrainingSpec

# A few hundred rows take 10 to 30 passes before a rank-16 adapter answers from them; 1,000 still gain from 6 over 3.
_ROW_PASSES, _ROOT_PASSES, _LEAST_EPOCHS, _MOST_EPOCHS = 3000, 180, 3, 20
_MANY_ROWS = 20_000
# Rows per step, by the fewest rows for which it is used.
_BATCHES = ((2000, 16), (100, 8), (0, 4))
# The width of SmolLM2-135M, for which the default learning rate was chosen. Wider bases need a lower one.
_WIDTH = 576


def choose_training(options: TrainingSpec, rows: int, width: int | None, metric: Metric) -> tuple[TrainingSpec, str]:
    """The options with `auto` resolved for so many training rows, and the reason, "" without `auto`.

    `width` is that of the base's layers, None if it is unknown or an encoder's; `metric` is that of the answers.

    Options that the recipe sets stay. All options of the result count as set.
    """
    if not options.auto:
        return options, ""
    passes = max(_ROW_PASSES / max(rows, 1), _ROOT_PASSES / math.sqrt(max(rows, 1)))
    epochs = 1 if rows > _MANY_ROWS else max(_LEAST_EPOCHS, min(round(passes), _MOST_EPOCHS))
    batch_size = next(size for least, size in _BATCHES if rows >= least)
    chosen: dict[str, float | str | None] = {"epochs": epochs, "batch_size": batch_size}
    ends_early = "patience" in options.model_fields_set and options.patience is not None
    if metric != "perplexity" and not ends_early:
        chosen |= TO_THE_END
    if width is not None and width > _WIDTH:
        chosen["learning_rate"] = float(f"{options.learning_rate * _WIDTH / width:.2g}")
    chosen = {key: value for key, value in chosen.items() if key not in options.model_fields_set}
    training = TrainingSpec.model_validate({**dict(options), **chosen, "auto": False})
    values = ", ".join(f"{key} {'null' if value is None else value}" for key, value in chosen.items()) or "as set"
    layers = f" and layers of width {width}" if "learning_rate" in chosen else ""
    return training, f"{values}: for {rows:,} training rows{layers}"

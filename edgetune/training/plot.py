"""Plots the loss curves of a training run as a PNG."""

from __future__ import annotations

from pathlib import Path

from .job import TrainResult

SIZE_INCHES = (7.0, 4.0)
# With room for a loss of five digits. A layout that matplotlib computes draws everything twice.
_MARGINS = {"left": 0.12, "right": 0.98, "bottom": 0.13, "top": 0.92}


def plot_training(result: TrainResult, title: str, out: Path, unit: str) -> None:
    """Plot training and validation loss by epoch, with the checkpoint that ships and the range of overfitting.

    The losses are in nats per `unit` (see `Objective.unit`).
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=SIZE_INCHES)
    figure.subplots_adjust(**_MARGINS)
    axes = figure.add_subplot()
    epochs = [point.epoch for point in result.history]
    axes.plot(epochs, [point.train_loss for point in result.history], "o-", color="tab:gray", label="training")
    axes.plot(epochs, [point.val_loss for point in result.history], "o-", color="tab:blue", label="validation")
    by_step = {point.step: point for point in result.history}
    shipped = by_step[result.shipped_step]
    label = f"shipped: {shipped.val_loss:.3f}"
    axes.plot([shipped.epoch], [shipped.val_loss], "o", color="tab:green", markersize=10, label=label)
    if result.overfit_step is not None:
        start = by_step[result.overfit_step].epoch
        axes.axvspan(start, epochs[-1], color="tab:red", alpha=0.1, label="overfitting")
    axes.set(title=title, xlabel="epoch", ylabel=f"loss (nats per {unit})", ylim=(0, None))
    # "best" takes long on a loaded machine, and then warns.
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)

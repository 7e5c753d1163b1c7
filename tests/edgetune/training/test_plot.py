from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.building.encoder.objective import Classify
from edgetune.objectives.base import Objective
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.training.job import Point, TrainResult
from edgetune.training.plot import plot_training


@pytest.mark.parametrize(("objective", "unit"), [(NEXT_TOKEN, "token"), (Classify(8, 2), "row")])
def test_the_plot_names_what_a_loss_is_about(objective: Objective, unit: str, tmp_path: Path) -> None:
    point = Point(step=1, epoch=1.0, train_loss=1.0, val_loss=2.0, learning_rate=0.1)
    result = TrainResult(1.0, 2.0, 1, 1, None, 8, 80, 100, 10.0, 50.0, 2.0, "fp32", "cpu", [point])
    # In this format, texts are also comments.
    plot_training(result, "task", tmp_path / "plot.svg", objective.unit)
    assert f"loss (nats per {unit})" in (tmp_path / "plot.svg").read_text(encoding="utf-8")

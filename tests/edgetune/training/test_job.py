from __future__ import annotations

from dataclasses import replace

from trainings import SHORT, job

from edgetune.training.job import TrainingJob


def test_the_validation_loss_is_that_of_rows_from_all_parts_of_a_long_file() -> None:
    work: TrainingJob = job("lora")
    # As many rows of each kind, one kind after the other.
    rows = [row for row in SHORT[:8] for _ in range(100)]
    chosen = replace(work, validation=rows).loss_rows
    assert len(chosen) == 256
    assert {tuple(row.tokens) for row in chosen} == {tuple(row.tokens) for row in SHORT[:8]}

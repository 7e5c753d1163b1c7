"""Metrics of drafts, from a bundle whose adapter has a draft table."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime.server.answer_queue import AnswerQueue
from edgetune_runtime.server.metrics import Metrics
from runtime.bundles import add_draft_table
from runtime.server.conftest import Start
from runtime.server.test_health import figures

KNOWN, OTHER = "play", "turn on the warm light"


@pytest.fixture
def drafting(prompted_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle whose adapter `one` has a table of its answer to KNOWN."""
    bundle = Path(shutil.copytree(prompted_of("llama"), tmp_path / "home"))
    add_draft_table(bundle, "gguf", [KNOWN])
    return bundle


def test_the_acceptance_rate_of_drafts_can_be_computed(drafting: Path, start: Start) -> None:
    server = start(drafting)
    timings = []
    for prompt, temperature in ((KNOWN, 0), (OTHER, 0), (KNOWN, 1.5)):
        body = {"model": "one", "messages": [{"role": "user", "content": prompt}], "max_tokens": 40, "seed": 1}
        reply = server.client.post("/v1/chat/completions", json={**body, "temperature": temperature})
        timings.append(reply.json()["timings"])
    right, *_, wrong = timings
    assert 20 < right["accepted"] <= right["drafted"]
    assert wrong["accepted"] < wrong["drafted"]
    found = figures(server)
    assert found["edgetune_draft_tokens_total adapter=one"] == sum(each["drafted"] for each in timings)
    assert found["edgetune_draft_tokens_accepted_total adapter=one"] == sum(each["accepted"] for each in timings)


def test_an_answer_without_drafts_counts_none(start: Start) -> None:
    server = start()
    body = {"model": "command", "messages": [{"role": "user", "content": KNOWN}], "max_tokens": 8}
    assert server.client.post("/v1/chat/completions", json=body).json()["timings"]["drafted"] == 0
    assert figures(server)["edgetune_draft_tokens_total adapter=command"] == 0


def test_a_hundred_adapters_have_figures_of_their_own_until_they_are_removed() -> None:
    metrics = Metrics(AnswerQueue(1, 0))
    for number in range(102):
        metrics.count_first_piece(f"task{number}", time.monotonic())
    metrics.count_first_piece(None, time.monotonic())
    metrics.count_first_piece({"task1": 1.0, "task2": 1.0}, time.monotonic())
    assert adapters_in(metrics) == {*(f"task{number}" for number in range(100)), "other", "base", "several"}
    metrics.forget("task7")
    metrics.forget("task101")
    metrics.count_first_piece("task101", time.monotonic())
    assert adapters_in(metrics) >= {"task101", "other"}
    assert "task7" not in adapters_in(metrics)


def adapters_in(metrics: Metrics) -> set[str]:
    return set(re.findall(r'edgetune_ttft_seconds_count\{adapter="(.*?)"\}', metrics.text().decode()))

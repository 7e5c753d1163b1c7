from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from edgetune.training import step_threads
from edgetune.training.step_threads import StepThreads


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Two threads of torch on a machine that has cores for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(step_threads, "usable_cores", lambda: 2)
    yield 2
    torch.set_num_threads(before)


def test_a_training_that_lacks_cores_continues_with_fewer_threads(torch_threads: int) -> None:
    threads = StepThreads(is_cpu=True)
    found = []
    for _ in range(2):
        with threads.step(100):
            found.append(torch.get_num_threads())
            # Time without CPU time is what threads that others keep from their cores have.
            time.sleep(0.1)
    assert found == [torch_threads, 1]
    threads.restore()
    assert torch.get_num_threads() == torch_threads


def test_a_training_on_an_accelerator_keeps_its_threads(torch_threads: int) -> None:
    threads = StepThreads(is_cpu=False)
    for _ in range(2):
        with threads.step(100):
            assert torch.get_num_threads() == torch_threads
            time.sleep(0.1)


def test_no_more_threads_than_the_process_may_use(torch_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_threads, "usable_cores", lambda: 1)
    threads = StepThreads(is_cpu=True)
    with threads.step(1):
        assert torch.get_num_threads() == 1
    threads.restore()
    assert torch.get_num_threads() == torch_threads

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from trainings import QUIET, Listening
from transformers.utils import logging
from waiting import wait_for

from edgetune.common.process_state import own_process_state


def test_blocks_of_two_threads_take_turns_and_one_in_another_does_not_wait() -> None:
    listening, entered = Listening(), threading.Event()

    def second() -> None:
        with own_process_state(listening.say):
            entered.set()

    with ThreadPoolExecutor(1) as threads:
        with own_process_state(QUIET.say), own_process_state(QUIET.say):
            waiting = threads.submit(second)
            wait_for(lambda: listening.lines)
            assert not entered.is_set()
        waiting.result(30)
    assert listening.lines == ["waiting for another call in this process, which trains or exports"]


@pytest.mark.parametrize(
    "user",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_a_training_has_the_default_settings_of_torch(user: Callable[[], AbstractContextManager[object]]) -> None:
    with user(), own_process_state(QUIET.say):
        weight = torch.ones(2, 2, requires_grad=True)
        loss = (weight @ weight).sum()
        loss.backward()
    assert (weight.dtype, loss.dtype, weight.device.type) == (torch.float32, torch.float32, "cpu")
    assert weight.grad is not None


def test_settings_seed_and_logging_are_as_before_also_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the class of that name.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    before = torch.get_default_dtype(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()
    try:
        torch.set_default_dtype(torch.bfloat16)
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        with pytest.raises(KeyboardInterrupt), own_process_state(QUIET.say):
            assert torch.get_default_dtype() == torch.float32
            torch.manual_seed(1)
            torch.set_num_threads(threads + 1)
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            raise KeyboardInterrupt
        assert (torch.rand(1), torch.get_num_threads()) == (expected, threads)
        assert (torch.get_default_dtype(), logging.get_verbosity()) == (torch.bfloat16, logging.INFO)
        assert logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(threads)
        logging.set_verbosity(before[1])
        (logging.enable_progress_bar if before[2] else logging.disable_progress_bar)()

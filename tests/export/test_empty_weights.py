from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from edgetune_export.empty_weights import empty_weights
from torch.nn import BatchNorm1d, Linear


def test_parameters_are_empty_and_buffers_are_not() -> None:
    with empty_weights():
        norm = BatchNorm1d(2)
    assert norm.weight.is_meta and norm.weight.requires_grad
    assert norm.running_mean is not None and not norm.running_mean.is_meta
    assert not Linear(1, 1).weight.is_meta


def test_other_threads_make_modules_with_weights() -> None:
    with ThreadPoolExecutor(1) as threads, empty_weights():
        other = threads.submit(Linear, 1, 1).result()
    assert not other.weight.is_meta

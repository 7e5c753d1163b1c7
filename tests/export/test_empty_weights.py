from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import Any

from edgetune_export.empty_weights import empty_weights
from torch.nn import BatchNorm1d, Linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM


def test_parameters_are_empty_and_buffers_are_not() -> None:
    with empty_weights():
        norm = BatchNorm1d(2)
    assert norm.weight.is_meta and norm.weight.requires_grad
    assert norm.running_mean is not None and not norm.running_mean.is_meta
    assert not Linear(1, 1).weight.is_meta


def test_transformers_makes_no_random_values_for_empty_parameters() -> None:
    names: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    config = LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    with Noting(), empty_weights():
        model = LlamaForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    # Only torch does so, for the embedding.
    assert sum("normal" in name for name in names) == 1


def test_other_threads_make_modules_with_weights() -> None:
    with ThreadPoolExecutor(1) as threads, empty_weights():
        other = threads.submit(Linear, 1, 1).result()
    assert not other.weight.is_meta


def test_torch_is_as_before_after_blocks_of_two_threads_that_overlap() -> None:
    before, is_first_over = Linear.register_parameter, Event()

    def second() -> None:
        with empty_weights():
            assert is_first_over.wait(30)

    with ThreadPoolExecutor(1) as threads:
        with empty_weights():
            running = threads.submit(second)
            wait([running], 0.2)
        is_first_over.set()
        running.result(30)
    assert Linear.register_parameter is before

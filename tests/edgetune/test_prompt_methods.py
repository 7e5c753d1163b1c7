from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tiny import make_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.data import Example
from edgetune.methods._base import trainable
from edgetune.methods._prompt_model import Given
from edgetune.objectives import NEXT_TOKEN
from edgetune.packing import ATTENTION
from edgetune.progress import Progress

QUIET = Progress(quiet=True)
VOCABULARY = 384
HEADER = (10, 11, 12)
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix of a network": {"name": "prefix", "prefix_projection": True},
    "prompt": {},
    "p_tuning": {},
    "p_tuning by an LSTM": {"name": "p_tuning", "encoder_reparameterization_type": "LSTM"},
}
BaseOf = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module")
def base_of() -> BaseOf:
    """`base_of(arch)`: a tiny base; gemma3's window is 16, less than the 20 positions of a prefix."""
    return cache(lambda arch: make_model(arch, VOCABULARY))


def random_row(seed: int, length: int, beginning: Sequence[int] = ()) -> Example:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(30, VOCABULARY, (length - len(beginning),), generator=generator).tolist()
    learned = tuple(i >= length - 4 for i in range(length))
    return Example((*beginning, *own), learned, length - 4)


ROWS = {
    "rows of different lengths": [random_row(1, 40), random_row(2, 9), random_row(3, 23)],
    "rows with a shared beginning": [random_row(seed, 18 + 9 * seed, range(10, 22)) for seed in range(3)],
}


class Letters:
    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def method_of(case: str, **more: object) -> tuple[Any, Any]:
    """The method of one of `METHODS` with its options, ready for a training."""
    given = {**METHODS[case], **more}
    method = methods.load(str(given.pop("name", case)))
    options = method.options.model_validate(given)
    return method, method.prepared(options, Letters(), [Example(tuple(range(30, 42)), (False,) * 12, 1)])


@contextmanager
def attached(case: str, base: PreTrainedModel, **more: object) -> Iterator[Any]:
    method, options = method_of(case, **more)
    torch.manual_seed(1)
    model = method.attach(base, options, 10)
    yield model
    method.detach(model)


def loss_packed(base: PreTrainedModel, model: Any, rows: Sequence[Example]) -> torch.Tensor:  # noqa: ANN401 - as attached
    base.set_attn_implementation(ATTENTION)
    batch = NEXT_TOKEN.batch(rows)
    loss = NEXT_TOKEN.loss(model, model, batch) / len(batch.targets)
    base.set_attn_implementation("sdpa")
    return loss


def loss_alone(model: Any, rows: Sequence[Example]) -> torch.Tensor:  # noqa: ANN401 - with PEFT around it
    """The mean over all learned tokens, each row run by itself with transformers' own attention."""
    logits = torch.cat([model(torch.tensor([row.tokens])).logits[0, -5:-1] for row in rows])
    return cross_entropy(logits, torch.tensor([row.tokens[-4:] for row in rows]).flatten())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("case", METHODS)
def test_packed_rows_have_the_loss_of_pefts_own_forward(case: str, arch: str, rows: str, base_of: BaseOf) -> None:
    base = base_of(arch)
    with attached(case, base) as model:
        packed, alone = loss_packed(base, model, ROWS[rows]), loss_alone(Given(model.peft), ROWS[rows])
        assert packed.item() == pytest.approx(alone.item(), abs=1e-4)
        parameters = [p for _, p in trainable(model)]
        pairs = zip(*(torch.autograd.grad(loss, parameters) for loss in (packed, alone)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            assert a.abs().max() > 0

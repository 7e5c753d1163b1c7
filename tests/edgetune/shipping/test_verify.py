from __future__ import annotations

import numpy as np
import pytest
from tiny import make_model

from edgetune.shipping import verify
from edgetune.training.step_threads import StepThreads


@pytest.mark.parametrize("arch", ["llama", "granite"])
def test_remembered_states_give_the_logits_of_the_model(arch: str) -> None:
    model, tokens = make_model(arch, 384).eval(), list(range(5, 45))
    trained = verify._Trained(model, StepThreads(is_cpu=True))
    expected = verify.logits_of(model)(tokens)
    for _ in range(2):
        found = trained.logits(model, None)(tokens)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[:], expected, atol=1e-5)

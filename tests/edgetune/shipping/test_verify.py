from __future__ import annotations

import numpy as np
import pytest
from tiny import make_model

from edgetune.shipping import verify


@pytest.mark.parametrize("arch", ["llama", "granite"])
def test_remembered_states_give_the_logits_of_the_model(arch: str) -> None:
    model, known, tokens = make_model(arch, 384).eval(), verify.States(), list(range(5, 45))
    expected = verify.logits_of(model)(tokens)
    for _ in range(2):
        found = verify._remembered(model, model, known)(tokens)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[:], expected, atol=1e-5)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import EdgetuneError

from edgetune import bases
from edgetune.bases import Base
from edgetune.common.progress import Progress


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., Base]:
    """`resolve(name, **changes)`: a base from tmp_path, with a converter that does not exist."""

    def call(name: str, **changes: Any) -> Base:  # noqa: ANN401 - of resolve's own types
        given: dict[str, Any] = {"folder": tmp_path, "quantization": None, "work": tmp_path / "work"}
        given |= {"progress": Progress(quiet=True), "converter": tmp_path / "no converter"}
        return bases.resolve(name, **{**given, **changes})

    return call


@pytest.fixture
def assert_refused() -> Callable[..., None]:
    """`assert_refused(kind, message, call)`: the call raises such an error, in one line."""

    def check(kind: type[EdgetuneError], message: str, call: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    return check

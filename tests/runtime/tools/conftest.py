"""The bundle for tools in both engines, also with other chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.inference.measuring import loaded_bundle

ENGINES = ("gguf", "onnx")


@pytest.fixture(scope="module", params=ENGINES)
def opened(request: pytest.FixtureRequest, tools_bundle: Path) -> Iterator[Runtime]:
    """The bundle in each engine."""
    with Runtime.open(tools_bundle, engine=request.param, disk_mb=0, contexts=1) as runtime:
        yield runtime


@pytest.fixture
def templated(opened: Runtime) -> Iterator[Callable[[str], Runtime]]:
    """`templated(template)`: the runtime with this chat template in place of the base's own."""
    tokenizer = loaded_bundle(opened).context()[0].engine.tokenizer
    own = tokenizer.chat_template

    def change(template: str) -> Runtime:
        tokenizer.chat_template = template
        loaded_bundle(opened)._fixed._tokens.clear()
        return opened

    yield change
    change(own or "")
    tokenizer.chat_template = own

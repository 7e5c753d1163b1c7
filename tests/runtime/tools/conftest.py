"""A bundle of both formats on a base whose vocabulary has the control tokens that begin calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.convert import convert_folder
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.measuring import loaded_bundle
from runtime.bundles import Adapter, add_onnx, change_manifest, low_rank, write_bundle
from runtime.conftest import LONG_PROMPTS
from runtime.tools.templates import CONTROLS

ENGINES = ("gguf", "onnx")
CONTEXT = 2048


@pytest.fixture(scope="session")
def tools_bundle(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter `one` has a long system prompt; its context has room for tools."""
    import torch  # noqa: PLC0415 - torch only where a test needs a base
    from tiny import make_folder, make_tokenizer  # noqa: PLC0415

    from edgetune.bases import Base, load_torch  # noqa: PLC0415

    root = tmp_path_factory.mktemp("tools")
    folder = make_folder("llama", root / "llama", make_tokenizer(root, CONTROLS))
    config = folder / "config.json"
    # With few words of English, each letter is a token.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}))
    path = folder.with_suffix(".gguf")
    convert_folder(folder, path, dtype="f16")
    base = Base("llama", path, sha256_of(path), read_header(path))
    source = Source(path, base.fingerprint, load_torch(base, torch.float32), root / "work")
    adapters = {"one": Adapter(low_rank(path, seed=1), system=LONG_PROMPTS[0])}
    bundle = write_bundle(root / "home", path, adapters)
    add_onnx(bundle, source, adapters)
    change_manifest(bundle, lambda raw: raw.update(context_length=CONTEXT))
    return bundle


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
        loaded_bundle(opened)._fixed.clear()
        return opened

    yield change
    change(own or "")
    tokenizer.chat_template = own

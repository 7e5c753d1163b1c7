"""The files that both engines open: a tiny base of each architecture in each format, with adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx.backend import write_base
from edgetune_runtime.engines.base import Engine
from edgetune_runtime.engines.gguf.engine import GgufEngine
from runtime.bundles import concatenated, folded, low_rank, write_adapter, write_onnx_adapter

MANY_MODULES = [
    f"blk.{layer}.{module}.weight" for layer in (0, 1) for module in ("attn_q", "attn_v", "ffn_up", "ffn_down")
]


def log_p(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities of all tokens, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def stop_next_step(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Set the flag that another thread would set during the step, which the engine clears before it."""
    if isinstance(engine, GgufEngine):
        patch.setattr(engine._stop, "clear", lambda: None)
        engine.stop_step()
    else:
        kind = type(engine._options)
        stopped = type("Stopped", (kind,), {"terminate": property(lambda _: True, lambda *_: None)})()
        kind.terminate.__set__(stopped, True)
        patch.setattr(engine, "_options", stopped)


@pytest.fixture(scope="session")
def files_of(
    tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, Path]]:
    """`files_of(backend, arch)`: a `base` with adapters `first`, `second` and `both`, their sum; LLaMA also `wide`."""

    @cache
    def make(backend: str, arch: str) -> dict[str, Path]:
        source, folder = tiny_source(arch), tmp_path_factory.mktemp(f"{backend}-{arch}")
        first, second = low_rank(source.path, seed=1), low_rank(source.path, seed=2, rank=3)
        pairs = {"first": first, "second": second, "both": concatenated(first, second)}
        if arch == "llama":
            pairs["wide"] = low_rank(source.path, 5, 2, MANY_MODULES, 0.1)
        if backend == "gguf":
            files = {name: write_adapter(source.path, folder / name, pair) for name, pair in pairs.items()}
            return {"base": source.path, **files}
        graph = write_base(source, folder, [folded(source.path, pair) for pair in pairs.values()])
        files = {name: write_onnx_adapter(source, graph, folder / name, pair) for name, pair in pairs.items()}
        return {"base": graph, **files}

    return make

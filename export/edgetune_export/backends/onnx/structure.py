"""Runs onnxruntime-genai's builder without the matrices of the model.

The builder would need memory for the model, its concatenated matrices and its output, but the matrices are added later
from the base's GGUF file. So it gets a model whose matrices have a shape but no values, and its graph refers to a file
that does not exist. Norms, biases and rotary tables are real, in the graph's own file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
from edgetune_runtime.errors import IncompatibleError

from . import gemma4

ABSENT = "absent.data"
"""The file that the graph names for the matrices; it is never written."""

# KV caches of the window's size would not allow shorter contexts, or dropping tokens.
_OPTIONS = ("fuse_mlp_gate_up=true", "windowed_kv_cache=false", "hf_token=false")

_save = ir.save


def run_builder(folder: Path, out: Path) -> None:
    """Run the builder to write the float32 graph of the Hugging Face folder to `out`, with fused q/k/v and gate/up.

    `folder` need not have the model's matrices; the graph names them but has no values for them. Raises
    IncompatibleError if the builder cannot export the model.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    model = (None, str(folder), str(out), "fp32", "cpu", str(out / "cache"))
    try:
        with (
            _builder() as builder,
            # Its class for Gemma 4 of this name in config.json is that of a model with experts.
            patch.object(builder, "Gemma4MoEModel", gemma4.make_class(builder)),
            patch.object(AutoModelForCausalLM, "from_pretrained", model_without_matrices),
            patch.object(ir, "save", _save_without_matrices),
        ):
            builder.create_model(*model, **builder.parse_extra_options(*model, [*_OPTIONS]))
    # It has no class of its own for what it does not support.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        message = f"onnxruntime-genai's builder cannot export {folder.name}: {reason}"
        raise IncompatibleError(message, "build for gguf") from error


@contextmanager
def _builder() -> Iterator[Any]:
    """The module of onnxruntime-genai's builder, which must not change this process.

    It prints, sets up logging, and imports modules of its folder under names such as `builders`, which another program
    may have too.
    """
    package = find_spec("onnxruntime_genai")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0], "models")
    names = {path.stem for path in folder.iterdir()}
    others = _taken_out(names)
    # With a handler there, logging is set up.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with (
            patch.object(sys, "path", [str(folder), *sys.path]),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            yield import_module("builder")
    finally:
        logging.getLogger().removeHandler(handler)
        _taken_out(names)
        sys.modules.update(others)


def _taken_out(names: set[str]) -> dict[str, Any]:
    """The loaded modules with these names and those in them, which the next import loads again."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


def model_without_matrices(folder: str, **_: object) -> Any:  # noqa: ANN401 - one of transformers' models
    """The model in `folder`; weights that are not in its file are on the meta device."""
    import torch  # noqa: PLC0415 - as above
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from edgetune_export.empty_weights import empty_weights  # noqa: PLC0415

    with empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _save_without_matrices(model: ir.Model, path: str, **_: object) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and _is_absent(tensor):
            value.const_value = ir.ExternalTensor(
                ABSENT, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
            )
    _save(model, path)


def _is_absent(tensor: ir.TensorProtocol) -> bool:
    raw = tensor.raw().raw if isinstance(tensor, ir.LazyTensor) else tensor.raw
    return getattr(raw, "is_meta", False)

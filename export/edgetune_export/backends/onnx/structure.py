"""Script that runs onnxruntime-genai's builder with its arguments, but without the matrices of the model.

The builder would need memory for the model, its concatenated matrices and its output, but the matrices are added later
from the base's GGUF file. So it gets a model whose matrices have a shape but no values, and its graph refers to a file
that does not exist. Norms, biases and rotary tables are real, in the graph's own file.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import onnx_ir as ir

ABSENT = "absent.data"
"""The file that the graph names for the matrices; it is never written."""

_save = ir.save


def main() -> None:
    """Run the builder on the folder in the arguments, which has a model's config and vectors."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    AutoModelForCausalLM.from_pretrained = model_without_matrices
    ir.save = _save_without_matrices  # type: ignore[assignment]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


def model_without_matrices(folder: str, **_: object) -> Any:  # noqa: ANN401 - one of transformers' models
    """The model in `folder`; weights that are not in its file are on the meta device."""
    import torch  # noqa: PLC0415 - as above
    from accelerate import init_empty_weights  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    with init_empty_weights(include_buffers=False):
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


if __name__ == "__main__":
    main()

"""Text classification with encoders: each adapter has a head for the labels of its task."""

from .base import Refusal, TaskType

_QUANTIZED = "{value!r} does not work for an encoder; use onnx: {{weights: int8}}"

TASK_TYPE = TaskType(
    base="an encoder",
    has_encoders=True,
    metric="label",
    # One before and one after the text, as [CLS] and [SEP].
    added_tokens=2,
    refused_keys={
        "quantization": _QUANTIZED,
        "imatrix": _QUANTIZED,
        "merged_quantization": _QUANTIZED,
        "device": "there are no predictions for encoders on {value!r}; remove device and set threads",
        "domain": "continued pretraining does not work for an encoder; remove domain",
    },
    refused_weights={"int4": "weights: int4 does not work for an encoder; use auto, fp32 or int8"},
    refused_adapter_keys={
        "merged": "merged: true does not work for an encoder; remove merged",
        "system": "an encoder has no system prompt; remove system",
        "output": "an encoder does not generate text; remove output",
        "metric": "metric {value} does not work for an encoder; use label",
        "target_modules": "target_modules: auto does not work for an encoder; name the modules",
        "start_from": "start_from does not work for an encoder; remove it",
    },
    not_offered={
        "compare": Refusal(
            "is for task text-classification, which compare does not support", "use a recipe for text-generation"
        ),
        "fit": Refusal(
            "is for task text-classification, and there are no predictions for encoders on boards",
            "run it on the board: edgetune-run classify",
        ),
        "imatrix": Refusal("does not work for task text-classification", "use onnx: {weights: int8}"),
        "label_estimate": Refusal("does not work for task text-classification", "leave it out"),
        "trial": Refusal("does not work for task text-classification", "leave it out"),
    },
)

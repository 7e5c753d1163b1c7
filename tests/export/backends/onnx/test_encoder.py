from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Delta, Head, LowRank
from edgetune_export.backends.base import EncoderSource
from edgetune_export.backends.onnx.encoder import weight_type, write_adapter, write_base
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_export.pooling import mean_pooled
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.formats.onnx_file import read_onnx
from edgetune_runtime.formats.onnx_slots import slots_of
from peft import LoraConfig, get_peft_model
from tiny import ENCODERS, FINGERPRINT, load_encoder

from edgetune.building.encoder.objective import logits_of

Source = Callable[[str], EncoderSource]
ROWS = torch.tensor([[2, 5, 9, 11, 7, 3], [2, 8, 6, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"},
    "some": {"r": 3, "lora_alpha": 24, "use_rslora": True, "target_modules": [r"query", r"q_lin", "value", "v_lin"]},
}


@dataclass(frozen=True)
class Task:
    """A random adapter and head, as PEFT saved them, with torch's logits for the rows."""

    folder: Path
    head: Head
    logits: np.ndarray

    @property
    def folded(self) -> LowRank:
        """Both as they are exported."""
        return replace(fold_peft(self.folder, self.folder.name), head=self.head)


def make_task(base: Path, out: Path, options: dict[str, Any], labels: int) -> Task:
    peft = get_peft_model(load_encoder(base), LoraConfig(**options)).eval()
    torch.manual_seed(labels)
    head = torch.nn.Linear(64, labels)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        logits = logits_of(peft, head, ROWS, MASK).numpy()
    peft.save_pretrained(out)
    return Task(out, Head(head.weight.detach().numpy(), head.bias.detach().numpy()), logits)


def changing(*modules: str) -> LowRank:
    """An adapter of these modules, which makes slots for them."""
    return LowRank("task", "lora", dict.fromkeys(modules, Delta(np.zeros((1, 1)), np.zeros((1, 1)))))


def in_int8(source: EncoderSource) -> EncoderSource:
    return replace(source, options={"onnx": OnnxOptions(weights="int8")})


@pytest.fixture(scope="module")
def tasks(tiny_encoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Task]]:
    root = tmp_path_factory.mktemp("tasks")
    return lambda arch: [
        make_task(tiny_encoder(arch), root / arch / name, options, labels)
        for (name, options), labels in zip(OPTIONS.items(), (3, 5), strict=True)
    ]


def run(graph: Path, adapter: dict[str, Any], output: str = "logits") -> np.ndarray:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ROWS.numpy(), "attention_mask": MASK.numpy(), **adapter}
    found: np.ndarray = session.run([output], inputs)[0]
    return found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("arch", ENCODERS)
def test_one_graph_answers_for_every_task_as_torch_does(
    arch: str, int8: bool, encoder_source: Source, tasks: Callable[[str], list[Task]], tmp_path: Path
) -> None:
    source = encoder_source(arch)
    made = tasks(arch)
    folded = [task.folded for task in made]
    graph = write_base(in_int8(source) if int8 else source, tmp_path, folded)
    onnx.checker.check_model(str(graph))
    modules = {module for adapter in folded for module in adapter.modules}
    assert {name.rpartition(".lora_")[0] for name in slots_of(read_onnx(graph))} == modules
    for task, adapter in zip(made, folded, strict=True):
        out = tmp_path / f"{adapter.name}.onnx_adapter"
        write_adapter(adapter, graph, out, base_fingerprint=FINGERPRINT)
        found = run(graph, adapter_arrays(out, "task")[0])
        assert found.shape == task.logits.shape
        assert np.abs(found - task.logits).max() < (0.05 if int8 else 1e-4)
    assert ("com.microsoft::MatMulNBits" in read_onnx(graph).ops) == int8


def test_the_plain_graph_is_the_pooled_base_without_labels(encoder_source: Source, tmp_path: Path) -> None:
    source = encoder_source("bert")
    graph = write_base(source, tmp_path, [changing("encoder.layer.0.attention.self.query")])
    assert source.model is not None
    with torch.no_grad():
        expected = mean_pooled(source.model(input_ids=ROWS, attention_mask=MASK).last_hidden_state, MASK).numpy()
    assert np.abs(run(graph, {}, "pooled") - expected).max() < 1e-5
    assert run(graph, {}).shape == (2, 0)


def test_the_graph_has_no_paths_of_the_machine_that_built_it(encoder_source: Source, tmp_path: Path) -> None:
    graph = write_base(encoder_source("bert"), tmp_path, ())
    assert b"edgetune_export" not in graph.read_bytes()


def test_only_adapted_modules_get_a_slot(encoder_source: Source, tmp_path: Path) -> None:
    module = "encoder.layer.1.output.dense"
    graph = write_base(in_int8(encoder_source("bert")), tmp_path, [changing(module)])
    header = read_onnx(graph)
    assert slots_of(header) == {f"{module}.lora_A.weight": (128, None), f"{module}.lora_B.weight": (None, 64)}
    assert json.loads(header.metadata["edgetune.slots"]) == {module: [[module, 128, 64]]}


def test_a_module_that_the_graph_does_not_compute_is_named(encoder_source: Source, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"pooler\.dense"):
        write_base(encoder_source("bert"), tmp_path, [changing("pooler.dense")])


def test_int8_takes_less_than_half_the_bytes(encoder_source: Source, tmp_path: Path) -> None:
    source = encoder_source("bert")
    sizes = []
    for held in (source, in_int8(source)):
        graph = write_base(held, tmp_path / weight_type(held), ())
        sizes.append(graph.with_name("model.onnx.data").stat().st_size)
    assert sizes[1] < 0.5 * sizes[0]


def test_half_floats_halve_a_tasks_file(
    encoder_source: Source, tasks: Callable[[str], list[Task]], tmp_path: Path
) -> None:
    adapter = tasks("bert")[0].folded
    graph = write_base(encoder_source("bert"), tmp_path, [adapter])
    sizes = {}
    for dtype in ("f32", "f16"):
        out = tmp_path / f"{dtype}.onnx_adapter"
        write_adapter(adapter, graph, out, dtype=dtype, base_fingerprint=FINGERPRINT)
        sizes[dtype] = out.stat().st_size
    assert sizes["f16"] < 0.7 * sizes["f32"]


def test_an_adapter_without_a_head_is_refused(encoder_source: Source, tmp_path: Path) -> None:
    adapter = changing("encoder.layer.1.output.dense")
    graph = write_base(encoder_source("bert"), tmp_path, [adapter])
    with pytest.raises(IncompatibleError, match="'task' has no head"):
        write_adapter(adapter, graph, tmp_path / "task.onnx_adapter", base_fingerprint=FINGERPRINT)

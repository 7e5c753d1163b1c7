from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from damage import flip
from edgetune_export.backends.base import EncoderSource
from edgetune_export.backends.onnx.adapter import write_tensors
from edgetune_export.backends.onnx.encoder import write_base
from edgetune_export.pack import pack
from edgetune_runtime import IncompatibleError, NotFoundError, Runtime, UsageError, VerificationError, engines
from edgetune_runtime.bundle import CLASSIFICATION, read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.engines.base import LabelEngine
from edgetune_runtime.engines.onnx.encoder import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    LOGITS,
    TRAINED_CONTEXT_LENGTH,
    EncoderEngine,
)
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.encoders import LABELS, MODULES, head, low_rank
from tiny import FINGERPRINT

TEXT = "turn off the light in the kitchen"


@pytest.fixture(scope="module")
def bundle(encoder_bundle: Path) -> Path:
    """A bundle of a tiny BERT with two tasks. Copy it before changing it."""
    return encoder_bundle


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with Runtime.open(bundle, preload="all") as opened:
        yield opened


def engine_of(runtime: Runtime) -> LabelEngine:
    classifier = loaded_bundle(runtime).classifier
    assert classifier is not None
    return classifier.engine


def copy_with(bundle: Path, out: Path, change: Callable[[Path], None]) -> Path:
    """A copy in which `change` was made, its digests filled in anew."""
    shutil.copytree(bundle, out / "changed")
    change(out / "changed")
    return pack(out / "changed", out / "repacked", read_manifest(bundle))


def adapter_of(bundle: Path, name: str) -> Path:
    return bundle / f"adapters/{name}/adapter.onnx_adapter"


def test_each_task_answers_with_probabilities_over_its_own_labels(runtime: Runtime) -> None:
    for name, labels in LABELS.items():
        label, scores = runtime.classify(TEXT, adapter=name)
        assert tuple(scores) == labels
        assert label == max(scores, key=scores.__getitem__)
        assert sum(scores.values()) == pytest.approx(1)


def test_switching_back_restores_the_first_answer(runtime: Runtime) -> None:
    first = runtime.classify(TEXT, adapter="place")
    assert runtime.classify(TEXT, adapter="power") != first
    assert runtime.classify(TEXT, adapter="place") == first


def test_some_of_the_labels_share_all_the_probability(runtime: Runtime) -> None:
    _, scores = runtime.classify(TEXT, adapter="place")
    label, some = runtime.classify(TEXT, ["none", "hall"], adapter="place")
    total = scores["none"] + scores["hall"]
    assert some == pytest.approx({"none": scores["none"] / total, "hall": scores["hall"] / total})
    assert label in some


def test_a_scale_weighs_the_adapters_update_alone(runtime: Runtime) -> None:
    plain = engine_of(runtime)
    tokens = plain.tokens_of(TEXT)
    expected = head("place").weight @ plain.pooled(tokens) + head("place").bias
    assert plain.logits(tokens, "place", 0.0) == pytest.approx(expected, abs=1e-4)
    whole, half = runtime.classify(TEXT, adapter={"place": 1.0}), runtime.classify(TEXT, adapter={"place": 0.5})
    assert whole == runtime.classify(TEXT, adapter="place")
    assert half != whole


def test_threads_with_other_tasks_do_not_disturb_each_other(runtime: Runtime) -> None:
    expected = {name: runtime.classify(TEXT, adapter=name) for name in LABELS}
    names = [*LABELS] * 40
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: runtime.classify(TEXT, adapter=name), names))
    assert found == [expected[name] for name in names]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities need Linux")
def test_answers_on_a_thread_of_low_priority_are_the_same(runtime: Runtime, bundle: Path) -> None:
    expected = runtime.classify(TEXT, adapter="place")
    polite = Runtime.open(bundle, priority="low")
    assert polite.classify(TEXT, adapter="place") == expected
    polite.close()
    with pytest.raises(UsageError, match="the runtime is closed"):
        polite.classify(TEXT, adapter="place")


def test_a_message_of_the_user_is_the_same_as_its_text(runtime: Runtime) -> None:
    messages = [{"role": "user", "content": TEXT}]
    assert runtime.classify(messages, adapter="place") == runtime.classify(TEXT, adapter="place")


def test_texts_are_neither_cut_nor_padded_to_what_the_tokenizer_file_says(runtime: Runtime) -> None:
    # The file cuts and pads to 8.
    assert len(engine_of(runtime).tokens_of("lamp")) == 3
    assert len(engine_of(runtime).tokens_of("lamp " * 20)) == 22


@pytest.mark.parametrize(
    ("prompt", "labels", "adapter", "message"),
    [
        (TEXT, ["hall", "cellar"], "place", "no label 'cellar'; choose one of: hall, kitchen, none"),
        (TEXT, ["hall", "hall"], "place", "cannot classify with the labels"),
        (TEXT, None, None, "labels of one adapter, not of 0; choose one of: place, power"),
        (TEXT, ["hall"], None, "labels of one adapter, not of 0"),
        (TEXT, None, {"place": 1.0, "power": 1.0}, "labels of one adapter, not of 2"),
        ("lamp " * 40, None, "place", "the prompt has 42 tokens, the context holds 1 to 32"),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": TEXT}], None, "place", "system, user"),
        ([{"role": "user"}], None, "place", "message 1 is"),
    ],
)
def test_classify_refuses_what_it_does_not_support(
    runtime: Runtime, prompt: object, labels: list[str] | None, adapter: object, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        runtime.classify(prompt, labels, adapter=adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda runtime: runtime.generate(TEXT, adapter="place"),
        lambda runtime: list(runtime.stream(TEXT)),
        lambda runtime: runtime.perplexity(TEXT),
    ],
    ids=["generate", "stream", "perplexity"],
)
def test_an_encoder_writes_nothing(runtime: Runtime, call: Callable[[Runtime], object]) -> None:
    with pytest.raises(UsageError, match=r"'home' only classifies text.*; use classify"):
        call(runtime)


def test_a_closed_runtime_says_so(bundle: Path) -> None:
    runtime = Runtime.open(bundle)
    runtime.clear_cache()
    runtime.close()
    runtime.close()
    with pytest.raises(UsageError, match="the runtime is closed"):
        runtime.classify(TEXT, adapter="place")


def test_other_engines_are_refused(bundle: Path) -> None:
    with pytest.raises(IncompatibleError, match="no file for engine 'gguf'; use one of: onnx"):
        Runtime.open(bundle, engine="gguf")
    with pytest.raises(UsageError, match="no engine 'spark'; choose one of: gguf, onnx"):
        Runtime.open(bundle, engine="spark")
    with pytest.raises(IncompatibleError, match="engine 'gguf' does not run text-classification; use it for: text-gen"):
        engines.load("gguf", CLASSIFICATION)


@pytest.mark.parametrize("name", ["base/onnx/model.onnx.data", "base/onnx/tokenizer.json", "adapters/power/adapter"])
def test_a_changed_byte_is_found_before_anything_is_loaded(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    flip(next(path for path in copy.rglob("*") if path.relative_to(copy).as_posix().startswith(name)), 0.5)
    with pytest.raises(VerificationError, match="does not match its digest"):
        Runtime.open(copy, preload="all")


def test_a_graph_of_other_weights_is_refused(
    bundle: Path, tmp_path: Path, encoder_source: Callable[[str], EncoderSource]
) -> None:
    other = replace(encoder_source("bert"), fingerprint="cd" * 32)
    changed = copy_with(bundle, tmp_path, lambda copy: write_base(other, copy / "base", [low_rank("place")]) and None)
    with pytest.raises(VerificationError, match="not the base that the adapters were made for"):
        Runtime.open(changed)


@pytest.mark.parametrize(
    ("trained", "nodes", "message"),
    [
        ("9" * 5000, [], "does not say how many tokens it was trained for"),
        ("512", [("ReduceSum", ["whole"], {"keepdims": 0})], r"gives logits of shape \(\), not \(1, 3\)"),
        ("512", [("Concat", ["whole", "whole"], {"axis": 1})], r"gives logits of shape \(1, 6\), not \(1, 3\)"),
    ],
)
def test_a_graph_of_another_form_is_refused(
    bundle: Path, tmp_path: Path, trained: str, nodes: list[tuple[str, list[str], dict[str, int]]], message: str
) -> None:
    def change(copy: Path) -> None:
        path = copy / "base/onnx/model.onnx"
        model = onnx.load(path, load_external_data=False)
        next(entry for entry in model.metadata_props if entry.key == TRAINED_CONTEXT_LENGTH).value = trained
        for kind, inputs, options in nodes:
            last = next(node for node in model.graph.node if LOGITS in node.output)
            last.output[:] = ["whole"]
            model.graph.node.append(onnx.helper.make_node(kind, inputs, [LOGITS], **options))
            next(value for value in model.graph.output if value.name == LOGITS).type.tensor_type.ClearField("shape")
        onnx.save(model, path)

    changed = copy_with(bundle, tmp_path, change)
    with pytest.raises(VerificationError, match=message), Runtime.open(changed, preflight=False) as runtime:
        runtime.classify(TEXT, adapter="place")


def without(*names: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without(HEAD_WEIGHT), VerificationError, "'place' has no usable head"),
        (without(HEAD_WEIGHT, HEAD_BIAS), VerificationError, "there is none"),
        (lambda arrays: arrays | {HEAD_BIAS: np.zeros(2, np.float32)}, VerificationError, r"classifier.bias \[2\]"),
        (lambda arrays: arrays | {HEAD_BIAS: np.full(3, np.nan, np.float32)}, VerificationError, "should be finite"),
        (
            lambda arrays: arrays | {HEAD_WEIGHT: np.zeros((64, 4), np.float32), HEAD_BIAS: np.zeros(4, np.float32)},
            VerificationError,
            r"finite \[64, 3\]",
        ),
        (without(f"{MODULES[0]}.lora_A.weight"), VerificationError, "has no lora_A"),
        (lambda arrays: arrays | {"x.lora_A.weight": np.ones((4, 1), np.float32)}, IncompatibleError, "unknown slot"),
    ],
)
def test_a_damaged_task_file_is_refused_by_name(
    bundle: Path,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    error: type[Exception],
    message: str,
) -> None:
    def damage(copy: Path) -> None:
        path = adapter_of(copy, "place")
        arrays, _ = adapter_arrays(path, "place")
        write_tensors(change(arrays), path, dtype="f32", base_fingerprint=FINGERPRINT)

    with pytest.raises(error, match=message):
        Runtime.open(copy_with(bundle, tmp_path, damage), preload="all")


def test_a_task_of_another_base_is_refused(bundle: Path, tmp_path: Path) -> None:
    arrays, _ = adapter_arrays(adapter_of(bundle, "place"), "place")
    path = tmp_path / "other.onnx_adapter"
    write_tensors(arrays, path, dtype="f32", base_fingerprint="cd" * 32)
    engine = EncoderEngine(bundle / "base/onnx/model.onnx", context_length=16, threads=1)
    with pytest.raises(IncompatibleError, match="'place' was made for another base"):
        engine.load_adapter("place", path, FINGERPRINT)
    with pytest.raises(NotFoundError, match="'place' is not loaded"):
        engine.logits([2, 3], "place")
    engine.close()


def test_the_command_line_classifies_and_refuses_the_rest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(bundle), "--adapter", "power", "--json"]
    assert main(["classify", *arguments, "--prompt", TEXT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"].keys() == {"on", "off"}
    assert main(["info", str(bundle), "--verify"]) == 0
    assert "bert" in capsys.readouterr().out
    for command in (["generate", *arguments, "--prompt", TEXT], ["chat", str(bundle)], ["bench", str(bundle)]):
        assert main(command) == 2
        # Refused before any work, which a line would announce.
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("use classify")
    assert main(["warm", str(bundle)]) == 2
    assert "only classifies text: it has no prompts to warm; use classify" in capsys.readouterr().err

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from damage import flip
from edgetune_export.backends.base import Source
from edgetune_runtime import EdgetuneError, IncompatibleError, Runtime, VerificationError
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx import ort as _ort
from edgetune_runtime.engines.onnx.arrays import model_version
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.bundles import change_manifest, write_manifest

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
PROMPT = "turn on the warm light in the kitchen"


def test_the_first_format_of_a_bundle_is_the_default(home_of_both: Path) -> None:
    with Runtime.open(home_of_both) as runtime:
        assert isinstance(loaded_bundle(runtime).context()[0].engine, GgufEngine)
    change_manifest(home_of_both, lambda raw: raw["base"]["files"].pop("gguf"))
    with Runtime.open(home_of_both) as runtime:
        assert isinstance(loaded_bundle(runtime).context()[0].engine, OnnxEngine)


def test_a_switch_while_the_active_adapter_is_unloaded_stays(
    files_of: Callable[[str, str], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of("onnx", "llama")
    switches: list[Future[None]] = []
    with (
        closing(OnnxEngine(files["base"], context_length=64, threads=1)) as engine,
        ThreadPoolExecutor(1) as other_thread,
    ):
        for name in ("first", "second"):
            engine.load_adapter(name, files[name])
        engine.activate({"second": 1.0})
        expected = engine.decode([5, 6])
        engine.truncate(0)
        engine.activate({"first": 1.0})
        binding_of = engine._binding_of

        def switched_meanwhile(adapters: Mapping[str, float]) -> object:
            if not adapters:
                switches.append(other_thread.submit(engine.activate, {"second": 1.0}))
                wait(switches, 0.2)
            return binding_of(adapters)

        monkeypatch.setattr(engine, "_binding_of", switched_meanwhile)
        engine.unload_adapter("first")
        switches[0].result()
        assert np.array_equal(engine.decode([5, 6]), expected)


# --- What is spoilt is refused in one line.


def sign(bundle: Path) -> None:
    """Bring the manifest's digests up to date, as somebody who spoils a bundle on purpose would."""
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest.base, manifest.adapters)


def refused(bundle: Path, *, verify: bool = True) -> EdgetuneError:
    with pytest.raises(EdgetuneError) as caught:
        Runtime.open(bundle, engine="onnx", verify=verify, preload="all")
    assert "\n" not in str(caught.value)
    assert caught.value.__class__ is not EdgetuneError
    return caught.value


@pytest.mark.parametrize(
    "file",
    [
        "base/onnx/model.onnx",
        "base/onnx/model.onnx.data",
        "base/onnx/tokenizer.json",
        "base/onnx/tokenizer_config.json",
        "base/onnx/genai_config.json",
        "adapters/tone/adapter.onnx_adapter",
    ],
)
def test_a_flipped_bit_is_refused_before_the_file_is_read(home_of_both: Path, file: str) -> None:
    flip(home_of_both / file, 0.5)
    error = refused(home_of_both)
    assert isinstance(error, VerificationError)
    assert f"{file} does not match its digest" in str(error)


def test_flipped_bits_of_an_adapter_without_digests_are_refused_or_harmless(
    files_of: Callable[[str, str], dict[str, Path]], tiny_source: Callable[[str], Source], tmp_path: Path
) -> None:
    files, fingerprint = files_of("onnx", "llama"), tiny_source("llama").fingerprint
    data, rng = files["first"].read_bytes(), random.Random(0)
    # All about the tensors lies before the numbers, and some behind.
    places = [*range(200), *(rng.randrange(len(data)) for _ in range(200)), *range(len(data) - 200, len(data))]
    engine, loaded = OnnxEngine(files["base"], context_length=32, threads=1), 0
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped"
        path.write_bytes(flipped)
        try:
            engine.load_adapter(str(number), path, fingerprint)
        except (VerificationError, IncompatibleError) as error:
            assert "\n" not in str(error)
        else:
            # A flipped exponent may give numbers that are too large to compute with, but nothing worse.
            loaded += 1
            engine.activate({str(number): 1.0})
            engine.truncate(0)
            assert engine.decode([5, 6]).shape == (384,)
    assert 100 < loaded < len(places)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"TAAD", bytes(range(256)) * 8])
def test_a_damaged_onnx_adapter_is_refused(data: bytes, home_of_both: Path) -> None:
    (home_of_both / "adapters/tone/adapter.onnx_adapter").write_bytes(data)
    error = refused(home_of_both, verify=False)
    assert isinstance(error, VerificationError)
    assert "'tone'" in str(error)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], version: int) -> None:
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in tensors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))


A = "model.layers.1.mlp.down_proj.lora_A.weight"
B = "model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if k != B}, VerificationError, "has no lora_B"),
        (lambda t: {k: v for k, v in t.items() if k != A}, VerificationError, "has no lora_A"),
        (lambda t: {}, VerificationError, "no tensors"),
        (lambda t: {**t, "model.layers.9.q.lora_A.weight": t[A]}, IncompatibleError, "unknown slot"),
        (lambda t: {**t, A: t[A][:-1].copy()}, IncompatibleError, r"shape \(127, 3\)"),
        (lambda t: {**t, A: t[A][:, :-1].copy()}, VerificationError, "different ranks: 2 and 3"),
        (lambda t: {**t, A: t[A].astype(np.float64)}, VerificationError, "type 11, not float32"),
        (lambda t: {**t, A: np.full_like(t[A], np.nan)}, VerificationError, "not finite"),
        (lambda t: {**t, A: t[A].reshape(-1)}, VerificationError, "instead of 2 dimensions"),
    ],
)
def test_an_adapter_that_contradicts_itself_or_the_graph_is_named(
    change: Change, kind: type[EdgetuneError], named: str, home_of_both: Path
) -> None:
    path = home_of_both / "adapters/tone/adapter.onnx_adapter"
    fingerprint = read_manifest(home_of_both).base.fingerprint
    tensors, version = adapter_arrays(path, "tone")
    assert version == model_version(fingerprint)
    write_tensors(path, change(tensors), version)
    sign(home_of_both)
    with pytest.raises(kind, match=f"adapter 'tone' .*{named}") as caught:
        Runtime.open(home_of_both, engine="onnx", preload=["tone"])
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(home_of_both: Path) -> None:
    path = home_of_both / "adapters/tone/adapter.onnx_adapter"
    tensors, version = adapter_arrays(path, "tone")
    write_tensors(path, tensors, version ^ 1)
    sign(home_of_both)
    error = refused(home_of_both)
    assert isinstance(error, IncompatibleError)
    assert "'tone' was made for another base" in str(error)


def test_a_graph_of_another_base_is_refused(home_of_both: Path) -> None:
    path = home_of_both / "base/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "edgetune.base_fingerprint").value = "0" * 64
    onnx.save(model, path)
    sign(home_of_both)
    assert "is not the base" in str(refused(home_of_both))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("location", ["../../../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "link"])
def test_weights_outside_the_bundle_are_refused(location: str, verify: bool, home_of_both: Path) -> None:
    path = home_of_both / "base/onnx/model.onnx"
    shutil.copy(home_of_both / "base/onnx/model.onnx.data", home_of_both.parent / "secret")
    (home_of_both / "base/onnx/link").symlink_to(home_of_both.parent / "secret")
    model = onnx.load(path, load_external_data=False)
    entry = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(pair for pair in entry.external_data if pair.key == "location").value = location
    onnx.save(model, path)
    (home_of_both / "base/onnx/link").unlink()
    sign(home_of_both)
    (home_of_both / "base/onnx/link").symlink_to(home_of_both.parent / "secret")
    error = refused(home_of_both, verify=verify)
    assert isinstance(error, VerificationError)


def test_weights_that_the_manifest_does_not_list_are_refused(home_of_both: Path) -> None:
    change_manifest(home_of_both, lambda raw: raw["files"].pop("base/onnx/model.onnx.data"))
    assert "no digest for base/onnx/model.onnx.data" in str(refused(home_of_both))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "genai_config.json", "model.onnx.data"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(file: str, verify: bool, home_of_both: Path) -> None:
    (home_of_both / "base/onnx" / file).unlink()
    assert file in str(refused(home_of_both, verify=verify))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"context_length": "x", "decoder": {}}}', "\xff"])
def test_a_damaged_config_is_refused(text: str, home_of_both: Path) -> None:
    (home_of_both / "base/onnx/genai_config.json").write_text(text, encoding="latin-1")
    assert isinstance(refused(home_of_both, verify=False), VerificationError)


def test_a_valid_graph_that_onnxruntime_refuses_is_a_one_line_error(home_of_both: Path) -> None:
    path = home_of_both / "base/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, path)
    sign(home_of_both)
    error = refused(home_of_both)
    assert isinstance(error, VerificationError)
    assert "NoSuchOperator" in str(error)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "logits_start", "present.0.key"])
def test_a_graph_without_an_input_or_an_output_fails_in_one_line(name: str, home_of_both: Path) -> None:
    path = home_of_both / "base/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.name = "other" if value.name == name else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if each == name else each for each in names]
    onnx.save(model, path)
    sign(home_of_both)
    with (
        pytest.raises(VerificationError, match=r"^the graph of the base fails: ") as caught,
        Runtime.open(home_of_both, engine="onnx", preflight=False) as runtime,
    ):
        runtime.generate("turn on the light", max_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.fixture
def another_onnxruntime() -> Iterator[None]:
    """Lets the test change what `library` finds."""
    _ort.library.cache_clear()
    yield
    _ort.library.cache_clear()


@pytest.mark.usefixtures("another_onnxruntime")
def test_the_error_about_an_old_onnxruntime_names_the_oldest_supported_one(
    both_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    error = refused(both_of("llama"))
    assert isinstance(error, IncompatibleError)
    assert "onnxruntime 1.20.1 is too old, 1.31 or newer" in str(error)
    assert 'pip install --upgrade "edgetune-runtime[onnx]"' in str(error)


@pytest.mark.usefixtures("another_onnxruntime")
@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_the_error_about_a_missing_library_names_what_to_install(
    package: str, both_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(both_of("llama"))
    assert isinstance(error, IncompatibleError)
    assert f"need {package}, which is not installed" in str(error)
    assert '"edgetune-runtime[onnx]"' in str(error)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from edgetune_runtime import Runtime, engines
from edgetune_runtime.engines.needs import AdapterSize
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError
from edgetune_runtime.sizing import calibration
from edgetune_runtime.sizing.bundle_check import check_bundle
from edgetune_runtime.sizing.calibration import (
    Calibration,
    MeasuredSpeed,
    figures_of,
    measure,
    read_calibration,
    write_calibration,
)
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.machine_speed import arithmetic, read_bandwidth
from edgetune_runtime.sizing.needs import items_of, kept_mb, needed_mb, needs_of_bundle
from edgetune_runtime.sizing.options import kv_types, with_kv, with_options
from edgetune_runtime.sizing.speed import adapter_seconds, speed_of, token_seconds
from runtime.bundles import MODULES, Adapter, change_manifest, low_rank, write_both, write_bundle

FIGURES = SpeedFigures(10.0, 100.0, 50.0, 5.0, 4.0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_source: Callable[[str], Source]) -> Path:
    """A bundle with two adapters in both formats."""
    source = tiny_source("llama")
    adapters = {name: Adapter(low_rank(source.path, seed)) for seed, name in enumerate(("one", "two"))}
    return write_both(tmp_path_factory.mktemp("sizing") / "bundle", source, adapters)


def test_memory_is_predicted_for_each_engine_and_shared_modules_are_no_engines() -> None:
    assert engines.names() == engines.names_with_needs() == ["gguf", "onnx"]


def test_the_first_format_of_a_bundle_is_counted_unless_another_is_named(both: Path) -> None:
    assert needs_of_bundle(both).engine == "gguf"
    onnx = needs_of_bundle(both, engine="onnx", context_length=64)
    files = json.loads((both / "manifest.json").read_text())["files"]
    weights = sum(file["bytes"] for name, file in files.items() if name.startswith("base/onnx/model.onnx"))
    assert onnx.base_bytes == weights
    # Cosines and sines of half a head for each position.
    assert onnx.angle_bytes == weights - onnx.read_bytes == 2 * 512 * 8 * 4
    assert onnx.context_length == 64
    assert onnx.adapters["one"].file_bytes == files["adapters/one/adapter.onnx_adapter"]["bytes"]


def test_both_formats_have_the_same_geometry(both: Path) -> None:
    gguf, onnx = needs_of_bundle(both, engine="gguf"), needs_of_bundle(both, engine="onnx")
    for size in ("layers", "heads", "embedding_length", "vocabulary"):
        assert getattr(gguf, size) == getattr(onnx, size), size


def test_an_engine_that_the_bundle_has_no_files_for_is_refused(both: Path, tmp_path: Path) -> None:
    base = both / "base/model.gguf"
    bundle = write_bundle(tmp_path / "gguf", base, {})
    with pytest.raises(IncompatibleError, match="has no onnx base; use one of: gguf"):
        needs_of_bundle(bundle, engine="onnx")


def test_options_change_keys_values_states_and_server(both: Path) -> None:
    needs = replace(needs_of_bundle(both), head_lengths=(64, 64))
    assert with_options(needs) == needs
    smaller = with_options(needs, kv="q8_0", cache_mb=0)
    assert smaller.kv_bytes_per_token == int(needs.kv_bytes_per_token * 34 / 64)
    assert smaller.state_bytes == 0 and needs.state_bytes > 0
    added = needed_mb(with_options(needs, serves=True), repacks=()) - needed_mb(needs, repacks=())
    assert added > 10


def test_keys_and_values_that_the_engine_the_base_or_an_adapter_cannot_have_are_refused(both: Path) -> None:
    gguf, onnx = needs_of_bundle(both, engine="gguf"), needs_of_bundle(both, engine="onnx")
    with pytest.raises(UsageError, match="gguf has no data type 'q5' for keys and values; choose one of: f16, q8_0"):
        with_kv(gguf, "q5")
    with pytest.raises(UsageError, match=r"onnx has no data type 'q8_0' .*; choose one of: f32"):
        with_kv(onnx, "q8_0")
    with pytest.raises(IncompatibleError, match="cannot be q8_0: the base's heads have 16 numbers, not"):
        with_kv(gguf, "q8_0")
    prefix = replace(gguf, head_lengths=(64, 64), adapters={"tone": AdapterSize(1000, 0, is_prefix=True)})
    with pytest.raises(IncompatibleError, match="cannot be q8_0: adapter tone is a prefix; use f16"):
        with_kv(prefix, "q8_0")
    for needs, types in ((gguf, ["f16"]), (onnx, ["f32"]), (prefix, ["f16"])):
        assert kv_types(needs) == types
        assert with_kv(needs, types[0]).kv_bytes_per_token == needs.kv_bytes_per_token


def test_the_parts_are_named_and_empty_ones_left_out(both: Path) -> None:
    names = [item.name for item in items_of(needs_of_bundle(both), repacks=())]
    assert {"base weights", "adapter one", "adapter two", "saved states", "computing"} <= set(names)
    assert "server" not in names and "draft tables" not in names


def test_constraints_on_answers_are_counted_once(both: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(both, tmp_path / "constrained"))
    before = needs_of_bundle(bundle)
    for name in before.adapters:
        change_manifest(bundle, lambda raw, name=name: raw["adapters"][name].update(output={"choices": ["a", "b"]}))
    needs = needs_of_bundle(bundle)
    assert before.constraint_bytes == 0
    assert needs.constraint_bytes > 340 * needs.vocabulary
    added = needed_mb(needs, repacks=()) - needed_mb(before, repacks=())
    assert added == pytest.approx(needs.constraint_bytes / 1e6)


def test_a_bundle_is_measured_with_the_adapter_of_most_modules(both: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(both, tmp_path / "bundle"))
    change_manifest(bundle, lambda raw: raw["adapters"]["two"].update(modules_by_rank={4: len(MODULES) + 1}))
    with Runtime.open(bundle, disk_mb=0, contexts=1, threads=1) as runtime:
        measured = measure(runtime)
    assert measured.adapter == "two"
    assert measured.adapter_decode is not None and measured.adapter_decode > 0
    assert measured.decode > 0 and measured.prefill > 0


def test_adapters_that_are_mapped_can_be_dropped_up_to_the_one_in_use(both: Path) -> None:
    sizes = {"one": AdapterSize(3_000_000, 14, is_mapped=True), "two": AdapterSize(2_000_000, 14, is_mapped=True)}
    mapped = replace(needs_of_bundle(both, engine="onnx"), adapters=sizes)
    copied = replace(mapped, adapters={name: replace(size, is_mapped=False) for name, size in sizes.items()})
    assert kept_mb(copied, repacks=()) - kept_mb(mapped, repacks=()) == pytest.approx(2)
    assert needed_mb(copied, repacks=()) == needed_mb(mapped, repacks=())


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth that needs no measurement, which takes half a second."""
    monkeypatch.setattr(calibration, "read_bandwidth", lambda threads: FIGURES.bandwidth_gb_per_s)


@pytest.mark.usefixtures("known_bandwidth")
@pytest.mark.parametrize("adapter_decode", [80.0, 120.0])
def test_figures_predict_the_speeds_they_come_from(both: Path, adapter_decode: float) -> None:
    needs = replace(needs_of_bundle(both), adapters={"one": AdapterSize(20_000, modules=14)})
    measured = MeasuredSpeed(decode=100.0, prefill=1000.0, tokens=64, adapter="one", adapter_decode=adapter_decode)
    figures = figures_of(needs, measured, 1)
    seconds = token_seconds(needs, figures, measured.tokens)
    assert 1 / seconds == pytest.approx(100.0, rel=0.01)
    with_adapter = seconds + adapter_seconds(needs.adapters["one"], figures)
    # An adapter that is measured as faster than the base still counts as a little slower.
    assert 1 / with_adapter == pytest.approx(min(adapter_decode, 100.0), rel=0.05)


@pytest.mark.usefixtures("known_bandwidth")
@pytest.mark.parametrize("long_decode", [50.0, 99.0, 110.0])
def test_two_contexts_show_what_attention_costs(both: Path, long_decode: float) -> None:
    needs = needs_of_bundle(both)
    measured = MeasuredSpeed(100.0, 1000.0, 64, None, None, long_tokens=1000, long_decode=long_decode)
    figures = figures_of(needs, measured, 1)
    assert 1 / token_seconds(needs, figures, 64) == pytest.approx(100.0, rel=0.01)
    assert 1 / token_seconds(needs, figures, 1000) == pytest.approx(min(100.0, long_decode), rel=0.02)
    assert figures.kv_gb_per_s <= figures.bandwidth_gb_per_s


def test_a_longer_context_and_an_adapter_are_slower(both: Path) -> None:
    needs = needs_of_bundle(both)
    assert token_seconds(needs, FIGURES, 100) > token_seconds(needs, FIGURES, 0)
    speed = speed_of(needs, FIGURES)
    assert speed.adapter_tokens_per_s < speed.decode_tokens_per_s < speed.prefill_tokens_per_s * 1000


def test_a_calibration_keeps_the_figures_of_each_engine_and_weights_of_the_same_machine(
    both: Path, tmp_path: Path
) -> None:
    path, machine = tmp_path / "board.json", {"processor": "Cortex-A72", "threads": 4}
    needs, graph = needs_of_bundle(both), needs_of_bundle(both, engine="onnx")
    other, slower = replace(needs, main_type="q4_K"), replace(FIGURES, bandwidth_gb_per_s=2.0)
    write_calibration(path, needs, FIGURES, machine)
    write_calibration(path, graph, SpeedFigures(9.0, 90.0, 60.0, 6.0, 3.0), machine)
    assert read_calibration(path, needs).figures == FIGURES
    assert read_calibration(path, graph).figures.bandwidth_gb_per_s == 9.0
    assert read_calibration(path, graph).caution(graph) is None
    assert read_calibration(path, needs).caution(needs) is None
    assert "these are q4_K" in (read_calibration(path, other).caution(other) or "")
    write_calibration(path, other, slower, machine)
    assert read_calibration(path, other) == Calibration(slower, "q4_K")
    assert read_calibration(path, needs).figures == FIGURES
    write_calibration(path, needs, FIGURES, {**machine, "processor": "Cortex-A76"})
    with pytest.raises(NotFoundError, match="has no figures for onnx, only for gguf; measure them on the board"):
        read_calibration(path, graph)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"kind": "edgetune-calibration", "engines": {"gguf": {"q4_0": {"bandwidth_gb_per_s": 1}}}}',
        '{"kind": "edgetune-calibration", "engines": {"gguf": {"q4_0": {"bandwidth_gb_per_s": -1, '
        '"compute_gflop_per_s": 1, "layer_us": 1, "adapter_module_us": 1, "kv_gb_per_s": 1}}}}',
        '{"engines": {}}',
        "{",
    ],
)
def test_another_file_is_not_taken_for_a_calibration(both: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"is not JSON|is not a file of doctor --calibrate"):
        read_calibration(path, needs_of_bundle(both))


def test_a_missing_calibration_is_named(both: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"cannot read .*nowhere\.json: No such file"):
        read_calibration(tmp_path / "nowhere.json", needs_of_bundle(both))


def test_raw_measurements_are_those_of_a_computer() -> None:
    assert 0.05 < read_bandwidth(1) < 2000
    assert 0.05 < arithmetic(1) < 100_000


def test_the_check_of_a_bundle_reports_prediction_and_measurement(both: Path) -> None:
    needs = needs_of_bundle(both)
    given = Calibration(FIGURES, needs.weights)
    check = check_bundle(lambda: Runtime.open(both, disk_mb=0, threads=1), needs, calibration=given, repacks=())
    assert check.figures is not None and check.problems == []
    assert check.report["predicted_tokens_per_s"].keys() == check.report["measured_tokens_per_s"].keys()
    assert check.report["measured_tokens_per_s"]["decode"] > 0


def test_the_check_of_a_bundle_reports_why_it_is_refused(both: Path) -> None:
    needs = needs_of_bundle(both)
    check = check_bundle(lambda: Runtime.open(both, engine="gguf", kv="f64"), needs, calibration=None, repacks=())
    assert check.figures is None
    assert check.problems == [f"refused: {check.report['refused']}"]
    assert "f64" in check.report["refused"]

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.architectures import known
from edgetune_export.backends.format import PROCESS_MB
from edgetune_export.base_file.convert import part_of
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import read_header
from recipes import PLAIN, adapter_of, lights, make_recipe
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES
from trainings import QUIET, Listening

from edgetune import bases
from edgetune.bases.folder_header import predict_header
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.planning import needs as build_needs
from edgetune.planning.records import BuildNeeds, BuildPlan, NeedsReport, Room
from edgetune.recipe.model import Recipe
from edgetune.training.device import CPU, TrainingDevice
from edgetune.training.duration import TrainingTime

NEEDS = BuildNeeds(
    parameters=1_700_000_000,
    weights_mb=6800,
    training_mb=12000,
    min_training_mb=8000,
    export_mb=15000,
    min_export_mb=8200,
    bundle_mb=2000,
    disk_mb=20000,
    min_disk_mb=3000,
    extra_formats_mb=900,
)
PLENTY = Room(Path("/data"), 64000.0, 500000.0)


def needs_of(recipe: Recipe) -> BuildNeeds:
    report = plan_build(recipe).plan.needs
    assert report is not None
    return report.needs


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_header_of_a_folder_is_that_of_the_file_it_is_converted_to(
    arch: str, tiny_folder: Callable[[str], Path], converted_gguf: Callable[[str], Path]
) -> None:
    predicted, converted = predict_header(tiny_folder(arch)), read_header(converted_gguf(arch))
    sizes = {name: tensor.shape for name, tensor in converted.tensors.items() if name != "rope_freqs.weight"}
    assert {name: tensor.shape for name, tensor in predicted.tensors.items()} == sizes
    for key, value in predicted.metadata.items():
        assert converted.metadata[key] == value, key


@pytest.mark.parametrize("arch", ["gemma4", "qwen35"])
def test_of_a_multimodal_folder_the_text_part_is_planned_and_said(
    arch: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder(arch), tmp_path / "multimodal"))
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type, model_class = known()[arch].multimodal
    whole = {"model_type": model_type, "architectures": [model_class], "vision_config": {}}
    del text["architectures"]
    (folder / "config.json").write_text(json.dumps({**whole, "text_config": text}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): values for name, values in weights.items()}
    other_parts = ("model.visual.patch", "model.vision_tower.norm", "model.embed_audio.norm", "mtp.norm")
    others = {f"{name}.weight": torch.zeros(64) for name in other_parts}
    save_file(renamed | others, folder / "model.safetensors")
    assert predict_header(folder) == predict_header(tiny_folder(arch))
    assert part_of(folder) == "the text part of multimodal"
    assert part_of(tiny_folder(arch)) == arch


def test_a_format_that_cannot_hold_the_architecture_is_refused(
    tiny_folder: Callable[[str], Path], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    for base in (tiny_folder("olmo2"), tiny_gguf("olmo2")):
        assert bases.find(make_recipe(tmp_path, base)) is not None
        with pytest.raises(IncompatibleError, match=r"onnx does not support .* .olmo2.: .*; leave out onnx"):
            bases.find(make_recipe(tmp_path, base, targets=["gguf", "onnx"]))


def test_a_damaged_or_cut_off_safetensors_file_is_an_error(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = (tiny_folder("llama") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    cut_off = (tiny_folder("llama") / "model.safetensors").read_bytes()[:-1]
    for content in (b"", b"short", (1 << 60).to_bytes(8, "little") + b"{}", bytes([2, *bytes(7)]) + b"[]", cut_off):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(VerificationError, match=r"is not a whole \.safetensors file; download the model again"):
            predict_header(tmp_path)


def test_packed_weights_of_a_quantization_are_an_error(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "gptq"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"gptq has packed weights of a quantization \(.*q_proj\.qweight\)"):
        predict_header(folder)


def test_a_weight_in_8_bits_without_its_scale_is_an_error(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "fp8"))
    tensors, names = load_file(folder / "model.safetensors"), ("q_proj", "k_proj")
    for name in (f"model.layers.0.self_attn.{part}.weight" for part in names):
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert predict_header(folder)
    del tensors["model.layers.0.self_attn.k_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"has model\.layers\.0\.self_attn\.k_proj\.weight in 8 bits without"):
        predict_header(folder)


def test_weights_that_are_no_regular_file_or_have_a_long_header_are_an_error(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = (tiny_folder("llama") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    weights.mkdir()
    with pytest.raises(VerificationError, match=r"model\.safetensors is not a regular file"):
        predict_header(tmp_path)
    weights.rmdir()
    weights.write_bytes((1 << 30).to_bytes(8, "little"))
    with weights.open("ab") as file:
        file.truncate(1 << 31)
    tracemalloc.start()
    with pytest.raises(VerificationError, match=r"is not a whole \.safetensors file"):
        predict_header(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


def test_the_needs_of_a_folder_are_those_of_its_file(
    tiny_folder: Callable[[str], Path], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"quantization": "q8_0", "targets": ["gguf", "onnx"]}
    of_folder, of_file = (needs_of(make_recipe(tmp_path, base("llama"), **keys)) for base in (tiny_folder, tiny_gguf))
    # A file brings its tokenizer.
    assert of_folder == replace(
        of_file,
        export_mb=pytest.approx(of_file.export_mb, abs=0.1),
        min_export_mb=pytest.approx(of_file.min_export_mb, abs=0.1),
        bundle_mb=pytest.approx(of_file.bundle_mb, abs=0.1),
        disk_mb=pytest.approx(of_file.disk_mb, abs=0.2),
        min_disk_mb=pytest.approx(of_file.min_disk_mb, abs=0.2),
        extra_formats_mb=pytest.approx(of_file.extra_formats_mb, abs=0.1),
    )


def test_a_head_size_of_null_is_the_width_per_head(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": None}), encoding="utf-8")
    assert needs_of(make_recipe(tmp_path, folder)) == needs_of(make_recipe(tmp_path, tiny_folder("llama")))


def test_needs_follow_from_what_the_recipe_asks_for(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    lora = needs_of(make_recipe(tmp_path, base))
    assert lora.extra_formats_mb == 0
    assert lora.bundle_mb == pytest.approx(base.stat().st_size / 1e6, rel=0.5)
    both = needs_of(make_recipe(tmp_path, base, targets=["gguf", "onnx"]))
    assert both.bundle_mb == pytest.approx(lora.bundle_mb + both.extra_formats_mb)
    assert both.disk_mb > both.min_disk_mb > both.bundle_mb > lora.bundle_mb
    assert both.export_mb > lora.export_mb
    assert both.parameters == read_header(base).parameters
    floats, in_int8 = (
        needs_of(make_recipe(tmp_path, base, targets=["gguf", "onnx"], quantization="f16", onnx={"weights": weights}))
        for weights in ("fp32", "int8")
    )
    # The weights once in the base's file and once in the other, in which a tied embedding is twice.
    weights_mb = both.parameters * 4 / 1e6
    assert 2 * weights_mb < floats.min_export_mb - PROCESS_MB < 3 * weights_mb
    assert floats.extra_formats_mb > 1.9 * (floats.bundle_mb - floats.extra_formats_mb) > in_int8.extra_formats_mb
    full, last = (needs_of(make_recipe(tmp_path, base, {"command": adapter_of(method)})) for method in TRAINS_BASE)
    assert full.training_mb > last.training_mb > lora.weights_mb
    assert full.bundle_mb > base.stat().st_size / 1e6
    chosen_later = {"command": adapter_of({"name": "lora", "target_modules": "auto"})}
    assert needs_of(make_recipe(tmp_path, base, chosen_later)) == lora


TRAINS_BASE = ("full", {"name": "last_layers", "layers": 1})


def test_the_bundle_is_about_as_large_as_predicted(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), {"command": adapter_of(**PLAIN)})
    result = build(recipe, tmp_path / "home", progress=QUIET)
    size = sum(path.stat().st_size for path in result.bundle.rglob("*") if path.is_file())
    assert needs_of(recipe).bundle_mb * 1e6 == pytest.approx(size, rel=0.2)
    left = sum(path.stat().st_size for path in tmp_path.glob("home.work/**/*") if path.is_file())
    with_work, without = build_needs.room_for(tmp_path / "home"), build_needs.room_for(tmp_path / "other/home")
    assert with_work.folder == tmp_path / "home"
    assert without.folder == tmp_path
    assert left > 0 and with_work.disk_mb > 0


def test_a_machine_with_room_for_all_gets_no_warning(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"))
    assert build_needs.check(recipe, NEEDS, PLENTY) == []
    assert build_needs.check(recipe, NEEDS, replace(PLENTY, memory_mb=None)) == []


@pytest.mark.parametrize(
    ("room", "error", "told"),
    [
        (
            {"memory_mb": 3000.2},
            IncompatibleError,
            "base 'BASE' of 1,700M parameters takes at least 6,800 MB of memory in float32, and 3,001 MB are free; "
            "close other programs, or choose a base of at most 575M parameters",
        ),
        (
            {"disk_mb": 1000.0},
            OutOfSpaceError,
            "building takes at least 3,000 MB of disk, and /data has 1,000 MB free; free 2,000 MB or choose another "
            "folder, or build targets: [gguf] alone, whose bundle is 900 MB smaller",
        ),
    ],
)
def test_a_build_without_enough_memory_or_disk_is_refused_with_a_remedy(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, room: dict[str, float], error: type[EdgetuneError], told: str
) -> None:
    base = tiny_gguf("llama")
    recipe = make_recipe(tmp_path, base, targets=["gguf", "onnx"])
    with pytest.raises(error) as raised:
        build_needs.check(recipe, NEEDS, replace(PLENTY, **room))
    assert str(raised.value) == told.replace("BASE", str(base))


def test_a_build_that_may_not_fit_is_a_warning(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"))
    disk, memory = build_needs.check(recipe, NEEDS, Room(Path("/data"), 8100.0, 5000.0))
    # The base's weights are mapped from disk too.
    assert disk == (
        "building takes up to 26,800 MB of disk, and /data has 5,000 MB free; free 21,800 MB or choose another folder"
    )
    # 1,700M parameters would fit.
    assert memory == (
        "export takes about 8,200 MB of memory, and 8,100 MB are free; close other programs, or use a smaller base, a "
        "lower r or fewer target_modules"
    )
    (disk,) = build_needs.check(recipe, NEEDS, Room(Path("/data"), 16000.0, 5000.0))
    assert disk.startswith("building takes up to 20,000 MB of disk")
    (memory,) = build_needs.check(recipe, NEEDS, Room(Path("/data"), 7000.0, 50000.0))
    assert memory.startswith("export takes about 8,200 MB")
    assert memory.endswith(", or choose a base of at most 1,575M parameters")
    assert build_needs.check(recipe, NEEDS, Room(Path("/data"), 9000.0, 50000.0)) == []


def test_plan_reports_the_needs(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    found = plan_build(make_recipe(tmp_path, tiny_gguf("llama")), tmp_path / "home").plan.to_json()["needs"]
    for key in ("memory_mb", "training_mb", "export_mb", "disk_mb", "bundle_mb", "free_disk_mb"):
        assert isinstance(found[key], int) and found[key] > 0, key
    assert found["summary"].startswith("memory about ")
    assert json.loads(json.dumps(found)) == found
    assert plan_build(make_recipe(tmp_path, Path("nobody/nothing"))).plan.needs is None


def test_the_time_is_predicted_where_a_speed_was_measured(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base, training = tiny_gguf("llama"), {"precision": "auto"}
    plan = plan_build(make_recipe(tmp_path, base, training=training)).plan
    full = plan_build(make_recipe(tmp_path, base, {"command": adapter_of("full")})).plan
    assert plan.source is not None and plan.source.shape is not None

    def time_on(*instruction_sets: str, device: TrainingDevice = CPU, of: BuildPlan = plan) -> TrainingTime | None:
        room = replace(PLENTY, device=device, instruction_sets=frozenset(instruction_sets))
        return build_needs.training_time(of, plan.source.shape, room)

    in_fp32, in_bf16 = time_on("avx2"), time_on("avx2", "avx512-bf16")
    assert in_fp32 is not None and in_bf16 is not None and in_fp32.max_s > 2 * in_bf16.max_s > 0
    on_gpu = time_on("avx2", device=TrainingDevice("cuda:0", "GPU", 1000.0, 1000.0))
    assert (on_gpu, time_on("neon"), time_on("avx2", of=full)) == (None, None, None)
    assert "training_s" not in json.dumps(plan.for_manifest())


def test_what_all_rows_begin_with_takes_its_time_once_per_step(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = {**adapter_of(), "system": "Be kind. " * 100}
    plan = plan_build(make_recipe(tmp_path, tiny_gguf("llama"), {"command": adapter}, context_length=512)).plan
    rows = plan.adapters["command"].rows
    assert plan.source is not None and plan.source.shape is not None and rows is not None
    assert rows.shared_tokens == 334
    apart = plan.with_adapters({"command": replace(plan.adapters["command"], rows=replace(rows, shared_tokens=0))})
    room = replace(PLENTY, instruction_sets=frozenset(["avx2"]))
    times = [build_needs.training_time(each, plan.source.shape, room) for each in (plan, apart)]
    once, often = times
    assert once is not None and often is not None and once.max_s * 2 < often.max_s


def test_folds_for_the_confidence_take_their_time_and_space(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base, room = tiny_gguf("llama"), replace(PLENTY, instruction_sets=frozenset(["avx2"]))
    found, data = [], {"rows.jsonl": lights(30)}
    for keys in ({}, {"confidence_folds": 4}):
        plan = plan_build(make_recipe(tmp_path, base, {"command": adapter_of(**keys)}, data=data)).plan
        assert plan.source is not None and plan.source.shape is not None
        time = build_needs.training_time(plan, plan.source.shape, room)
        assert time is not None
        found.append((time.max_s, build_needs.needs_of(plan, plan.source.shape, CPU).disk_mb))
    (time_s, disk_mb), (folds_s, folds_mb) = found
    assert folds_s == pytest.approx(4 * time_s)
    assert folds_mb > disk_mb


def test_a_build_reports_its_needs_before_any_work(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    first_line = Listening(stop_at="")
    with pytest.raises(KeyboardInterrupt):
        build(make_recipe(tmp_path, tiny_folder("llama")), tmp_path / "home", progress=first_line)
    assert first_line.lines[0].startswith("needs memory about ")
    assert not (tmp_path / "home.work").exists()


def test_the_memory_limit_of_the_recipe_counts(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base, long = tiny_gguf("llama"), {"batch_size": 4000, "max_steps": 4}
    free, limited = (
        needs_of(make_recipe(tmp_path, base, training=long | limit)) for limit in ({}, {"memory_mb": 1_000})
    )
    assert free.training_mb > free.min_training_mb == limited.min_training_mb
    assert limited.training_mb == max(limited.min_training_mb, min(1_000, free.training_mb))


def test_numbers_are_rounded_up() -> None:
    text = NeedsReport(replace(NEEDS, bundle_mb=0.2), replace(PLENTY, memory_mb=None)).summary
    assert "the bundle 1 MB of it" in text
    assert math.isclose(NEEDS.memory_mb, 15000)


def test_a_memory_limit_below_the_least_for_training_is_refused_before_any_work(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def recipe(limit_mb: int) -> Recipe:
        return make_recipe(tmp_path, tiny_gguf("llama"), training={"memory_mb": limit_mb})

    told = "training takes at least about 8,000 MB; set it to 8,000 or more"
    assert build_needs.check(recipe(8000), NEEDS, PLENTY) == []
    assert [told in warning for warning in build_needs.check(recipe(5000), NEEDS, PLENTY)] == [True]
    with pytest.raises(UsageError, match=f"training.memory_mb is 3,000, and {told}"):
        build_needs.check(recipe(3000), NEEDS, PLENTY)

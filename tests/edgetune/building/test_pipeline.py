from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_devices.needs import needs_of_header
from edgetune_export import parity
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest, sha256_of, verify_files
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving import jobs as serving_jobs
from edgetune_runtime.sizing.needs import needs_of_bundle
from edgetune_runtime.threads import machine
from peft import LoraConfig, get_peft_model
from recipes import PLAIN, adapter_of, lights, make_recipe, values_of, write_rows
from runtime.gguf_files import rewritten
from tiny import make_folder, make_tokenizer
from trainings import QUIET, Listening, modified
from transformers import AutoModelForCausalLM

from edgetune.bases import Base
from edgetune.building import builders
from edgetune.building.pipeline import build, export_trained
from edgetune.building.plan import plan_build
from edgetune.building.result import Build
from edgetune.cli.main import main
from edgetune.recipe.model import Recipe
from edgetune.recipe.output import OutputOption
from edgetune.report.facts import facts_of
from edgetune.report.render import page
from edgetune.training import jobs
from edgetune.training.plot import plot_training

QUESTION = "turn on the light 0"
COMPLETIONS = {"plain": "reply on", "scaled": "set red", "whole": "close the blind"}
ADAPTERS: dict[str, Any] = {
    "plain": {"system": "play", "method": {"name": "lora", "r": 4, "lora_alpha": 32}},
    "scaled": {
        "scale": 0.5,
        "method": {
            "name": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2, "down_proj": 9},
        },
    },
    "whole": {"merged": True, "method": {"name": "lora", "r": 4, "lora_alpha": 16}},
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A bundle of the three adapters, with what its build returned."""

    bundle: Path
    result: Build
    manifest: Manifest

    @property
    def training(self) -> Path:
        """The folder of the trainings."""
        return self.bundle.with_name(f"{self.bundle.name}.work") / "train"


def recipe_of(
    folder: Path,
    base: Path,
    names: tuple[str, ...] = ("plain", "scaled"),
    adapter: Mapping[str, object] = PLAIN,
    **keys: object,
) -> Recipe:
    """A recipe of these adapters, each with a completion of its own; `adapter` has more values of all of them."""
    data = {f"{name}.jsonl": lights(completions=(COMPLETIONS[name],)) for name in names}
    adapters = {name: adapter_of(train=f"{name}.jsonl", **ADAPTERS[name], **adapter) for name in names}
    return make_recipe(folder, base, adapters, data=data, **keys)


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    recipe = recipe_of(folder, tiny_gguf("llama"), ("plain", "scaled", "whole"))
    result = build(recipe, folder / "home", progress=QUIET)
    return Built(folder / "home", result, read_manifest(folder / "home"))


@pytest.fixture(scope="module")
def peft_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the tiny Qwen, saved by PEFT alone."""
    return save_random_adapter(tiny_folder("qwen3"), tmp_path_factory.mktemp("peft"))


def save_random_adapter(model: Path, out: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft.save_pretrained(out)
    return out


def test_the_bundle_answers_with_each_adapter(built: Built) -> None:
    with Runtime.open(built.bundle) as runtime:
        assert runtime.adapters == ["plain", "scaled", "whole"]
        answers = [runtime.generate(QUESTION, adapter=name, max_tokens=8).text for name in (None, *runtime.adapters)]
        assert len(set(answers)) == 4
        # And back: nothing of the others is left.
        assert runtime.generate(QUESTION, max_tokens=8).text == answers[0]


def test_a_base_with_recurrent_layers_is_trained_and_answers(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"quantization": "q8_0", "targets": ["gguf", "onnx"]}
    recipe = recipe_of(tmp_path, tiny_gguf("lfm2"), ("plain", "whole"), {}, **keys)
    result = build(recipe, tmp_path / "home", progress=QUIET)
    assert set(result.figures) == {"plain", "whole"}
    manifest = read_manifest(tmp_path / "home")
    assert (manifest.base.architecture, manifest.base.quantization) == ("lfm2", "q8_0")
    adapted = read_header(tmp_path / "home" / manifest.adapters["plain"].files["gguf"]).tensors
    assert any("shortconv" in name for name in adapted)
    header = read_header(tmp_path / "home" / manifest.base.files["gguf"])
    predicted = needs_of_header(header, context_length=manifest.context_length, engine="onnx").recurrent_bytes
    assert needs_of_bundle(tmp_path / "home", engine="onnx").recurrent_bytes == predicted > 0
    for engine in recipe.targets:
        with Runtime.open(tmp_path / "home", engine=engine) as runtime:
            answers = [runtime.generate(QUESTION, adapter=name, max_tokens=8).text for name in (None, "plain", "whole")]
            assert len(set(answers)) == 3
            assert runtime.generate(QUESTION, max_tokens=8).text == answers[0]


@pytest.mark.parametrize(
    ("keys", "method", "message"),
    [
        ({}, "prefix", r"adapter 'plain': prefix needs attention, which some layers .*; train it with lora"),
        ({"targets": ["onnx"]}, "bottleneck", r"'plain': bottleneck needs attention"),
        (
            {},
            {"name": "lora", "target_modules": "auto"},
            r"auto does not support the modules .*; list modules, of in_p",
        ),
    ],
    ids=str,
)
def test_what_a_base_with_recurrent_layers_cannot_have_is_refused(
    keys: dict[str, Any], method: object, message: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"plain": adapter_of(method)}
    recipe = make_recipe(tmp_path, tiny_gguf("lfm2"), adapters, data={"rows.jsonl": lights()}, **keys)
    progress = Listening()
    with pytest.raises((IncompatibleError, UsageError), match=message):
        build(recipe, tmp_path / "home", progress=progress)
    assert not progress.lines


def test_a_hybrid_that_llama_cpp_cannot_load_is_refused_before_training(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    # Torch would train it.
    more = {"blk.0.other.weight": np.ones((4, 64), np.float32)}
    recipe = make_recipe(tmp_path, rewritten(tiny_gguf("qwen35"), tmp_path / "base.gguf", tensors=more))
    with pytest.raises(VerificationError, match=r"cannot load .*wrong number of tensors.*; check the file, or update"):
        build(recipe, tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home.work/train").exists()


# The vocabulary of the tiny lfm2 has more bytes than its layers, in q8_0, and its convolutions are in f32.
@pytest.mark.parametrize(("arch", "merged"), [("llama", None), ("lfm2", "q4_0")])
def test_a_merged_model_in_4_bits_is_trained_on_the_bases_grid_and_keeps_its_size(
    arch: str, merged: str | None, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"quantization": "q4_0", "merged_quantization": merged, "targets": ["gguf", "onnx"]}
    recipe = recipe_of(tmp_path, tiny_gguf(arch), ("whole",), **keys)
    assert build(recipe, tmp_path / "home", progress=QUIET).figures["whole"]["val_loss"] < 6
    manifest = read_manifest(tmp_path / "home")
    entry, planned = manifest.adapters["whole"], manifest.plan["adapters"]["whole"]
    assert planned["on_grid"] and planned["bytes_by_format"]["gguf"] == manifest.plan["gguf_bytes"]
    for target in recipe.targets:
        # As close as an adapter beside the base must be.
        assert entry.parity[target]["kl"] < parity.TOLERANCE_KL["q4_0"]
        assert manifest.files[entry.files[target]].bytes == manifest.files[manifest.base.files[target]].bytes
    with pytest.raises(UsageError, match="whole is trained with weights rounded to q4_0, and not in int8"):
        plan_build(recipe_of(tmp_path, tiny_gguf(arch), ("whole",), **keys, training={"precision": "int8"}))


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_a_merged_model_in_the_quantization_of_the_base_is_trained_on_its_grid_though_it_is_named(
    arch: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "small.gguf"
    quantize_gguf(tiny_gguf(arch), file, "q4_0")

    def on_grid(base: Path, quantization: str | None, merged: str | None) -> bool:
        keys: dict[str, Any] = {"quantization": quantization, "merged_quantization": merged}
        return plan_build(recipe_of(tmp_path, base, ("whole",), **keys)).plan.adapters["whole"].on_grid

    for base, quantization in ((tiny_gguf(arch), "q4_0"), (file, None)):
        assert on_grid(base, quantization, "q4_0") and on_grid(base, quantization, None)
    # Another head is another quantization.
    assert not on_grid(file, "q4_0", "q4_0+q4_0")
    if arch == "llama":
        # The file ships as it is, and the merged model has its quantization.
        recipe = recipe_of(tmp_path, file, ("whole",), merged_quantization="q4_0")
        bundle = build(recipe, tmp_path / "home", progress=QUIET).bundle
        assert read_manifest(bundle).adapters["whole"].parity["gguf"]["kl"] < parity.TOLERANCE_KL["q4_0"]


def test_a_merged_model_whose_training_is_lost_to_rounding_is_refused(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"whole": adapter_of({"name": "dora", "r": 4}, merged=True)}
    keys = {"quantization": "q4_0", "merged_quantization": "q4_0", "training": {"learning_rate": 1e-3, "max_steps": 12}}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"rows.jsonl": lights()}, **keys)
    with pytest.raises(VerificationError, match="'whole' loses most of its training in a merged model in q4_0"):
        build(recipe, tmp_path / "home", progress=QUIET)


def test_the_rank_that_an_error_allows_is_a_guess_in_the_plan_and_told_once_it_is_known(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {"cut": adapter_of({"name": "dora", "r": 4, "max_error": 0.3}, golden=False)}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, training={"max_steps": 2})
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert re.search(r"rank about 64 .* about 0\.\d\d ", capsys.readouterr().out)
    listening = Listening()
    build(recipe, tmp_path / "home", progress=listening)
    (line,) = [line for line in listening.lines if "leaves out" in line]
    assert re.fullmatch(r"  cut: rank \d to \d, leaves out [12]\d\.\d% of the trained change", line)


def test_a_merged_model_in_float32_is_compared_as_one_of_the_type_that_it_was_rounded_to(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"merged_quantization": "q5_0", "targets": ["onnx"], "onnx": {"weights": "fp32"}}
    build(recipe_of(tmp_path, tiny_gguf("llama"), ("whole",), **keys), tmp_path / "home", progress=QUIET)
    kl = read_manifest(tmp_path / "home").adapters["whole"].parity["onnx"]["kl"]
    assert parity.TOLERANCE_KL_MERGED["f32"] < kl <= parity.TOLERANCE_KL_MERGED["q5_0"]


def test_the_plan_has_the_size_of_a_merged_model_in_its_own_quantization(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    # DoRA is not trained on a grid, so that one training does for all.
    adapters = {"whole": adapter_of({"name": "dora", "r": 4}, merged=True)}
    for merged in ("f16", "q8_0", None):
        keys = {"quantization": "q4_0", "merged_quantization": merged, "data": {"rows.jsonl": lights()}}
        recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, **keys)
        manifest = read_manifest(build(recipe, tmp_path / "home", progress=QUIET).bundle)
        written = manifest.files[manifest.adapters["whole"].files["gguf"]].bytes
        assert plan_build(recipe).plan.adapters["whole"].bytes_by_format["gguf"] == pytest.approx(written, rel=0.02)


def test_states_ship_with_the_bundle_and_are_found_there_whatever_the_weights(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    recipe = recipe_of(tmp_path / "data", tiny_gguf("llama"), ("plain", "scaled"), states="ship")
    assert build(recipe, tmp_path / "home", progress=QUIET) is not None
    manifest = read_manifest(tmp_path / "home")
    verify_files(tmp_path / "home", manifest)
    states = [name for name in manifest.files if name.startswith("states/")]
    assert all((tmp_path / "home" / name).stat().st_mode & 0o044 == 0o044 for name in (*states, "states"))
    for repack in (False, True):
        with Runtime.open(tmp_path / "home", disk_mb=0, repack=repack) as runtime:
            fixed = {name: loaded_bundle(runtime).call("?", name).job for name in (None, *runtime.adapters)}
            assert len(states) == sum(job.is_worth_a_state for job in fixed.values()) > 0
            for name, job in fixed.items():
                answer = runtime.generate(QUESTION, adapter=name, max_tokens=1)
                assert answer.timings.reused_tokens == (job.fixed if job.is_worth_a_state else 0)


def test_a_bundle_whose_prompts_are_too_short_for_a_state_ships_without_states(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_jobs, "SHORTEST", 16)
    recipe, listening = recipe_of(tmp_path, tiny_gguf("llama"), ("scaled",), states="ship"), Listening()
    build(recipe, tmp_path / "home", progress=listening)
    assert "  gguf: no prompt is long enough for a state" in listening.lines
    assert not [name for name in read_manifest(tmp_path / "home").files if name.startswith("states/")]


def test_the_figures_have_training_and_parity(built: Built) -> None:
    told = built.result.to_json()
    assert json.loads(json.dumps(told)) == told
    assert "domain" not in told and built.manifest.base.domain == {}
    assert (told["bundle"], list(told["adapters"])) == (str(built.bundle), ["plain", "scaled", "whole"])
    for name, figures in told["adapters"].items():
        limit = parity.TOLERANCE_KL_MERGED if name == "whole" else parity.TOLERANCE_KL
        assert 0 <= figures["parity"]["kl"] <= limit["f16"]
        assert (figures["parity"]["greedy"], figures["parity"]["rows"]) == (24, 2)
        assert (figures["steps"], figures["rows_too_long"], figures["precision"]) == (6, 0, "fp32")
        assert Path(figures["plot"]).read_bytes().startswith(b"\x89PNG")


def test_the_manifest_describes_base_and_adapters(built: Built, tiny_gguf: Callable[[str], Path]) -> None:
    adapters, plan = built.manifest.adapters, built.manifest.plan
    assert {name: item["target_modules"] for name, item in plan["adapters"].items()}["plain"] == "all-linear"
    assert plan["adapters"]["plain"]["trainable_parameters"] == adapters["plain"].training["trainable_parameters"]
    assert plan["needs"]["training_mb"] > 0 and "free_disk_mb" not in plan["needs"]
    assert built.manifest.base.fingerprint == sha256_of(tiny_gguf("llama"))
    # The default of 1024 gives way to what the base was trained for.
    assert built.manifest.context_length == 512
    assert {name: (entry.shapes["gguf"], entry.scale, entry.system) for name, entry in adapters.items()} == {
        "plain": ("low_rank", 1.0, "play"),
        "scaled": ("low_rank", 0.5, None),
        "whole": ("merged", 1.0, None),
    }
    # Nothing was asked for: the file is the tiny base as it was, and the merged model has its types.
    base, types = built.manifest.base, read_header(tiny_gguf("llama")).values_by_type
    assert (base.quantization, base.values_by_type, sum(types.values())) == (None, {"gguf": types}, base.parameters)
    assert (adapters["whole"].quantization, adapters["whole"].values_by_type) == (None, {"gguf": types})
    assert adapters["plain"].values_by_type["gguf"].keys() == {"f16", "f32"}
    assert sum(adapters["plain"].values_by_type["gguf"].values()) == adapters["plain"].training["trainable_parameters"]
    assert list(adapters["plain"].modules_by_rank) == [4]
    assert adapters["scaled"].modules_by_rank == {2: base.layers, 9: base.layers, 4: 5 * base.layers}
    for name, entry in adapters.items():
        figures = built.result.figures[name]
        assert entry.parity["gguf"] == figures["parity"]
        assert entry.training["val_loss"] == figures["val_loss"]
    assert str(built.bundle.parent) not in (built.bundle / "manifest.json").read_text(encoding="utf-8")


def test_a_second_build_trains_nothing_and_draws_a_plot_that_is_missing(
    built: Built, tiny_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, listening = modified(built.training), Listening()
    plot = built.training / "plain" / "training.png"
    plot.unlink()
    monkeypatch.setattr(jobs, "plot_training", plot_training)
    recipe = recipe_of(built.bundle.parent, tiny_gguf("llama"), ("plain", "scaled", "whole"))
    again = build(recipe, built.bundle, progress=listening)
    assert again is not None
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert modified(built.training) == before | {"plain/training.png": plot.stat().st_mtime_ns}
    assert not any("loading the base" in line for line in listening.lines)
    assert again == built.result


def test_a_resumed_build_trains_only_new_or_changed_adapters(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    out, training = tmp_path / "home", tmp_path / "home.work/train"
    recipe = recipe_of(tmp_path, tiny_gguf("llama"))
    with pytest.raises(KeyboardInterrupt):
        build(recipe, out, progress=Listening(stop_at="plain: validation loss"))
    assert [path.name for path in training.iterdir()] == ["plain"]
    assert not out.exists()
    first = modified(training / "plain")
    build(recipe, out, progress=QUIET)
    assert modified(training / "plain") == first
    second = modified(training / "scaled")

    write_rows(tmp_path / "scaled.jsonl", lights(completions=("stop",)))
    build(recipe, out, progress=QUIET)
    assert modified(training / "plain") == first
    assert modified(training / "scaled")["result.json"] > second["result.json"]


def test_another_seed_or_a_row_moved_to_validation_makes_another_training(tiny_base: Callable[[str], Base]) -> None:
    base, rows, keys = tiny_base("llama"), lights(10), set[str]()
    for count, seed in ((8, 0), (6, 0), (8, 1)):
        adapter = {"data": {"train": rows[:count], "validation": rows[count:]}, "training": {"seed": seed}}
        recipe = Recipe.from_dict(values_of(base.path, {"plain": adapter}))
        planned = plan_build(recipe)
        (prepared,) = builders.load(recipe.task).jobs(planned.plan, planned.tasks, base, QUIET)
        keys.add(prepared.job.key)
    assert len(keys) == 3


def test_an_adapter_that_fails_parity_is_named_and_the_last_bundle_stays(
    built: Built, tiny_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCE_KL, "f16", -1.0)
    monkeypatch.setattr(parity, "TOLERANCE_KL_FILE", {"f16": -1.0, "f32": -1.0})
    before = modified(built.bundle)
    recipe = recipe_of(built.bundle.parent, tiny_gguf("llama"), ("plain", "scaled", "whole"))
    with pytest.raises(VerificationError, match="adapter 'plain' does not match the trained model"):
        build(recipe, built.bundle, progress=QUIET)
    assert modified(built.bundle) == before


def test_one_training_ships_in_both_formats(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    listening = Listening()
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), quantization="q4_0", targets=["gguf", "onnx"])
    result = build(recipe, tmp_path / "home", progress=listening)
    manifest = read_manifest(tmp_path / "home")
    assert manifest.base.quantization == manifest.recipe["quantization"] == "q4_0"
    types = manifest.base.values_by_type
    assert set(types["gguf"]) == {"f32", "q4_0", "q8_0"}
    # The graph has the same blocks; besides norms, its f32 values are the tables of rotary embeddings.
    assert (types["onnx"]["int4"], types["onnx"]["int8"]) == (types["gguf"]["q4_0"], types["gguf"]["q8_0"])
    assert types["onnx"]["f32"] > types["gguf"]["f32"]
    adapter = manifest.adapters["plain"].values_by_type
    assert (set(adapter["gguf"]), set(adapter["onnx"])) == ({"f16", "f32"}, {"f32"})
    assert set(manifest.base.files) == set(manifest.adapters["plain"].files) == {"gguf", "onnx"}
    assert set(manifest.base.parity) == {"gguf", "onnx", "gguf/onnx"}
    assert manifest.base.parity["gguf/onnx"]["kl"] < 0.01
    assert set(result.figures["scaled"]["parity_by_target"]) == {"gguf", "onnx"}
    assert not [line for line in listening.lines if "warning" in line]
    answers = []
    for engine in ("gguf", "onnx"):
        with Runtime.open(tmp_path / "home", engine=engine) as runtime:
            answers.append([runtime.generate("turn on", adapter=name, max_tokens=3).text for name in runtime.adapters])
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("forked_converter")
def test_a_folder_is_converted_and_quantized_once_to_what_its_board_picks(
    tiny_folder: Callable[[str], Path], slow_board: Callable[..., str], tmp_path: Path
) -> None:
    recipe, work, listening = (
        recipe_of(tmp_path, tiny_folder("llama"), device=slow_board(), threads=None),
        tmp_path / "w",
        Listening(),
    )
    plan = plan_build(recipe).plan
    make_base = builders.load(recipe.task).make_base
    base = make_base(plan, work, listening, None)
    assert (plan.recipe.quantization, base.quantization, plan.recipe.threads) == ("q4_0", "q4_0", 4)
    name = tiny_folder("llama").name
    assert listening.lines == [f"converting {name} to GGUF", f"quantizing {name} to q4_0"]
    assert [path.name for path in (work / "base").iterdir()] == [base.path.name]
    # With a converter that does not exist, only what is kept can be taken.
    assert make_base(plan, work, QUIET, tmp_path / "no converter") == base


def test_a_folder_that_its_board_cannot_hold_is_refused_before_it_is_converted(
    tiny_folder: Callable[[str], Path], slow_board: Callable[..., str], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_folder("llama"), device=slow_board(ram_free_mib=40))
    with pytest.raises(IncompatibleError, match="slow leaves 42 MB"):
        build(recipe, tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home.work").exists()


def test_more_context_than_the_base_takes_is_refused_before_training(
    tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), context_length=513)
    with pytest.raises(UsageError, match=r"context_length is 513, but .* supports at most 512 tokens; set it to at"):
        build(recipe, tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home.work/train").exists()


def test_rows_that_are_too_long_are_left_out_and_told(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), ("scaled",), context_length=96)
    long = {"prompt": "turn on the light " * 40, "completion": "set red"}
    write_rows(tmp_path / "scaled.jsonl", [*lights(), long])
    listening = Listening(stop_at="loading the base")
    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "home", progress=listening)
    needs, warning, device, first = listening.lines[:4]
    assert needs.startswith("needs memory about ")
    assert warning.startswith("warning: scaled: rows have up to ")
    assert device.startswith("trains on ")
    assert first.startswith("scaled: 1 rows are longer than 96 tokens: ")
    assert "scaled.jsonl:11" in first


@pytest.mark.parametrize("merged", [False, True])
def test_a_folder_that_peft_saved_is_bundled(
    merged: bool, peft_folder: Path, tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    base = tiny_base("qwen3")
    folders = {"first": peft_folder, "second": peft_folder}
    result = export_trained(
        str(base.path), folders, tmp_path / "home", systems={"second": "play"}, merged=merged, progress=QUIET
    )
    assert list(result.figures) == ["first", "second"]
    limit = (parity.TOLERANCE_KL_MERGED if merged else parity.TOLERANCE_KL)["f16"]
    assert all(figures["parity"]["kl"] <= limit for figures in result.figures.values())
    entries = read_manifest(tmp_path / "home").adapters
    assert {shape for entry in entries.values() for shape in entry.shapes.values()} == {
        "merged" if merged else "low_rank"
    }
    with Runtime.open(tmp_path / "home") as runtime:
        plain, first, second = (
            runtime.generate("what is the time", adapter=name, max_tokens=8).text for name in (None, "first", "second")
        )
    assert len({plain, first, second}) == 3


def test_a_base_in_the_bundle_that_would_be_replaced_is_refused(
    built: Built, peft_folder: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(built.bundle, tmp_path / "home"))
    (base,) = (bundle / "base").glob("*.gguf")
    recipe = recipe_of(tmp_path / "own", base)
    with pytest.raises(UsageError, match=r"is in the bundle .*home, which would be replaced; choose another --out"):
        build(recipe, bundle, progress=QUIET)
    with pytest.raises(UsageError, match="which would be replaced"):
        export_trained(str(base), {"first": peft_folder}, bundle, progress=QUIET)
    assert read_manifest(bundle) == read_manifest(built.bundle) and base.exists()


def test_an_adapter_of_another_base_is_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    narrow = make_folder("llama", tmp_path / "narrow", make_tokenizer(tmp_path), hidden_size=32)
    adapter = save_random_adapter(narrow, tmp_path / "adapter")
    with pytest.raises(IncompatibleError, match="'other'") as caught:
        export_trained(str(tiny_gguf("llama")), {"other": adapter}, tmp_path / "home", progress=QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_a_folder_without_weights_ends_an_export_before_its_base_is_read(peft_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(peft_folder, tmp_path / "copy")
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=f"^{copy} has no adapter_model.safetensors; "):
        export_trained("nowhere", {"other": copy}, tmp_path / "home", progress=QUIET)
    assert [*tmp_path.iterdir()] == [copy]


def test_an_export_maps_the_base_where_memory_is_short(
    tiny_base: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, said, written = ("plain", "whole"), [], []
    recipe = recipe_of(tmp_path, tiny_base("llama").path, names, targets=["gguf", "onnx"])
    for free_mb in (8000.0, 600.0):
        monkeypatch.setattr(machine, "free_mb", lambda free_mb=free_mb: free_mb)
        progress = Listening()
        build(recipe, tmp_path / "home", progress=progress)
        said.append([line for line in progress.lines if line.startswith("mapping the base")])
        written.append(read_manifest(tmp_path / "home").files)
    assert said == [[], ["mapping the base's weights from disk, because only 600 MB of memory are free"]]
    assert written[0] == written[1]


def test_a_bundle_has_the_output_constraint_and_the_draft_table_of_its_task(
    tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_base("llama").path, ("plain",), {})
    write_rows(tmp_path / "plain.jsonl", lights(completions=[{"set": "red", "to": number} for number in range(10)]))
    plain = recipe.adapters["plain"].model_copy(update={"output": OutputOption.model_validate("auto")})
    built = build(recipe.model_copy(update={"adapters": {"plain": plain}}), tmp_path / "home", progress=QUIET)
    assert built.figures["plain"]["draft_tokens_per_step"] > 1.1
    entry = read_manifest(tmp_path / "home").adapter("plain")
    assert entry.draft == "adapters/plain/draft.bin"
    assert entry.output is not None
    assert entry.output["schema"]["properties"] == {"set": {"enum": ["red"]}, "to": {"type": "integer"}}
    with Runtime.open(tmp_path / "home") as runtime:
        answer = runtime.generate(QUESTION, adapter="plain", max_tokens=60)
        assert answer.text.startswith('{"set": "red", "to": ')
        assert answer.timings.forced > 0


def test_a_bundle_with_a_router_chooses_the_adapter(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    rooms = ("hall", "kitchen", "study", "attic", "garage", "bedroom", "cellar", "nursery", "bath", "garden")
    rows = {
        "lamps.jsonl": [{"prompt": f"turn on the lamp in the {room}", "completion": "on"} for room in rooms],
        "songs.jsonl": [{"prompt": f"play a song in the {room}", "completion": "la"} for room in rooms],
    }
    adapters = {name: adapter_of(train=f"{name}.jsonl") for name in ("lamps", "songs")}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data=rows, route=True)
    listening = Listening()
    result = build(recipe, tmp_path / "home", progress=listening)
    said = "router: generate chooses among lamps, songs: 100.0% of lamps"
    assert any(line.startswith(said) for line in listening.lines)
    assert result.to_json()["router"]["calls"]["generate"]["right"] == {"lamps": 1.0, "songs": 1.0}
    assert "The router" in (tmp_path / "home" / "README.md").read_text(encoding="utf-8")
    assert "the base answers" in page(facts_of(tmp_path / "home", read_manifest(tmp_path / "home")), [])
    with result.open() as runtime:
        prompts = ("turn on the lamp in the shed", "play a song in the shed", "why is the sky blue")
        routes = [runtime.generate(prompt, adapter="auto", max_tokens=1).route for prompt in prompts]
    assert [route and route.adapter for route in routes] == ["lamps", "songs", None]

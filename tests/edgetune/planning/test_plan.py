from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats import gguf_file
from recipes import adapter_of, lights, make_recipe, write_rows

from edgetune import bases, methods
from edgetune.building.plan import plan_build, with_quantization
from edgetune.planning.adapters import with_options
from edgetune.planning.board import choose_settings
from edgetune.planning.build import plan_bundle
from edgetune.planning.records import BuildPlan
from edgetune.planning.training import choose_training
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, Metric
from edgetune.recipe.targets import shapes_of
from edgetune.recipe.training import TrainingSpec


def recipe_of(folder: Path, base: Path | str, method: object = "lora", **keys: object) -> Recipe:
    data = {"rows.jsonl": lights(20, ("reply 0", "reply 1"))}
    return make_recipe(folder, base, {"command": adapter_of(method, output="auto")}, data=data, **keys)


def bundle_of(recipe: Recipe) -> BuildPlan:
    return plan_bundle(recipe, bases.find(recipe), shapes_of(recipe))


@pytest.mark.parametrize(
    ("keys", "steps"),
    [({}, ["convert to GGUF", "quantize to q8_0"]), ({"quantization": "f16"}, ["convert to GGUF f16"])],
)
def test_a_plan_lists_the_conversions_of_a_folder(
    tiny_folder: Callable[[str], Path], tmp_path: Path, keys: dict[str, str], steps: list[str]
) -> None:
    base = bundle_of(recipe_of(tmp_path, tiny_folder("llama"), **keys)).base
    assert list(base.steps) == steps
    assert (base.architecture, base.trained_context_length) == ("llama", 512)


def test_a_file_ships_unchanged_or_is_requantized(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    unchanged, smaller = (bundle_of(recipe_of(tmp_path, base, quantization=name)).base for name in (None, "q4_0"))
    assert (unchanged.steps, unchanged.gguf_bytes) == ((), pytest.approx(base.stat().st_size, rel=0.01))
    for name in ("Base.GGUF", "sha256-0f"):
        copy = Path(shutil.copy(base, tmp_path / name))
        assert bundle_of(recipe_of(tmp_path, copy)).base.steps == ()
    assert smaller.steps == ("requantize to q4_0",) and (smaller.gguf_bytes or 0) < (unchanged.gguf_bytes or 0)


def test_a_plan_without_data_has_shapes_and_sizes_by_format(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"name": "lora", "r": 4}, targets=["gguf", "onnx"])
    (tmp_path / "rows.jsonl").unlink()
    adapter = bundle_of(recipe).adapters["command"]
    assert (adapter.rank, adapter.to_json()["modules"], adapter.rows) == (4, 14, None)
    assert adapter.shapes == {"gguf": "low_rank", "onnx": "low_rank"}
    assert 0 < adapter.bytes_by_format["gguf"] < adapter.bytes_by_format["onnx"]


def test_chosen_modules_change_the_sizes(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    plan = bundle_of(recipe_of(tmp_path, tiny_gguf("llama"), {"name": "lora", "r": 8, "target_modules": "auto"}))
    assert plan.source is not None
    auto, options = plan.adapters["command"], methods.load("lora").options(r=2, target_modules=("o_proj",))
    chosen = with_options(auto, options, plan.source.shape)
    assert (auto.target_modules, auto.rank, chosen.target_modules, chosen.rank) == ("auto", 8, ("o_proj",), 2)
    assert chosen.to_json()["modules"] == 2 and 20 * chosen.bytes_by_format["gguf"] < auto.bytes_by_format["gguf"]
    completed = plan.with_adapters({"command": chosen})
    assert completed.recipe.adapters["command"].method.options == options


def test_a_plan_and_its_change_of_quantization_read_the_header_once(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reading = list[Path](), gguf_file.reading
    monkeypatch.setattr(gguf_file, "reading", lambda path: read.append(path) or reading(path))
    recipe, base = recipe_of(tmp_path, tiny_gguf("llama"), device="pi-4", targets=["gguf", "onnx"]), tiny_gguf("llama")
    planned = with_quantization(plan_build(recipe), "q4_0", tmp_path / "home")
    assert planned.plan.base.quantization == "q4_0"
    assert read == [base]
    # The longest context that the board's choice tries is that which the base was trained for.
    board = planned.plan.board
    assert board is not None and "with a context of 512 tokens is the best that fits" in board.reason


def test_every_adapter_with_modules_that_the_base_lacks_is_named(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = {"keys": "ia3", "queries": {"name": "lora", "target_modules": ["q_proj"]}, "all": "lora"}
    recipe = make_recipe(tmp_path, tiny_gguf("phi3"), {name: adapter_of(method) for name, method in chosen.items()})
    with pytest.raises(UsageError) as refused:
        bundle_of(recipe)
    of_keys, of_queries = str(refused.value).splitlines()
    remedy = "set target_modules to all-linear, or to some of down_proj, gate_up_proj, lm_head, o_proj, qkv_proj"
    assert of_keys.startswith("adapter 'keys': the base has no module 'k_proj'; ") and of_keys.endswith(remedy)
    assert of_queries.startswith("adapter 'queries': the base has no module 'q_proj'; ")


def test_more_last_layers_than_the_base_has_are_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"name": "last_layers", "layers": 3})
    with pytest.raises(UsageError, match="adapter 'command': layers is 3, but the base has 2; set layers to 2 or"):
        bundle_of(recipe)


def test_the_rows_decide_metric_output_and_steps(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    planned = plan_build(
        recipe_of(tmp_path, tiny_gguf("llama"), training={"max_steps": None, "epochs": 2, "batch_size": 8})
    )
    adapter = planned.plan.adapters["command"]
    assert adapter.output is not None and adapter.output.kind == "choices"
    assert adapter.rows is not None
    assert (adapter.metric, adapter.rows.train, adapter.rows.validation, adapter.rows.steps) == ("exact", 16, 4, 4)
    assert adapter.rows.longest_tokens >= adapter.rows.mean_tokens > adapter.rows.shared_tokens == 0
    assert [len(task.train) for task in planned.tasks] == [16]


def test_what_is_odd_about_the_rows_is_a_warning_of_the_plan(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    write_rows(tmp_path / "copy.jsonl", lights(20))
    data = {"train": "rows.jsonl", "validation": "copy.jsonl"}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), {"command": {"data": data}}, data={"rows.jsonl": lights(20)})
    (warning,) = plan_build(recipe).plan.warnings
    assert warning.startswith("command: 20 of 20 validation rows have the prompt of a training row, such as ")
    _, warning = plan_build(recipe.model_copy(update={"context_length": 40})).plan.warnings
    assert warning.startswith("command: rows have up to 47 tokens, and those of more than 40 are left out; see")


def test_rows_of_an_encoder_have_no_chat_template(tiny_encoder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"text": f"light {n}", "label": ("on", "off")[n % 2]} for n in range(20)]
    adapters = {"power": adapter_of(train="rows.jsonl")}
    data, task = {"rows.jsonl": rows}, "text-classification"
    recipe = make_recipe(tmp_path, tiny_encoder("bert"), adapters, data=data, task=task, context_length=16)
    assert not any("are left out" in warning for warning in plan_build(recipe).plan.warnings)


def test_rows_of_one_label_are_refused_unless_out_of_scope_adds_another(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"text": f"light {number}", "label": "on"} for number in range(20)]
    alone, scoped = (
        make_recipe(tmp_path, tiny_gguf("llama"), {"a": adapter_of(out_of_scope=scope)}, data={"rows.jsonl": rows})
        for scope in (None, True)
    )
    assert plan_build(scoped).plan.adapters["a"].labels == ("on", "out_of_scope")
    with pytest.raises(UsageError, match="adapter 'a': all rows have the label 'on'; add rows of another label"):
        plan_build(alone)


def test_plain_texts_without_the_invocation_of_alora_are_refused_before_the_base_is_made(tmp_path: Path) -> None:
    texts = [f"turn the lamp {number} on" for number in range(20)]
    rendered = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nok<|im_end|>" for text in texts]
    data = {"rows.jsonl": [{"text": text} for text in texts], "chats.jsonl": [{"text": text} for text in rendered]}
    by_default, by_text, of_chats = (
        make_recipe(
            tmp_path,
            "org/not-downloaded",
            {"a": adapter_of(train=rows, method={"name": "alora", **options})},
            data=data,
        )
        for rows, options in (("rows.jsonl", {}), ("rows.jsonl", {"invocation": " lamp"}), ("chats.jsonl", {}))
    )
    for recipe in (by_text, of_chats):
        assert plan_build(recipe).plan.adapters["a"].method == "alora"
    told = "adapter 'a': 20 rows of plain text, such as .*rows.jsonl:.*, have nothing to learn after the invocation, .*"
    with pytest.raises(UsageError, match=f"{told}; set invocation to a text in every prompt"):
        plan_build(by_default)


def test_a_base_that_is_not_downloaded_has_no_quantizations_to_measure_yet(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "org/base", quantization="auto")
    base = choose_settings(recipe, {}, None).base
    assert base.candidates == () and base.steps == ("download", "measure quantizations", "use the best one")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path / "none.gguf", "bottleneck")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(NotFoundError) as raised:
        plan_build(recipe)
    lines = str(raised.value).splitlines()
    assert [word in line for word, line in zip(("no base", "bottleneck", "no data file"), lines, strict=True)] == [
        True,
        True,
        True,
    ]


def test_what_answers_unsure_answers_is_in_the_recipe_or_in_the_bundle(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def planned(unsure: str, others: Mapping[str, AdapterSpec] | None = None, in_bundle: Collection[str] = ()) -> str:
        adapters = {"a": adapter_of(held_out=0.5, min_confidence=0.8, unsure=unsure)}
        recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"rows.jsonl": lights(60)})
        return plan_build(recipe, None, others, in_bundle).plan.recipe.adapters["a"].unsure

    other = make_recipe(tmp_path, tiny_gguf("llama"), {"b": adapter_of()}).adapters
    assert planned("b", other) == "b"
    # An adapter that was trained elsewhere has no recipe.
    assert planned("c", other, {"a", "b", "c"}) == "c"
    for name, remedy in (("bass", "did you mean 'base'"), ("a", "choose one of"), ("b", "choose one of")):
        with pytest.raises(UsageError, match=f"adapter 'a': unsure is '{name}'; {remedy}"):
            planned(name, in_bundle={"a"})


def test_files_that_the_training_reads_are_checked_by_the_plan(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    for name in ("half", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 32}', encoding="utf-8")
    (tmp_path / "cut/adapter_model.safetensors").write_bytes(bytes(7))
    adapters = {
        "a": adapter_of({"name": "cartridge", "document": "none.txt"}),
        "b": adapter_of({"name": "cartridge", "document": "blank.txt"}),
        "c": adapter_of(start_from="nowhere"),
        "d": adapter_of(start_from="half"),
        "e": adapter_of(start_from="cut"),
        "f": adapter_of(start_from="home.work/train/e/adapter"),
    }
    data = {"rows.jsonl": lights(20, ("reply 0", "reply 1"))}
    with pytest.raises(NotFoundError) as caught:
        plan_build(make_recipe(tmp_path, tiny_gguf("llama"), adapters, data=data), tmp_path / "home")
    missing, blank, nowhere, half, cut, own = str(caught.value).splitlines()
    assert f"no document {tmp_path / 'none.txt'}" in missing
    assert f"the document {tmp_path / 'blank.txt'} is empty; give a file with the text to learn" in blank
    assert f"{tmp_path / 'nowhere'} is not a PEFT adapter" in nowhere
    assert f"{tmp_path / 'half'} has no adapter_model.safetensors" in half
    assert f"{tmp_path / 'cut/adapter_model.safetensors'} is not a safetensors file" in cut
    assert f"start_from is {tmp_path / 'home.work/train/e/adapter'}, which this build replaces" in own


def test_the_manifest_stores_no_path_and_nothing_of_this_machine(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = json.dumps(plan_build(recipe_of(tmp_path, tiny_gguf("llama")), tmp_path / "home").plan.for_manifest())
    assert str(tmp_path) not in stored and str(tiny_gguf("llama").parent) not in stored
    assert "free_" not in stored and '"trainable_parameters"' in stored


def auto_plan(folder: Path, base: Path, **training: object) -> BuildPlan:
    adapters = {"command": adapter_of(training="auto")}
    recipe = make_recipe(folder, base, adapters, data={"rows.jsonl": lights(20)})
    return plan_build(recipe.model_copy(update={"training": TrainingSpec.model_validate(training)})).plan


def test_auto_training_follows_the_rows_and_is_in_the_plan(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    plan = auto_plan(tmp_path, tiny_gguf("llama"), seed=5)
    adapter = plan.adapters["command"]
    assert adapter.rows is not None
    assert (adapter.training.epochs, adapter.training.batch_size, adapter.training.seed) == (20, 4, 5)
    assert (adapter.training.patience, adapter.training.checkpoint) == (None, "last")
    assert adapter.rows.steps == 80
    assert adapter.training_reason == "epochs 20, batch_size 4, patience null, checkpoint last: for 16 training rows"
    stored = plan.for_manifest()["adapters"]["command"]
    assert stored["training_reason"] == adapter.training_reason
    again = plan.recipe.training.under(plan.recipe.adapters["command"].training)
    assert (again, again.auto) == (adapter.training, False)


def test_auto_training_lowers_the_learning_rate_for_wide_bases() -> None:
    rates = {
        width: choose_training(TrainingSpec(auto=True), 100, width, "json")[0].learning_rate
        for width in (None, 64, 576, 896, 2048)
    }
    assert rates == {None: 1e-3, 64: 1e-3, 576: 1e-3, 896: 6.4e-4, 2048: 2.8e-4}
    training, reason = choose_training(TrainingSpec(auto=True, learning_rate=2e-3), 100, 2048, "json")
    assert training.learning_rate == 2e-3
    assert "width" not in reason


def test_auto_training_ships_the_last_checkpoint_of_answers() -> None:
    metrics: tuple[Metric, ...] = ("json", "rouge_l", "label", "perplexity")
    specs = [choose_training(TrainingSpec(auto=True), 50, None, metric)[0] for metric in metrics]
    assert [(spec.checkpoint, spec.patience) for spec in specs] == [("last", None)] * 3 + [("best", 3)]
    stopping, whole = (TrainingSpec(auto=True, patience=patience) for patience in (5, None))
    specs = [choose_training(options, 50, None, "json")[0] for options in (stopping, whole)]
    assert [(spec.checkpoint, spec.patience) for spec in specs] == [("best", 5), ("last", None)]


def test_auto_training_keeps_what_the_recipe_sets(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = auto_plan(tmp_path, tiny_gguf("llama"), epochs=2, learning_rate=5e-3).adapters["command"]
    assert (adapter.training.epochs, adapter.training.batch_size, adapter.training.learning_rate) == (2, 4, 5e-3)
    assert adapter.training_reason == "batch_size 4, patience null, checkpoint last: for 16 training rows"

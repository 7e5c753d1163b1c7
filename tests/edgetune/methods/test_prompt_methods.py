from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters.shapes import Prefix
from edgetune_runtime.errors import CancelledError, IncompatibleError, NotFoundError, UsageError
from pydantic import ValidationError
from recipes import adapter_of, make_recipe
from safetensors.torch import load_file
from tiny import make_model
from torch.nn.functional import cross_entropy
from trainings import QUIET, SHORT, VOCABULARY, job_of, learn, random_row, stopped_and_resumed
from transformers import DynamicCache, PreTrainedModel

from edgetune import methods
from edgetune.methods import Checkpoint
from edgetune.methods.common.base import trainable
from edgetune.methods.common.distill import Distill, Lesson
from edgetune.methods.common.prompt_model import GivenTokensModel, split_states
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.objectives.packing import take_packed_rows
from edgetune.training.int8 import in_int8
from edgetune.training.job import TrainingJob
from edgetune.training.loop import train

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix of a network": {"name": "prefix", "prefix_projection": True},
    "prompt": {},
    "p_tuning": {},
    "cartridge": {"num_virtual_tokens": 16},
    "p_tuning by an LSTM": {"name": "p_tuning", "encoder_reparameterization_type": "LSTM"},
}
BaseOf = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module")
def base_of() -> BaseOf:
    """`base_of(arch)`: a tiny base; gemma3's window is 16, less than the 20 positions of a prefix."""
    return cache(lambda arch: make_model(arch, VOCABULARY))


ROWS = {
    "rows of different lengths": [random_row(1, 40, (), 36), random_row(2, 9, (), 5), random_row(3, 23, (), 19)],
    "rows with a shared beginning": [random_row(n, 18 + 9 * n, range(10, 22), 14 + 9 * n) for n in range(3)],
}


class Letters:
    """A token a letter."""

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def method_of(case: str, **more: object) -> tuple[Any, Any]:
    """The method of one of `METHODS` with its options, ready for a training."""
    given = {**METHODS[case], **more}
    method = methods.load(str(given.pop("name", case)))
    options = method.options.model_validate(given)
    return method, method.prepared(options, Letters(), [Example(tuple(range(30, 42)), (False,) * 12, 1)])


@contextmanager
def attached(case: str, base: PreTrainedModel, **more: object) -> Iterator[Any]:
    method, options = method_of(case, **more)
    torch.manual_seed(1)
    model = method.attach(base, options, 10)
    yield model
    method.detach(model)


def loss_packed(base: PreTrainedModel, model: Any, rows: Sequence[Example]) -> torch.Tensor:  # noqa: ANN401 - as attached
    take_packed_rows(base)
    batch = NEXT_TOKEN.batch(rows)
    loss = NEXT_TOKEN.loss(model, model, batch) / len(batch.targets)
    base.set_attn_implementation("sdpa")
    return loss


def loss_alone(model: Any, rows: Sequence[Example]) -> torch.Tensor:  # noqa: ANN401 - with PEFT around it
    """The mean over all learned tokens, each row run by itself with transformers' own attention."""
    logits = torch.cat([model(torch.tensor([row.tokens])).logits[0, -5:-1] for row in rows])
    return cross_entropy(logits, torch.tensor([row.tokens[-4:] for row in rows]).flatten())


DOCUMENT = "".join(chr(60 + number * number % 97) for number in range(150))


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("case", METHODS)
def test_packed_rows_have_the_loss_of_pefts_own_forward(case: str, arch: str, rows: str, base_of: BaseOf) -> None:
    base = base_of(arch)
    with attached(case, base) as model:
        packed, alone = loss_packed(base, model, ROWS[rows]), loss_alone(GivenTokensModel(model.peft), ROWS[rows])
        assert packed.item() == pytest.approx(alone.item(), abs=1e-4)
        parameters = [p for _, p in trainable(model)]
        pairs = zip(*(torch.autograd.grad(loss, parameters) for loss in (packed, alone)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            assert a.abs().max() > 0


def job(case: str, method_options: dict[str, Any] | None = None, **training: object) -> TrainingJob[Example]:
    method, prepared = method_of(case, **(method_options or {}))
    return job_of(method, prepared, SHORT, **{"max_steps": 30, "learning_rate": 1e-2, "patience": 3, **training})


def checkpoint_of(done: TrainingJob[Example], base: PreTrainedModel, folder: Path, scale: float = 1.0) -> Checkpoint:
    return Checkpoint("reply", folder / "adapter", base, done.options, scale)


def states_in(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load_file(folder / "adapter/adapter_model.safetensors")["prompt_embeddings"]
    return found


def mean_loss(model: Any, rows: Sequence[Example]) -> float:  # noqa: ANN401 - with PEFT around it
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row.tokens])).logits[0, 4:7] for row in rows])
    return cross_entropy(logits, torch.tensor([row.tokens[5:] for row in rows]).flatten()).item()


@pytest.mark.parametrize("case", ["prefix of a network", "cartridge", "p_tuning by an LSTM"])
def test_a_training_learns_and_leaves_the_base_as_it_was(case: str, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama")
    modules = [(name, type(module)) for name, module in base.named_modules()]
    done = job(case)
    result = learn(base, done, tmp_path)
    assert result.val_loss < 0.8 * mean_loss(base, done.validation)
    with done.method.loaded(checkpoint_of(done, base, tmp_path)) as model:
        assert mean_loss(model, done.validation) == pytest.approx(result.val_loss, abs=1e-4)
    assert [(name, type(module)) for name, module in base.named_modules()] == modules
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("case", ["p_tuning", "cartridge"])
def test_an_interrupted_training_resumes_to_the_same_positions(case: str, base_of: BaseOf, tmp_path: Path) -> None:
    base, asked = base_of("llama"), job(case, max_steps=4)
    train(base, asked, tmp_path / "whole", QUIET)
    stopped_and_resumed(base, asked, tmp_path / "cut", 2)
    assert torch.equal(states_in(tmp_path / "cut"), states_in(tmp_path / "whole"))


def test_an_lstm_trains_in_bf16_to_float32_positions(tmp_path: Path) -> None:
    base, work = make_model("llama", VOCABULARY).bfloat16(), job("p_tuning by an LSTM", precision="bf16", max_steps=12)
    result = train(base, work, tmp_path, QUIET)
    assert result.val_loss < result.history[0].val_loss
    assert states_in(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("case", METHODS)
def test_the_folded_prefix_computes_what_the_checkpoint_does(
    case: str, arch: str, base_of: BaseOf, tmp_path: Path
) -> None:
    base, (method, options) = base_of(arch), method_of(case)
    with attached(case, base) as model, torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        method.save(model, tmp_path)
    checkpoint = Checkpoint("reply", tmp_path, base, options)
    prefix = method.fold(checkpoint, "prefix")
    assert isinstance(prefix, Prefix)
    assert (prefix.name, prefix.method) == ("reply", method.name)
    assert prefix.tokens == method.prefix_tokens(options) == options.num_virtual_tokens
    assert prefix.keys.dtype == prefix.values.dtype == "float32"
    tokens = torch.tensor([random_row(5, 30).tokens])
    layers = zip(torch.tensor(prefix.keys), torch.tensor(prefix.values), strict=True)
    with torch.no_grad(), method.loaded(checkpoint) as model:
        folded = base(input_ids=tokens, cache=DynamicCache([(keys[None], values[None]) for keys, values in layers]))
        torch.testing.assert_close(folded.logits, model(input_ids=tokens).logits, rtol=0, atol=2e-4)
        assert (folded.logits - base(input_ids=tokens).logits).abs().max() > 0.01


def test_a_cartridge_learns_to_say_what_the_base_says_with_the_document(
    document: str, base_of: BaseOf, tmp_path: Path
) -> None:
    base, done = base_of("llama"), job("cartridge", {"document": document}, max_steps=60)
    result = train(base, done, tmp_path, QUIET)
    assert result.val_loss < 0.5 * result.history[0].val_loss
    read = torch.tensor([[ord(letter) for letter in DOCUMENT]])

    def divergence(model: Any, before: torch.Tensor) -> float:  # noqa: ANN401 - with PEFT around it
        total = 0.0
        for row in done.validation:
            tokens = torch.tensor([row.tokens])
            teacher = base(torch.cat([read, tokens], 1)).logits[0, -4:-1].log_softmax(1)
            student = model(input_ids=torch.cat([before, tokens], 1)).logits[0, -4:-1].log_softmax(1)
            total += (teacher.exp() * (teacher - student)).sum(1).mean().item() / len(done.validation)
        return total

    nothing = torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad(), done.method.loaded(checkpoint_of(done, base, tmp_path)) as model:
        learned = divergence(model, nothing)
        assert learned < 0.5 * divergence(base, read[:, :16])
        assert learned < 0.5 * divergence(base, nothing)
        assert 0 < result.val_loss <= learned


def test_a_cartridge_keeps_its_frozen_tokens(document: str, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama")
    with attached("cartridge", base, document=document, num_frozen_tokens=3) as model:
        first = model.positions().detach().clone()
    train(base, job("cartridge", {"document": document, "num_frozen_tokens": 3}, max_steps=2), tmp_path, QUIET)
    after = states_in(tmp_path)
    assert torch.equal(after[:3], first[:3])
    assert not torch.isclose(after[3:], first[3:]).all(1).any()


def lesson_of(base: PreTrainedModel, document: Sequence[int], row: Example) -> Lesson:
    """What the teacher says after the document, which it has read in an objective of its own."""
    objective = Distill(document)
    objective.prepare(base)
    lesson = objective._lesson(base, row)
    base.set_attn_implementation("sdpa")
    return lesson


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_document_longer_than_the_context_is_read_as_far_as_it_fits(arch: str, base_of: BaseOf) -> None:
    base, row = base_of(arch), SHORT[3]
    text = [60 + number * number % 97 for number in range(700)]
    long, cut = (lesson_of(base, document, row) for document in (text, text[: 512 - len(row.tokens)]))
    torch.testing.assert_close(long.log_probabilities, cut.log_probabilities)
    with torch.no_grad():
        logits = base(torch.tensor([[*text[: 512 - len(row.tokens)], *row.tokens]])).logits[0, -4:-1]
    likeliest = logits.log_softmax(1).gather(1, cut.tokens.long())
    torch.testing.assert_close(cut.log_probabilities[:, :-1], likeliest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut.log_probabilities.exp().sum(1), torch.ones(3))


def test_a_document_is_read_in_chunks(base_of: BaseOf) -> None:
    base, lengths = base_of("llama"), list[int]()

    def note(_model: object, _arguments: object, inputs: dict[str, torch.Tensor]) -> None:
        lengths.append(inputs["input_ids"].shape[1])

    with base.register_forward_pre_hook(note, with_kwargs=True):
        lesson_of(base, range(60, 360), SHORT[3])
    assert lengths == [256, 44, len(SHORT[3].tokens)]


def test_reading_a_document_can_be_interrupted_as_training_can(document: str, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama")

    def interrupt(_model: object, _arguments: object, inputs: dict[str, object]) -> None:
        if "packed" in inputs:
            raise KeyboardInterrupt

    with (
        base.register_forward_pre_hook(interrupt, with_kwargs=True),
        pytest.raises(CancelledError, match="training reply stopped at step 0"),
    ):
        train(base, job("cartridge", {"document": document}), tmp_path, QUIET)
    assert base.config._attn_implementation == "sdpa"


def test_the_teacher_of_a_cartridge_is_exact_while_int8_trains(document: str, base_of: BaseOf) -> None:
    base = base_of("llama")
    expected = lesson_of(base, range(60, 120), SHORT[3])
    objective = Distill(range(60, 120))
    with attached("cartridge", base, document=document) as model:
        objective.prepare(base)
        with in_int8(model):
            found = objective._lesson(base.train(), SHORT[3])
    assert base.training
    base.eval().set_attn_implementation("sdpa")
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities)


def test_what_a_teacher_says_counts_as_memory_of_the_training(document: str, base_of: BaseOf, tmp_path: Path) -> None:
    base, rows = base_of("llama"), [random_row(number, 120, (), 20) for number in range(300)]
    objective = Distill(range(60, 120))
    objective.prepare(base)
    lesson = objective._lesson(base, rows[0])
    base.set_attn_implementation("sdpa")
    assert objective.kept_bytes(rows[:1] * 2) == lesson.tokens.nbytes + lesson.log_probabilities.nbytes
    needed = []
    for some in (rows[:1], rows):
        work = replace(job("cartridge", {"document": document}, memory_mb=5), train=some)
        with pytest.raises(UsageError, match="training reply needs at least") as error:
            train(base, work, tmp_path, QUIET)
        needed.append(int(str(error.value).split("set it to ")[1].split()[0]))
    assert needed[1] - needed[0] == pytest.approx(objective.kept_bytes(rows[1:]) / 1e6, abs=15)


def test_a_prefix_begins_as_the_states_of_its_text(base_of: BaseOf) -> None:
    base = base_of("llama")
    with attached("prefix", base, init_text="<AB>") as model, torch.no_grad():
        cache = DynamicCache()
        base(torch.tensor([[60, 65, 66, 62] * 5]), cache=cache, use_cache=True)
        keys, values = split_states(model.positions(), base.config)
        torch.testing.assert_close(keys, torch.stack([layer.keys[0] for layer in cache.layers]))
        torch.testing.assert_close(values, torch.stack([layer.values[0] for layer in cache.layers]))
    with attached("prompt", base, prompt_tuning_init_text="<AB>") as model, torch.no_grad():
        embedded = base.get_input_embeddings()(torch.tensor([60, 65, 66, 62] * 5))
        torch.testing.assert_close(model.positions(), embedded)


@pytest.mark.parametrize(("init", "largest"), [("random", 1.0), ("zero", 0.0)])
def test_a_prefix_begins_as_asked(init: str, largest: float, base_of: BaseOf) -> None:
    with attached("prefix", base_of("llama"), init_weights=init) as model:
        assert model.positions().std().item() == pytest.approx(largest, abs=0.1)


def test_a_prefix_encoder_has_a_lower_default_learning_rate(base_of: BaseOf) -> None:
    def rate(**options: object) -> float:
        method, prepared = method_of("prefix", **options)
        with attached("prefix", base_of("llama"), **options) as model:
            (group,) = method.parameter_groups(model, prepared, 1e-3)
        return float(group["lr"])

    assert rate() == pytest.approx(1e-2)
    assert rate(prefix_projection=True) == pytest.approx(1e-3)
    assert rate(prefix_projection=True, learning_rate_factor=3) == pytest.approx(3e-3)


def test_impossible_options_of_prompt_methods_are_one_line_errors(
    base_of: BaseOf, document: str, tmp_path: Path
) -> None:
    base = base_of("llama")
    refusal = "has 150 tokens, but num_virtual_tokens is 151; set num_virtual_tokens to 150 or less"
    with pytest.raises(UsageError, match=refusal):
        method_of("cartridge", document=document, num_virtual_tokens=151)
    with pytest.raises(NotFoundError, match=r"no document .*none\.txt"):
        method_of("cartridge", document=str(tmp_path / "none.txt"))
    with pytest.raises(ValidationError, match="num_frozen_tokens is 4; give at most 3"):
        method_of("cartridge", num_virtual_tokens=4, num_frozen_tokens=4)
    with pytest.raises(ValidationError, match="the document initializes the cartridge; remove init_text, or document"):
        method_of("cartridge", document=document, init_text="first words")
    done = job("prefix", max_steps=1)
    train(base, done, tmp_path, QUIET)
    with pytest.raises(IncompatibleError, match=r"reply has scale 0\.5, but a prefix cannot be scaled"):
        done.method.fold(checkpoint_of(done, base, tmp_path, 0.5), "prefix")
    with pytest.raises(IncompatibleError, match="the prefix has 128 values per token, but the base needs 384"):
        done.method.fold(checkpoint_of(done, base_of("gemma3"), tmp_path), "prefix")


def test_the_path_of_a_document_is_relative_to_the_recipe(document: str, tmp_path: Path) -> None:
    method = {"name": "cartridge", "document": "document.txt"}
    read = make_recipe(tmp_path, "b.gguf", {"a": adapter_of(method)})
    assert read.adapters["a"].method.options.model_dump()["document"] == document
    prepared = method_of("cartridge", document=document)[1]
    assert prepared.document_tokens == tuple(map(ord, DOCUMENT))
    assert "document_tokens" not in prepared.model_dump()
    assert prepared.document_digest == sha256(DOCUMENT.encode()).hexdigest()
    assert read.resolved()["adapters"]["a"]["method"]["document"] == "document.txt"

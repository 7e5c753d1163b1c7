from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters.shapes import LowRank
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import IncompatibleError, UsageError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import FEW, make_encoder, make_model
from torch.nn.functional import cross_entropy
from trainings import VOCABULARY, job, learn, logits_of, randomize

from edgetune import methods
from edgetune.methods import Checkpoint
from edgetune.methods.alora import start_of
from edgetune.methods.common.base import trainable
from edgetune.objectives.example import Example
from edgetune.objectives.packing import take_packed_rows
from edgetune.tasks.data import TaskRow
from edgetune.tasks.tokenization import tokenize_rows

ALORA = methods.load("alora")
INVOCATION = (13, 14)
OPTIONS: dict[str, Any] = {"r": 4, "invocation_tokens": INVOCATION}


def row(*prompt: int, answer: tuple[int, ...] = (40, 41, 2), learned_before: int = 0) -> Example:
    """A row of prompt and answer, of whose prompt the first places may be learned too."""
    learned = tuple(0 < i <= learned_before for i in range(len(prompt))) + (True,) * len(answer)
    return Example((*prompt, *answer), learned, len(prompt))


BATCHES = {
    "what is shared ends before the invocation": [
        row(10, 11, 12, 30, 13, 14),
        row(10, 11, 12, 31, 32, 13, 14, 15),
        row(10, 11, 12, 13, 14, 33),
    ],
    "rows share the invocation and more": [
        row(10, 11, 13, 14, 30, 31),
        row(10, 11, 13, 14, 30, 32, 33),
        row(10, 11, 13, 14, 30, 31, answer=(50, 2)),
    ],
    "one row invokes again where the other does not": [
        row(10, 13, 14, 20, 21, 22),
        row(10, 13, 14, 20, 21, 13, 14, learned_before=4),
    ],
    "the invocation comes first": [row(13, 14, 30), row(13, 14, 31, 32)],
    "one row": [row(10, 11, 13, 14, 30, 13, 14, learned_before=5)],
}


def attached(arch: str, **more: object) -> Any:  # noqa: ANN401 - PEFT carries no types
    """A tiny base with a random adapter, as training attaches it."""
    base = make_model(arch, VOCABULARY).eval()
    model = ALORA.attach(base, ALORA.options.model_validate({**OPTIONS, **more}), 10)
    randomize(model)
    return model


def checkpoint_of(folder: Path, arch: str = "llama") -> Checkpoint:
    options = ALORA.options.model_validate(OPTIONS)
    return Checkpoint("reply", folder, make_model(arch, VOCABULARY).eval(), options)


def packed_loss(model: Any, rows: list[Example]) -> torch.Tensor:  # noqa: ANN401 - as above
    objective = ALORA.objective(ALORA.options.model_validate(OPTIONS))
    batch = objective.batch(rows)
    assert len(batch.targets) == sum(objective.learned(row) for row in rows)
    take_packed_rows(model.base_model.model)
    return objective.loss(model, model, batch)


def loss_alone(model: Any, rows: list[Example]) -> float:  # noqa: ANN401 - as above
    """The summed loss behind each row's last invocation, each row run alone in PEFT's own model."""
    total = 0.0
    for example in rows:
        logits, start = logits_of(model, example.tokens), start_of(example.tokens, INVOCATION)
        for i in range(start + 1, len(example.tokens)):
            if example.learned[i]:
                total += cross_entropy(logits[i - 1], torch.tensor(example.tokens[i])).item()
    return total


@pytest.mark.parametrize("arch", [*FEW, "lfm2", "qwen35"])
def test_packed_rows_lose_what_pefts_own_gate_loses_on_each_alone(arch: str, tmp_path: Path) -> None:
    model = attached(arch)
    ALORA.save(model, tmp_path)
    with ALORA.loaded(checkpoint_of(tmp_path, arch)) as theirs, torch.no_grad():
        for name, rows in BATCHES.items():
            expected = loss_alone(theirs, rows)
            assert packed_loss(model, rows).item() == pytest.approx(expected, rel=1e-4), name
            with theirs.disable_adapter():
                assert abs(loss_alone(theirs, rows) - expected) > 0.01, name


def test_a_shared_token_is_active_in_no_row() -> None:
    objective = ALORA.objective(ALORA.options.model_validate(OPTIONS))
    again = objective.batch(BATCHES["one row invokes again where the other does not"])
    shared = 1
    assert again.tokens.shape[1] == shared + 8 + 9
    # A process without validation rows asks too.
    assert objective.shared([]) == 0
    active = again.active[0].tolist()
    assert active == [False, *[True] * 8, *[False] * 4, *[True] * 5]
    first = objective.batch(BATCHES["the invocation comes first"])
    assert first.active.all()
    assert first.to(torch.device("cpu")).active.all()


def test_gradients_are_those_of_rows_run_alone() -> None:
    model, rows = attached("llama"), BATCHES["what is shared ends before the invocation"]
    packed_loss(model, rows).backward()
    together = {name: p.grad.clone() for name, p in trainable(model)}
    model.zero_grad()
    for example in rows:
        packed_loss(model, [example]).backward()
    for name, parameter in trainable(model):
        assert parameter.grad.norm() > 0
        assert (together[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_nothing_before_the_invocation_changes(tmp_path: Path) -> None:
    ALORA.save(attached("llama"), tmp_path)
    checkpoint, tokens = checkpoint_of(tmp_path), (10, 13, 14, 11, 12, 13, 14, 30, 31)
    plain = logits_of(checkpoint.base, tokens)
    with ALORA.loaded(checkpoint) as model:
        found = logits_of(model, tokens)
        without = logits_of(model, tokens[3:6])
    assert torch.equal(found[:5], plain[:5])
    assert (found[5:] - plain[5:]).abs().amax(1).min() > 0.1
    assert torch.equal(without, logits_of(checkpoint.base, tokens[3:6]))


def test_the_folder_is_pefts_and_folds_with_its_invocation(tmp_path: Path) -> None:
    model = attached("llama", alpha_pattern={"q_proj": 3})
    ALORA.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["alora_invocation_tokens"] == list(INVOCATION)
    theirs = PeftModel.from_pretrained(make_model("llama", VOCABULARY), tmp_path)
    folded = ALORA.fold(checkpoint_of(tmp_path), "low_rank")
    assert isinstance(folded, LowRank)
    assert (folded.invocation, folded.method, folded.error) == (INVOCATION, "alora", 0.0)
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == len(folded.modules) == 14
    for name, layer in layers.items():
        delta = folded.modules[name.removeprefix("base_model.model.")]
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(torch.from_numpy(delta.b @ delta.a), product.detach(), rtol=1e-4, atol=1e-6)
    assert ALORA.shapes(ALORA.options()) == ("low_rank",)


def test_an_invocation_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    ALORA.save(attached("llama"), tmp_path)
    checkpoint = checkpoint_of(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for token, is_refused in ((VOCABULARY - 1, False), (VOCABULARY, True), (10**9, True)):
        values = json.dumps({**config, "alora_invocation_tokens": [13, token]})
        (tmp_path / "adapter_config.json").write_text(values)
        expected = pytest.raises(IncompatibleError, match=f"token {token}, .* {VOCABULARY} tokens lacks")
        with expected if is_refused else nullcontext():
            ALORA.fold(checkpoint, "low_rank")


def test_a_training_learns(tmp_path: Path) -> None:
    base = make_model("llama", VOCABULARY)
    # Rows of the trainings ask after 13.
    work = job("alora", {"r": 4, "invocation_tokens": [13], "lora_dropout": 0.1}, max_steps=40, learning_rate=1e-2)
    result = learn(base, work, tmp_path)
    assert result.val_loss < 0.7 * result.history[0].val_loss


ROWS = [
    TaskRow("a", ({"role": "user", "content": "turn on the lamp"},), "lamp on"),
    TaskRow("b", ({"role": "user", "content": "play red"}, {"role": "assistant", "content": "red"},
              {"role": "user", "content": "stop"}), "off"),
]  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_invocation_is_by_default_the_beginning_of_an_answer(arch: str, tiny_gguf: Callable[[str], Path]) -> None:
    with closing(GgufTokenizer(tiny_gguf(arch))) as tokenizer:
        rows, _ = tokenize_rows(ROWS, tokenizer, system=None, loss_on="completion", max_tokens=256)
        by_default = ALORA.prepared(ALORA.options(), tokenizer, rows)
        by_text = ALORA.options(invocation="<|im_start|>assistant\n")
        by_text = ALORA.prepared(by_text, tokenizer, rows)
        assert by_text.invocation_tokens == by_default.invocation_tokens
        assert ALORA.prepared(by_text, tokenizer, rows) == by_text
        length = len(by_default.invocation_tokens)
        for example in rows:
            assert example.prompt_tokens[-length:] == by_default.invocation_tokens
            assert start_of(example.tokens, by_default.invocation_tokens) == example.prompt_length - length
        objective = ALORA.objective(by_default)
        # The earlier turn of the second row is the base's.
        assert objective.learned(rows[1]) == len(rows[1].tokens) - rows[1].prompt_length < sum(rows[1].learned)


def test_rows_without_the_invocation_are_refused(tiny_gguf: Callable[[str], Path]) -> None:
    with closing(GgufTokenizer(tiny_gguf("llama"))) as tokenizer:
        rows, _ = tokenize_rows(
            [*ROWS, TaskRow("c", text="turn on the light")],
            tokenizer,
            system=None,
            loss_on="completion",
            max_tokens=256,
        )
        remedy = "set invocation to a text in every prompt, with the space before it, or use method lora"
        refusal = f"2 of 3 rows have nothing to learn after the invocation '<lamp>'; {remedy}"
        with pytest.raises(UsageError, match=refusal):
            ALORA.prepared(ALORA.options(invocation="<lamp>"), tokenizer, [*rows[:2], _containing("<lamp>", tokenizer)])
        with pytest.raises(UsageError, match=r"1 of 3 rows have nothing to learn after the invocation of tokens \[\d"):
            start = ALORA.prepared(ALORA.options(), tokenizer, rows[:2]).invocation_tokens
            ALORA.prepared(ALORA.options(invocation_tokens=start), tokenizer, rows)
        with pytest.raises(UsageError, match=r"invocation_tokens \[5\] are not the tokens of invocation 'lamp'"):
            ALORA.prepared(ALORA.options(invocation="lamp", invocation_tokens=(5,)), tokenizer, rows)
        with pytest.raises(UsageError, match=r"after the invocation '.*assistant"):
            ALORA.prepared(ALORA.options(), tokenizer, rows)
        tokenizer.chat_template = None
        with pytest.raises(UsageError, match="adds no text before an answer; set the method's invocation"):
            ALORA.prepared(ALORA.options(), tokenizer, rows)


def _containing(text: str, tokenizer: GgufTokenizer) -> Example:
    return row(5, *tokenizer.tokenize(text, continues=True), 6)


def test_alora_without_invocation_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="alora needs invocation tokens"):
        attached("llama", invocation_tokens=())


def test_encoders_are_refused() -> None:
    with pytest.raises(UsageError, match="use method lora for an encoder"):
        ALORA.attach(make_encoder("bert", 32), ALORA.options.model_validate(OPTIONS), 10)


def test_a_scale_counts(tmp_path: Path) -> None:
    ALORA.save(attached("llama"), tmp_path)
    checkpoint, tokens = checkpoint_of(tmp_path), (10, 13, 14, 30, 31)
    found = []
    for scale in (0.0, 0.5, 1.0):
        with ALORA.loaded(replace(checkpoint, scale=scale)) as model:
            found.append(logits_of(model, tokens))
    assert torch.equal(found[0], logits_of(checkpoint.base, tokens))
    assert (found[1] - found[0]).abs().max() > 0.1
    assert (found[2] - found[1]).abs().max() > 0.1

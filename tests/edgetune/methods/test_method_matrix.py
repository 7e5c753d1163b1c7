"""Every method on every backend: trained on a tiny base, folded, written, run by the real engine, against torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters.shapes import LowRank, Merged
from edgetune_export.architectures import known
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf import backend as gguf
from edgetune_export.backends.onnx import backend as onnx
from edgetune_export.parity import compare
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.errors import IncompatibleError, UsageError
from safetensors.torch import load_file
from tiny import ARCHITECTURES, SAME_MODULES, make_model
from trainings import HEADER, QUIET, SHORT, VARIANTS, job_of
from transformers import PreTrainedModel

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.methods.common.base import trainable
from edgetune.objectives.example import Example
from edgetune.shipping.verify import logits_of
from edgetune.training.job import TrainingJob, TrainResult, finished
from edgetune.training.loop import train

BACKENDS: dict[str, Any] = {"gguf": gguf, "onnx": onnx}
ENGINES: dict[str, Any] = {"gguf": GgufEngine, "onnx": OnnxEngine}
ROWS = [[*HEADER, 30 + number, 13, 130 + number, 131 + number, 40, 41, 2] for number in range(3)]
# The base is f16: what lies beside it is exact, a merged model is rounded to f16 once more.
CLOSE = {"low_rank": 1e-4, "tensors": 1e-4, "prefix": 1e-3, "merged": 1e-3}
LOW_RANK = {"gguf": "low_rank", "onnx": "low_rank"}
MERGED = {"gguf": "merged", "onnx": "merged"}
PREFIX = {"gguf": "prefix", "onnx": "prefix"}
# Rows begin with what activates alora, so that an engine, which gates nothing, runs all of each row with it.
# What each method becomes on each backend, and options that keep the tiny models' changes small but real.
TABLE: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "adalora": (LOW_RANK, {"target_r": 2, "init_r": 4}),
    "alora": (LOW_RANK, {"r": 4, "invocation_tokens": HEADER}),
    "bottleneck": ({"onnx": "tensors"}, {"bottleneck_size": 4}),
    "cartridge": (PREFIX, {"num_virtual_tokens": 4}),
    "dora": (MERGED, {"r": 4}),
    "full": (MERGED, {}),
    "ia3": ({"gguf": "merged", "onnx": "tensors"}, {}),
    "last_layers": (MERGED, {"layers": 1}),
    "loha": (LOW_RANK, {"r": 2}),
    "lokr": (LOW_RANK, {"r": 2, "decompose_factor": 2}),
    "lora": (LOW_RANK, {"r": 4}),
    "loraplus": (LOW_RANK, {"r": 4}),
    "oft": (MERGED, {"oft_block_size": 8}),
    "olora": (LOW_RANK, {"r": 4}),
    "pissa": (LOW_RANK, {"r": 4}),
    "p_tuning": (PREFIX, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix": (PREFIX, {"num_virtual_tokens": 4, "init_tokens": HEADER}),
    "prompt": (PREFIX, {"num_virtual_tokens": 4, "init_tokens": HEADER}),
    "rslora": (LOW_RANK, {"r": 4}),
    "vera": (LOW_RANK, {"r": 8}),
}
# Options that change how many parameters are trained.
COUNTED: list[tuple[str, dict[str, Any]]] = [
    *((name, options) for name, (_, options) in TABLE.items()),
    ("bottleneck", {"kind": "houlsby", "reduction_factor": 8}),
    ("ia3", {"target_modules": "all-linear"}),
    ("lokr", {"r": 40, "decompose_factor": 3}),
    ("lora", {"rank_pattern": {"down_proj": 2, "layers.1.+o_proj": 3, ".*o_proj": 5}}),
    ("lora", {"target_modules": ("down_proj", "layers.0.self_attn.o_proj", "lm_head")}),
    ("oft", {"oft_block_size": 7}),
    ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}),
    ("prefix", {"prefix_projection": True}),
    ("prefix", {"prefix_projection": True, "encoder_hidden_size": 16}),
]
# A method of each shape, the least that an architecture needs: low rank, scalings, networks, prefix, merged model.
OF_EACH_SHAPE = ("bottleneck", "full", "ia3", "lora", "prefix")
BLOCKS_OF_LLAMA = {"ernie4_5", "hunyuan_dense", "mistral", "qwen2", "qwen3", "smollm3"}
"""Architectures where networks have the places that they have in a LLaMA: where nothing follows a block's output."""
# Where modules have other names, or q, k and v are one module.
OWN_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lfm2": {"ia3": {"target_modules": ("k_proj", "v_proj", "w2"), "feedforward_modules": ("w2",)}},
    "phi3": {"ia3": {"target_modules": ("qkv_proj", "down_proj")}},
    # Of so short a training, its answers change less than others'.
    "qwen35": {"full": {"learning_rate_factor": 0.06}, "ia3": {"learning_rate_factor": 30.0}},
}
NAMES = [name for name in TABLE if name not in VARIANTS]
# So that other architectures than llama, with fewer steps, are trained as far.
SHORTER: dict[str, Any] = {"max_steps": 2, "evals": 1, "learning_rate": 2.4e-2}


def methods_for(arch: str) -> list[str]:
    """One of each shape that an architecture supports."""
    attends = not known()[arch].recurrent_block
    supported = {"bottleneck": attends, "prefix": attends and known()[arch].has_equal_caches}
    return [name for name in OF_EACH_SHAPE if supported.get(name, True)]


def runs_on(arch: str) -> Iterator[tuple[str, str]]:
    """The methods and engines that an architecture is tried with: each engine with each shape that it runs there."""
    engines = [name for name in BACKENDS if name not in known()[arch].refusals]
    for name in methods_for(arch):
        for backend, shape in TABLE[name][0].items():
            if backend not in engines or (name == "bottleneck" and arch in BLOCKS_OF_LLAMA):
                continue
            # As a merged model, scalings are like what `full` changed; as tensors, they are tried in the other engine.
            if name == "ia3" and shape == "merged" and "onnx" in engines:
                continue
            yield name, backend


@dataclass(frozen=True)
class Tuned:
    """A method's training on the tiny base."""

    method: methods.Method[Any]
    checkpoint: methods.Checkpoint
    result: TrainResult

    @cached_property
    def logits(self) -> dict[tuple[int, ...], Any]:
        """What torch computes of the checkpoint for each row; to load it takes longer than to compute."""
        with self.method.loaded(self.checkpoint) as model:
            return {tuple(row): logits_of(model)(row) for row in ROWS}


def job(name: str, options: dict[str, Any], **training: object) -> TrainingJob[Example]:
    """A few steps of a method on a few rows."""
    method, values = methods.load(name), {"max_steps": 6, "evals": 2, "learning_rate": 1e-2, **training}
    return job_of(method, method.options.model_validate(options), SHORT, **values)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[[str], Base]) -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def source(tiny_source: Callable[[str], Source]) -> Source:
    return tiny_source("llama")


@pytest.fixture(scope="module")
def tuned(
    tiny_base: Callable[[str], Base],
    tiny_source: Callable[[str], Source],
    once: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[..., Tuned]:
    """`tuned(method, arch)`: the method trained for a few steps on a tiny base, by default llama."""

    @cache
    def make(name: str, arch: str = "llama") -> Tuned:
        options = {**TABLE[name][1], **OWN_OPTIONS.get(arch, {}).get(name, {})}
        work = job(name, options, **({} if arch == "llama" else SHORTER))
        base = partial(bases.load_torch, tiny_base(arch), torch.float32)
        folder = once(f"tuned-{name}-{arch}", lambda folder: train(base(), work, folder, QUIET))
        result, model = finished(folder, work.key), tiny_source(arch).model
        assert result is not None and model is not None
        return Tuned(work.method, methods.Checkpoint(name, folder / "adapter", model, work.options), result)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_in_bf16(name: str, base: Base, tmp_path: Path) -> None:
    work = job(name, TABLE[name][1], precision="bf16", max_steps=2, evals=2)
    result = train(bases.load_torch(base, torch.bfloat16), work, tmp_path, QUIET)
    assert result.precision == "bf16"
    check_learning(result)
    # These save weights of the base, which is in bf16 here.
    if name not in ("full", "last_layers"):
        (file,) = (tmp_path / "adapter").glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_leaves_the_base_alone_trains_in_int8(name: str, base: Base, tmp_path: Path) -> None:
    work = job(name, TABLE[name][1], precision="int8", max_steps=2, evals=2)
    model = bases.load_torch(base, torch.float32)
    if work.method.trains_base:
        with pytest.raises(UsageError, match=f"{name} trains the base's own weights"):
            train(model, work, tmp_path, QUIET)
        return
    result = train(model, work, tmp_path, QUIET)
    assert result.precision == "int8"
    check_learning(result)


def check_learning(result: TrainResult) -> None:
    """The last of two steps lowered the loss, which is that of a model of sound numbers."""
    first, last = (point.val_loss for point in result.history)
    assert last < first and 0 < result.val_loss < 20


def logits(tuned: Tuned) -> Callable[[list[int]], Any]:
    """What torch computes of the checkpoint, row by row."""
    return lambda tokens: tuned.logits[tuple(tokens)]


def engine_of(tuned: Tuned, shape: str, backend: str, source: Source, folder: Path) -> Any:  # noqa: ANN401 - either engine
    """The engine with what was trained active in it."""
    writer, folded = BACKENDS[backend], tuned.method.fold(tuned.checkpoint, shape)
    assert folded.shape == shape
    if isinstance(folded, Merged):
        out = folder / writer.MODEL_FILE
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_merged(folded, source, out)
        return ENGINES[backend](out, context_length=64, threads=1)
    graph, out = writer.write_base(source, folder, [folded]), folder / writer.ADAPTER_FILE
    dtype = {"gguf": "f16", "onnx": "f32"}[backend]
    writer.write_adapter(folded, graph, out, dtype=dtype, base_fingerprint=source.fingerprint)
    engine = ENGINES[backend](graph, context_length=64, threads=1)
    invocation = folded.invocation if isinstance(folded, LowRank) else ()
    engine.load_adapter("adapter", out, invocation=invocation)
    engine.activate({"adapter": tuned.checkpoint.scale})
    return engine


def test_the_table_names_every_method() -> None:
    assert sorted(TABLE) == methods.names()


def check_count(name: str, options: dict[str, Any], arch: str, base: Base, model: PreTrainedModel) -> None:
    method, shape = methods.load(name), BaseShape.of_header(base.header)
    chosen = method.options.model_validate(options)
    with warnings.catch_warnings():
        # PEFT warns of a block size that it changes, and of adapters on a tied output layer.
        warnings.simplefilter("ignore")
        tuned = method.attach(model, chosen, 10)
    in_file = {f"{name}.weight" for name in known()[arch].embeddings_in_file}
    counted = sum(p.numel() for parameter, p in trainable(tuned) if parameter not in in_file)
    method.detach(tuned)
    assert method.trained_parameters(method.trained(shape, chosen), chosen) == counted


def model_of(arch: str, base: Base) -> PreTrainedModel:
    return make_model(arch, BaseShape.of_header(base.header).vocabulary)


@pytest.mark.parametrize(("name", "options"), COUNTED)
def test_a_method_knows_how_many_parameters_it_trains(name: str, options: dict[str, Any], base: Base) -> None:
    check_count(name, options, "llama", base, model_of("llama", base))


@pytest.mark.parametrize("arch", SAME_MODULES)
def test_methods_know_how_many_parameters_they_train_on_every_architecture(
    arch: str, tiny_base: Callable[[str], Base]
) -> None:
    base = tiny_base(arch)
    model = model_of(arch, base)
    for name in (*methods_for(arch), "last_layers"):
        check_count(name, {**TABLE[name][1], **OWN_OPTIONS.get(arch, {}).get(name, {})}, arch, base, model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TABLE)
def test_each_engine_computes_what_was_trained(
    name: str, backend: str, tuned: Callable[..., Tuned], source: Source, tmp_path: Path
) -> None:
    shapes, options = TABLE[name]
    method = methods.load(name)
    accepted, chosen = BACKENDS[backend].SHAPES, method.options.model_validate(options)
    if backend not in shapes:
        with pytest.raises(IncompatibleError, match=f"{backend} does not support {name}"):
            methods.shape_for(method, chosen, backend, accepted, merged=False)
        return
    shape = methods.shape_for(method, chosen, backend, accepted, merged=False)
    assert shape == shapes[backend]
    trained = tuned(name)
    with closing(engine_of(trained, shape, backend, source, tmp_path)) as engine:
        parity = compare(logits(trained), engine, ROWS)
        assert parity.kl < CLOSE[shape]
        # Far from the base, so that an engine which ran that would not pass.
        assert compare(logits_of(source.model), engine, ROWS).kl > 20 * CLOSE[shape]


@pytest.mark.parametrize(
    ("arch", "name", "backend"),
    [(arch, name, backend) for arch in ARCHITECTURES for name, backend in runs_on(arch)],
)
def test_every_architecture_runs_what_was_trained(
    arch: str,
    name: str,
    backend: str,
    tuned: Callable[..., Tuned],
    tiny_source: Callable[[str], Source],
    tmp_path: Path,
) -> None:
    shapes, source, trained = TABLE[name][0], tiny_source(arch), tuned(name, arch)
    with closing(engine_of(trained, shapes[backend], backend, source, tmp_path)) as engine:
        assert compare(logits(trained), engine, ROWS).kl < CLOSE[shapes[backend]]
        assert compare(logits_of(source.model), engine, ROWS).kl > 20 * CLOSE[shapes[backend]]


@pytest.mark.parametrize("name", [name for name in NAMES if methods.load(name).takes_scale])
def test_a_scale_is_applied_once_whatever_the_shape(
    name: str, tuned: Callable[..., Tuned], source: Source, tmp_path: Path
) -> None:
    trained = tuned(name)
    scaled = replace(trained, checkpoint=replace(trained.checkpoint, scale=2.0))
    backend = next(backend for backend, shape in TABLE[name][0].items() if shape != "merged")
    for shape in trained.method.shapes(trained.checkpoint.options):
        with closing(engine_of(scaled, shape, "gguf" if shape == "merged" else backend, source, tmp_path)) as engine:
            assert compare(logits(scaled), engine, ROWS).kl < CLOSE[shape]
            # So that a scale of 1 or 4 would not pass.
            assert compare(logits(trained), engine, ROWS).kl > 5 * CLOSE[shape]


@pytest.mark.parametrize("name", ["dora", "oft"])
def test_a_dense_change_is_cut_to_the_rank_that_its_error_allows(
    name: str, tuned: Callable[..., Tuned], source: Source, tmp_path: Path
) -> None:
    trained = tuned(name)

    def cut(max_error: float) -> Tuned:
        options = trained.method.options.model_validate({"max_error": max_error})
        return replace(trained, checkpoint=replace(trained.checkpoint, options=options))

    folded, exact = (item.method.fold(item.checkpoint, "low_rank") for item in (cut(0.3), cut(1e-6)))
    assert isinstance(folded, LowRank) and isinstance(exact, LowRank)
    assert 0 < folded.error <= 0.3
    assert all(delta.rank < exact.modules[module].rank for module, delta in folded.modules.items())
    with closing(engine_of(cut(0.3), "low_rank", "gguf", source, tmp_path)) as engine:
        near, far = compare(logits(trained), engine, ROWS).kl, compare(logits_of(source.model), engine, ROWS).kl
        assert near < far / 4


@pytest.mark.parametrize("name", TABLE)
def test_the_checkpoint_is_the_best_of_the_training_and_leaves_the_base_alone(
    name: str, tuned: Callable[..., Tuned], source: Source
) -> None:
    assert source.model is not None
    before = {key: tensor.clone() for key, tensor in source.model.state_dict().items()}
    trained = tuned(name)
    # PEFT would write a model card.
    assert not (trained.checkpoint.folder / "README.md").exists()
    first, *_, last = trained.result.history
    assert min(first.val_loss, last.val_loss) == pytest.approx(trained.result.val_loss)
    losses = []
    with trained.method.loaded(trained.checkpoint) as model:
        for row in SHORT[::3]:
            log_p = torch.from_numpy(logits_of(model)(list(row.tokens))).log_softmax(-1)
            losses += [-float(log_p[i - 1, row.tokens[i]]) for i in range(5, 8)]
    assert sum(losses) / len(losses) == pytest.approx(trained.result.val_loss, rel=1e-3)
    after = source.model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())

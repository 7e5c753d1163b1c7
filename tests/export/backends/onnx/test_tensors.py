from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as og
import pytest
import torch
from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Activation, Bottleneck, Delta, LowRank, Scaling, Tensors
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx.backend import write_adapter, write_base
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_export.parity import compare
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.errors import IncompatibleError, NotFoundError
from genai import greedy, greedy_in_genai
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

ARCHITECTURES = ("llama", "qwen2", "gemma3")
HIDDEN, INNER, KEYS = 64, 128, 32
EXACT = 1e-11
"""Bound of the mean KL to torch: up to 1e-13 was seen, and 3e-10 with the other form of gelu."""
Reads = Literal["output", "input"]
LAYERS = {"llama": 2, "qwen2": 2, "gemma3": 6}
Made = Callable[..., Path]
Logits = Callable[[Sequence[int]], np.ndarray]
Output = torch.Tensor | tuple[Any, ...]


def bottleneck(seed: int, activation: Activation = "relu", reads: Reads = "output", rank: int = 8) -> Bottleneck:
    rng = np.random.default_rng(seed)
    down, down_bias, up, up_bias = (
        rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((rank, HIDDEN), rank, (HIDDEN, rank), HIDDEN)
    )
    return Bottleneck(down, down_bias, up, up_bias, activation, reads)


def ia3(layers: int) -> Tensors:
    """Factors where (IA)3 has them: on keys, on values and on what goes into the second layer of a network."""
    rng = np.random.default_rng(1)
    scalings = {}
    for layer in range(layers):
        for module in ("k_proj", "v_proj"):
            factors = rng.uniform(-1, 3, KEYS).astype(np.float32)
            scalings[f"model.layers.{layer}.self_attn.{module}"] = Scaling(factors, "output")
        inner = rng.uniform(-1, 3, INNER).astype(np.float32)
        scalings[f"model.layers.{layer}.mlp.down_proj"] = Scaling(inner, "input")
    return Tensors("ia3", "ia3", scalings)


def outputs(layers: int) -> Tensors:
    """Factors on what each linear module but the query's gives."""
    rng = np.random.default_rng(3)
    widths = {"self_attn.k_proj": KEYS, "self_attn.o_proj": HIDDEN, "mlp.gate_proj": INNER, "mlp.up_proj": INNER}
    scalings = {
        f"model.layers.{layer}.{module}": Scaling(rng.uniform(0, 2, width).astype(np.float32), "output")
        for layer in range(layers)
        for module, width in {**widths, "mlp.down_proj": HIDDEN}.items()
    }
    return Tensors("outputs", "ia3", scalings)


def blocks(name: str, layers: int, activation: Activation, reads: Reads, ends: tuple[str, ...], rank: int) -> Tensors:
    own = {
        f"model.layers.{layer}.{end}": bottleneck(10 * layer + number, activation, reads, rank)
        for layer in range(layers)
        for number, end in enumerate(ends)
    }
    return Tensors(name, "bottleneck", bottlenecks=own)


def adapters_for(layers: int) -> dict[str, Tensors]:
    both = ("mlp", "self_attn")
    made = [
        ia3(layers),
        outputs(layers),
        blocks("houlsby", layers, "relu", "output", both, 8),
        blocks("pfeiffer", layers, "gelu", "output", ("mlp",), 5),
        blocks("parallel", layers, "silu", "input", both, 3),
        blocks("other parallel", layers, "silu", "input", ("mlp",), 18),
    ]
    return {adapter.name: adapter for adapter in made}


def in_torch(model: torch.nn.Module, adapters: Mapping[str, float], known: Mapping[str, Tensors]) -> Logits:
    """`logits(tokens)` of a model whose modules are hooked by hand, which is what the slots have to compute."""
    networks: dict[str, list[tuple[Bottleneck, float]]] = {}
    for name, scale in adapters.items():
        for block, network in known[name].bottlenecks.items():
            networks.setdefault(block, []).append((network, scale))

    def logits(tokens: Sequence[int]) -> np.ndarray:
        hooks = [hook for name, scale in adapters.items() for hook in hook_scalings(model, known[name], scale)]
        hooks += [hook_block(model.get_submodule(block), own) for block, own in networks.items()]
        try:
            with torch.no_grad():
                rows: np.ndarray = model(torch.tensor([list(tokens)])).logits[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()
        return rows

    return logits


def hook_scalings(model: torch.nn.Module, adapter: Tensors, scale: float) -> list[RemovableHandle]:
    hooks = []
    for name, scaling in adapter.scalings.items():
        module, factors = model.get_submodule(name), 1 + scale * (torch.from_numpy(scaling.factors) - 1)
        if scaling.side == "output":
            hooks.append(module.register_forward_hook(lambda _m, _x, y, f=factors: y * f))
        else:
            hooks.append(module.register_forward_pre_hook(lambda _m, x, f=factors: (x[0] * f,)))
    return hooks


def hook_block(block: torch.nn.Module, networks: Sequence[tuple[Bottleneck, float]]) -> RemovableHandle:
    def added(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Output) -> Output:
        x, y = args[0] if args else kwargs["hidden_states"], result[0] if isinstance(result, tuple) else result
        total = y + sum(scale * network(own, y if own.reads == "output" else x) for own, scale in networks)
        return (total, *result[1:]) if isinstance(result, tuple) else total

    return block.register_forward_hook(added, with_kwargs=True)


def network(own: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    down, down_bias, up, up_bias = map(torch.from_numpy, (own.down, own.down_bias, own.up, own.up_bias))
    act = {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu}[own.activation]
    return functional.linear(act(functional.linear(x, down, down_bias)), up, up_bias)


@pytest.fixture(scope="module")
def made(
    tiny_source: Callable[[str], Source], tune: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """`made(arch)`: the graph with slots for a LoRA everywhere and for all of `adapters_for`, or with none."""

    @cache
    def make(arch: str, slots: bool = True, weights: str = "auto") -> Path:
        adapters = [fold_peft(tune(arch).folder, "lora"), *adapters_for(LAYERS[arch]).values()] if slots else []
        source = replace(tiny_source(arch), options={"onnx": OnnxOptions(weights=weights)})
        return write_base(source, tmp_path_factory.mktemp("made"), adapters)

    return make


@pytest.fixture
def opened(
    made: Made, tune: Callable[..., Any], open_engine: Callable[..., OnnxEngine], tmp_path: Path
) -> Callable[..., OnnxEngine]:
    """`opened(arch)`: the engine with the LoRA and all of `adapters_for` loaded, whose files lie in `tmp_path`."""

    def open_(arch: str) -> OnnxEngine:
        base = made(arch)
        engine = open_engine(base)
        for name, adapter in {"lora": fold_peft(tune(arch).folder, "lora"), **adapters_for(LAYERS[arch])}.items():
            write_adapter(adapter, base, tmp_path / name, base_fingerprint="0" * 64)
            engine.load_adapter(name, tmp_path / name)
        return engine

    return open_


def decoded(engine: OnnxEngine, tokens: list[int], adapters: Mapping[str, float] | None = None) -> np.ndarray:
    engine.activate(adapters or {})
    engine.truncate(0)
    return engine.decode_all(tokens)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_checker_of_onnx_passes(arch: str, made: Made) -> None:
    onnx.checker.check_model(made(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_adapter_does_what_hooks_do_in_torch(
    arch: str, opened: Callable[..., OnnxEngine], tiny_source: Callable[[str], Source], rows: list[list[int]]
) -> None:
    engine, model, known = opened(arch), tiny_source(arch).model, adapters_for(LAYERS[arch])
    assert model is not None
    plain = in_torch(model, {}, known)
    before = decoded(engine, rows[0])
    for name in known:
        engine.activate({name: 1.0})
        expected = in_torch(model, {name: 1.0}, known)
        assert np.abs(expected(rows[0]) - plain(rows[0])).max() > 0.5, name
        assert compare(expected, engine, rows).kl < EXACT, name
        assert np.array_equal(decoded(engine, rows[0]), before)
    assert compare(plain, engine, rows).kl < EXACT


@pytest.mark.parametrize(("arch", "weights"), [*((arch, "auto") for arch in ARCHITECTURES), ("llama", "int8")])
def test_slots_that_nothing_fills_change_no_bit(
    arch: str, weights: str, made: Made, open_engine: Callable[..., OnnxEngine], rows: list[list[int]]
) -> None:
    with_slots, without = (decoded(open_engine(made(arch, slots, weights)), rows[0]) for slots in (True, False))
    assert np.array_equal(with_slots, without)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_shapes_of_adapters_act_at_once_as_hooks_on_peft_s_layers_do(
    arch: str, opened: Callable[..., OnnxEngine], tune: Callable[..., Any], rows: list[list[int]]
) -> None:
    engine, model, known = opened(arch), tune(arch).peft.get_base_model(), adapters_for(LAYERS[arch])
    scales = dict(zip(known, (0.5, -0.3, 0.8, 1.5, 0.7, -1.2), strict=True))
    expected = in_torch(model, scales, known)
    engine.activate({"lora": 1.0, **scales})
    assert compare(expected, engine, rows).kl < EXACT
    together = decoded(engine, rows[0], {"lora": 1.0, **scales})
    assert np.abs(together - tune(arch).adapted(rows[0])).max() > 0.5
    turned = dict(reversed([("lora", 1.0), *scales.items()]))
    np.testing.assert_allclose(decoded(engine, rows[0], turned), together, atol=1e-4)


def test_scale_0_is_the_base(opened: Callable[..., OnnxEngine], rows: list[list[int]]) -> None:
    engine = opened("llama")
    zero = dict.fromkeys(adapters_for(2), 0.0)
    assert np.array_equal(decoded(engine, rows[0], zero), decoded(engine, rows[0]))


def test_a_graph_has_the_slots_that_its_adapters_need_and_no_others(
    tiny_source: Callable[[str], Source], tmp_path: Path
) -> None:
    wanted = [ia3(1), blocks("pfeiffer", 1, "gelu", "output", ("mlp",), 5)]
    base = write_base(tiny_source("llama"), tmp_path, wanted)
    given = {value.name for value in onnxruntime.InferenceSession(str(base)).get_overridable_initializers()}
    network = "model.layers.0.mlp.bottleneck_gelu_output"
    assert given == {
        "logits_start",
        "model.layers.0.attn.qkv_proj.output_scaling",
        "model.layers.0.mlp.down_proj.input_scaling",
        *(f"{network}.{part}" for part in ("down", "down_bias", "up", "up_bias")),
    }


@pytest.mark.parametrize("options", [OnnxOptions(), OnnxOptions(weights="int4")])
def test_factors_act_behind_a_bias(options: OnnxOptions, tiny_source: Callable[[str], Source], tmp_path: Path) -> None:
    base = write_base(replace(tiny_source("qwen2"), options={"onnx": options}), tmp_path, [ia3(1)])
    (node,) = [n for n in onnx.load(base).graph.node if "model.layers.0.attn.qkv_proj.output_scaling" in n.input]
    assert node.input[0] == "/model/layers.0/attn/qkv_proj/Add/output_0"


def test_the_output_layer_takes_slots_too(
    tiny_source: Callable[[str], Source], open_engine: Callable[..., OnnxEngine], rows: list[list[int]], tmp_path: Path
) -> None:
    source, rng = tiny_source("qwen2"), np.random.default_rng(0)
    assert source.model is not None
    vocabulary = source.model.config.vocab_size
    a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((4, HIDDEN), (vocabulary, 4)))
    factors = rng.uniform(0, 2, vocabulary).astype(np.float32)
    adapters = {
        "ia3": Tensors("ia3", "ia3", {"lm_head": Scaling(factors, "output")}),
        "lora": LowRank("lora", "lora", {"lm_head": Delta(a, b)}),
    }
    base = write_base(source, tmp_path, list(adapters.values()))
    engine = open_engine(base)
    for name, adapter in adapters.items():
        write_adapter(adapter, base, tmp_path / name, base_fingerprint="0" * 64)
        engine.load_adapter(name, tmp_path / name)
    with torch.no_grad():
        hidden = source.model.model(torch.tensor([rows[0]])).last_hidden_state[0].numpy()
    expected = (hidden @ (source.model.lm_head.weight.detach().numpy() + b @ a).T) * factors
    np.testing.assert_allclose(decoded(engine, rows[0], {"ia3": 1.0, "lora": 1.0}), expected, atol=1e-4)


def test_an_adapter_in_f16_gives_nearly_the_same_logits(
    made: Made,
    tiny_source: Callable[[str], Source],
    open_engine: Callable[..., OnnxEngine],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    known, model = adapters_for(2), tiny_source("llama").model
    assert model is not None
    for name in ("ia3", "houlsby"):
        write_adapter(known[name], made("llama"), tmp_path / name, dtype="f16", base_fingerprint="0" * 64)
        assert compare(in_torch(model, {name: 1.0}, known), open_engine(made("llama"), tmp_path / name), rows).kl < 1e-4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnxruntime_genai_gives_the_same_texts(
    arch: str, made: Made, opened: Callable[..., OnnxEngine], tmp_path: Path
) -> None:
    engine, model = opened(arch), og.Model(str(made(arch).parent))
    adapters, known = og.Adapters(model), adapters_for(LAYERS[arch])
    for name in known:
        adapters.load(str(tmp_path / name), name)
    prompt = engine.tokenizer.tokenize("<|im_start|>user\nturn on the warm light in the kitchen<|im_end|>\n")

    texts = {name: greedy(engine, prompt, {name: 1.0} if name else {}, 12) for name in (None, *known)}
    assert len({tuple(text) for text in texts.values()}) == len(texts)
    for name in (None, *known, None):
        assert greedy_in_genai(model, adapters, prompt, name, 12) == texts[name], name


def test_inputs_of_modules_that_share_a_product_are_refused(
    tiny_source: Callable[[str], Source], tmp_path: Path
) -> None:
    scaling = Scaling(np.ones(HIDDEN, np.float32), "input")
    adapter = Tensors("any", "ia3", {f"model.layers.0.mlp.{end}": scaling for end in ("up_proj", "gate_proj")})
    with pytest.raises(IncompatibleError, match=r"inputs of .*mlp\.gate_proj, .*mlp\.up_proj.*merged: true") as caught:
        write_base(tiny_source("llama"), tmp_path, [adapter])
    assert "\n" not in str(caught.value)


def wide(width: int) -> Scaling:
    return Scaling(np.ones(width, np.float32), "output")


K, Q, MLP = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("scalings", "bottlenecks", "reason"),
    [
        ({"model.layers.9.mlp.down_proj": wide(HIDDEN)}, {}, r"no slot for the output of model\.layers\.9"),
        ({K: Scaling(np.ones(HIDDEN, np.float32), "input")}, {}, r"no slot for the input of .*k_proj"),
        # As many factors as the product of q, k and v takes, but not as many each.
        ({K: wide(KEYS - 1), Q: wide(HIDDEN + 1)}, {}, r".*k_proj has factors of shape \(31,\), the base needs 32"),
        ({}, {"model.norm": bottleneck(1)}, r"no slot for a bottleneck .* of model\.norm"),
        ({}, {MLP: bottleneck(1, "silu", "output")}, r"no slot for a bottleneck \(silu, reads output\)"),
        (
            {},
            {MLP: replace(bottleneck(1), down=np.ones((8, 63), np.float32))},
            r".*relu_output\.down' has shape \(63, 8\), the graph needs \(64, 'rank'\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_slots_is_refused(
    scalings: dict[str, Scaling], bottlenecks: dict[str, Bottleneck], reason: str, made: Made, tmp_path: Path
) -> None:
    adapter = Tensors("command", "any", scalings, bottlenecks)
    with pytest.raises(IncompatibleError, match=f"'command' does not fit the graph: {reason}") as caught:
        write_adapter(adapter, made("llama"), tmp_path / "adapter", base_fingerprint="0" * 64)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_for_the_graph_loads_nothing(
    tiny_source: Callable[[str], Source],
    opened: Callable[..., OnnxEngine],
    open_engine: Callable[..., OnnxEngine],
    tmp_path: Path,
) -> None:
    opened("llama")
    small = write_base(tiny_source("llama"), tmp_path, [ia3(2)])
    engine = open_engine(small)
    with pytest.raises(IncompatibleError, match=r"'houlsby' does not fit the graph: unknown slot .*and 13 more"):
        engine.load_adapter("houlsby", tmp_path / "houlsby")
    with pytest.raises(NotFoundError):
        engine.activate({"houlsby": 1.0})

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.backends.base import Source
from edgetune_export.parity import divergence
from edgetune_runtime import IncompatibleError, Runtime, UsageError
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.context import Context
from edgetune_runtime.states.activation import join_spans, spans_of
from runtime.bundles import folded, low_rank, write_manifest
from runtime.shaped import random_prefix, write_shaped

INVOCATION = (7, 8, 9)
CASES = [(arch, backend) for arch in ("llama", "qwen3", "gemma3") for backend in ("gguf", "onnx")]
CLOSE = {"gguf": 1e-5, "onnx": 1e-9}
"""Mean KL from PEFT: llama.cpp keeps keys and values in 16 bits."""
HEAD, TAIL = [20, 30, 40, 50, 60, 70] * 5, [21, 31, 41]
ROWS = {
    "at the end": [*HEAD, *INVOCATION],
    "in the middle": [*HEAD, *INVOCATION, *TAIL],
    "twice": [20, *INVOCATION, *TAIL, *INVOCATION, *TAIL],
    "first": [*INVOCATION, *TAIL],
    "cut off": [*HEAD, 7, 8],
    "nowhere": [*HEAD, *TAIL],
}


def test_an_adapter_acts_from_the_last_place_of_its_tokens_on() -> None:
    scales, waiting = {"wait": 1.0, "plain": 0.5}, {"wait": INVOCATION}
    others, found = {"plain": 0.5}, [spans_of(scales, waiting, row) for row in ROWS.values()]
    joined = [((0, others), (since, scales)) for since in (30, 30, 7)]
    assert found == [*joined, ((0, scales),), ((0, others),), ((0, others),)]


def test_spans_of_carried_tokens_are_kept_before_those_of_the_new_adapters() -> None:
    earlier = ((0, {"a": 1.0}), (4, {"b": 1.0}))
    assert join_spans(earlier, 6, ((0, {"c": 1.0}),)) == (*earlier, (6, {"c": 1.0}))
    assert join_spans(earlier, 3, ((0, {}), (9, {"c": 1.0}))) == ((0, {"a": 1.0}), (3, {}), (9, {"c": 1.0}))
    assert join_spans(earlier, 0, ((0, {"c": 1.0}),)) == ((0, {"c": 1.0}),)


def test_only_one_adapter_may_wait_for_its_tokens() -> None:
    waiting = {"one": (1,), "two": (2,)}
    with pytest.raises(UsageError, match="'one' and 'two' both have invocation tokens"):
        spans_of({"one": 1.0, "two": 1.0}, waiting, [1, 2])
    assert [since for since, _ in spans_of({"one": 1.0, "two": 0.0}, waiting, [5, 1])] == [0, 1]


@pytest.fixture(scope="module")
def activated(tiny_source: Callable[[str], Source]) -> Callable[[str], tuple[Any, LowRank]]:
    """`activated(arch)`: PEFT's model of a random activated LoRA on the tiny base, and the same folded."""
    import torch  # noqa: PLC0415 - torch only where a test needs it
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    @cache
    def make(arch: str) -> tuple[Any, LowRank]:
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
        config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(INVOCATION), **options)
        peft = get_peft_model(copy.deepcopy(tiny_source(arch).model), config).eval()
        generator, modules = torch.Generator().manual_seed(1), {}
        with torch.no_grad():
            for name, module in peft.named_modules():
                if hasattr(module, "lora_A"):
                    a, b = (module.lora_A["default"].weight, module.lora_B["default"].weight)
                    for weight in (a, b):
                        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
                    plain = name.removeprefix("base_model.model.")
                    modules[plain] = Delta(a.numpy().copy(), b.numpy() * np.float32(module.scaling["default"]))
        return peft, LowRank("wait", "alora", modules, INVOCATION)

    return make


@pytest.fixture(scope="module")
def bundle_of(
    tiny_source: Callable[[str], Source],
    activated: Callable[[str], tuple[Any, LowRank]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`bundle_of(arch)`: a bundle in both formats with `wait`, `plain` and `prefix`."""

    @cache
    def make(arch: str) -> Path:
        source = tiny_source(arch)
        plain = folded(source.path, low_rank(source.path, seed=3), "plain")
        parts = {"wait": activated(arch)[1], "plain": plain, "prefix": random_prefix(source.path, 6)}
        return write_shaped(tmp_path_factory.mktemp(arch) / "home", source, parts)

    return make


@pytest.fixture
def context_of(bundle_of: Callable[[str], Path]) -> Iterator[Callable[..., Context]]:
    """`context_of(arch, backend)`: the context of a freshly opened bundle."""
    runtimes: list[Runtime] = []

    def make(arch: str, backend: str, bundle: Path | None = None) -> Context:
        options = {"engine": backend, "context_length": 128, "exact": False, "preload": "all"}
        runtimes.append(Runtime.open(bundle or bundle_of(arch), **options))
        return loaded_bundle(runtimes[-1]).context()[0]

    yield make
    for runtime in runtimes:
        runtime.close()


def torch_logits(peft: Any, tokens: Sequence[int]) -> np.ndarray:  # noqa: ANN401 - PEFT carries no types
    from edgetune.shipping.verify import logits_of  # noqa: PLC0415 - as above

    return logits_of(peft)(list(tokens))


def walked(context: Context, adapters: dict[str, float], tokens: Sequence[int]) -> np.ndarray:
    with context.hold():
        return np.concatenate(list(context.walk(adapters, tokens, 7)))


@pytest.mark.parametrize(("arch", "backend"), CASES)
def test_logits_are_those_of_peft(
    arch: str,
    backend: str,
    activated: Callable[[str], tuple[Any, LowRank]],
    context_of: Callable[..., Context],
) -> None:
    context, (peft, _) = context_of(arch, backend), activated(arch)
    for name, row in ROWS.items():
        expected = torch_logits(peft, row)
        assert divergence(expected, walked(context, {"wait": 1.0}, row)).mean() < CLOSE[backend], name
        with context.hold():
            last = context.start({"wait": 1.0}, row).logits
            # What is generated is computed as PEFT does: the adapter stays on, or off.
            answered = context.extend([33, 44])
        assert divergence(expected[-1:], last[None]).mean() < CLOSE[backend] * 10, name
        assert divergence(torch_logits(peft, [*row, 33, 44])[-2:], answered).mean() < CLOSE[backend] * 10, name
    with peft.disable_adapter():
        base = torch_logits(peft, ROWS["twice"])
        assert divergence(base, walked(context, {}, ROWS["twice"])).mean() < CLOSE[backend]
        plain = torch_logits(peft, ROWS["in the middle"])
    assert divergence(torch_logits(peft, ROWS["in the middle"]), plain)[30:].mean() > 0.01


@pytest.mark.parametrize("backend", ["gguf", "onnx"])
def test_the_base_and_the_activated_adapter_share_the_state_before_the_invocation(
    backend: str, context_of: Callable[..., Context]
) -> None:
    context, row = context_of("llama", backend), ROWS["in the middle"]
    with context.hold():
        context.start({}, [*HEAD, 90, 91, 92, 93])
        assert context.start({"wait": 1.0}, row).reused == len(HEAD)
        assert context.start({"wait": 1.0}, [*row, 33]).reused == len(row)
        # Back at the base, its own state knows more than the other's beginning.
        assert context.start({}, [*HEAD, 90, 91, 92, 93]).reused == len(HEAD) + 3
        assert context.start({"wait": 1.0}, [*row, 34]).reused == len(row)
        assert context.start({"plain": 1.0}, row).reused == 0
        # The tokens stand elsewhere: no more than what lies before both places is the same.
        later = [*HEAD[:12], *INVOCATION, *HEAD[:12]]
        assert context.start({"wait": 1.0}, later).reused == 12


@pytest.mark.parametrize("backend", ["gguf", "onnx"])
def test_no_state_of_one_answer_shapes_another(backend: str, context_of: Callable[..., Context]) -> None:
    sets: list[dict[str, float]] = [
        {},
        {"wait": 1.0},
        {"wait": 0.5},
        {"plain": 1.0},
        {"plain": 1.0, "wait": 1.0},
        {"prefix": 1.0, "wait": 1.0},
        {"prefix": 1.0},
    ]
    rng, context = np.random.default_rng(0), context_of("llama", backend)
    rows, known = list(ROWS.values()), {}
    for _ in range(60):
        adapters, row = rng.integers(len(sets)), rng.integers(len(rows))
        with context.hold():
            found = context.start(sets[adapters], rows[row]).logits
            context.extend([33])
        if (adapters, row) not in known:
            fresh = context_of("llama", backend)
            with fresh.hold():
                known[adapters, row] = fresh.start(sets[adapters], rows[row]).logits
        assert divergence(known[adapters, row][None], found[None]).max() < CLOSE[backend] * 100


def test_tokens_that_a_cut_recomputes_leave_the_adapter_on(
    activated: Callable[[str], tuple[Any, LowRank]],
    context_of: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, row = context_of("llama", "gguf"), ROWS["at the end"]
    truncate = context.engine.truncate
    with context.hold():
        context.start({"wait": 1.0}, row)
        # As a recurrent state that has no place to go back to but the beginning.
        monkeypatch.setattr(context.engine, "truncate", lambda _keep: truncate(0))
        context.truncate(len(HEAD))
        found = context.extend(INVOCATION)
    expected = torch_logits(activated("llama")[0], row)[len(HEAD) :]
    assert divergence(expected, found).mean() < CLOSE["gguf"] * 10


@pytest.mark.parametrize("backend", ["gguf", "onnx"])
def test_beside_another_adapter_both_act_behind_the_tokens_and_one_before(
    backend: str, context_of: Callable[..., Context]
) -> None:
    context, row = context_of("llama", backend), ROWS["in the middle"]
    found = walked(context, {"wait": 1.0, "plain": 1.0}, row)
    engine = context.engine
    engine.activate({"plain": 1.0})
    engine.truncate(0)
    before = engine.decode_all(row[:30])
    engine.activate({"plain": 1.0, "wait": 1.0})
    expected = np.concatenate([before, engine.decode_all(row[30:])])
    context.reset()
    assert divergence(expected, found).max() < CLOSE[backend] * 10


def test_a_file_whose_tokens_the_manifest_does_not_name_is_refused(bundle_of: Callable[[str], Path]) -> None:
    bundle = bundle_of("llama")
    manifest = read_manifest(bundle)
    entries = {**manifest.adapters, "wait": replace(manifest.adapters["wait"], invocation=())}
    try:
        write_manifest(bundle, manifest.base, entries)
        with pytest.raises(IncompatibleError, match=r"has the invocation tokens \(7, 8, 9\), the manifest has \(\)"):
            Runtime.open(bundle, engine="gguf", preload="all")
    finally:
        write_manifest(bundle, manifest.base, manifest.adapters)
    with Runtime.open(bundle, engine="gguf") as runtime:
        assert runtime.perplexity("turn on the light", adapter="wait") == runtime.perplexity("turn on the light")

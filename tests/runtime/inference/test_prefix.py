from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from close import Close
from edgetune_export.adapters.shapes import LowRank, Prefix
from edgetune_export.backends.base import Source
from edgetune_export.parity import divergence
from edgetune_runtime import EdgetuneError, IncompatibleError, Runtime, UsageError, VerificationError
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.bundles import folded, low_rank
from runtime.shaped import BACKENDS, random_prefix, torch_logits, write_shaped

Sources = Callable[[str], Source]
Adapters = str | dict[str, float] | None
ENGINES: dict[str, Any] = {"gguf": GgufEngine, "onnx": OnnxEngine}
CONTEXT, TOKENS = 96, 12
CLOSE = {"gguf": 1e-5, "onnx": 1e-9}
"""Mean KL from torch: llama.cpp keeps keys and values in 16 bits."""
ROW = np.random.default_rng(1).integers(5, 380, 40).tolist()
CASES = [(arch, backend) for arch in ("llama", "qwen2", "qwen3", "gemma3") for backend in ENGINES]


def parts_of(base: Path) -> dict[str, Prefix | LowRank]:
    """Two prefixes, one longer than the tiny Gemma's sliding window of 16, and a low-rank adapter."""
    lora = folded(base, low_rank(base, seed=1), "lora")
    return {"prefix": random_prefix(base, TOKENS), "long": random_prefix(base, 30, 1, "long"), "lora": lora}


@pytest.fixture(scope="module")
def bundle_of(tiny_source: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bundle_of(arch)`: a bundle in both formats with `prefix`, `long` and `lora`."""

    @cache
    def make(arch: str) -> Path:
        source = tiny_source(arch)
        return write_shaped(tmp_path_factory.mktemp(arch) / "home", source, parts_of(source.path))

    return make


@pytest.fixture
def open_engine(bundle_of: Callable[[str], Path]) -> Iterator[Callable[[str, str], Any]]:
    """`open_engine(arch, backend)`: an engine with all three adapters loaded."""
    engines: list[Any] = []

    def make(arch: str, backend: str, context_length: int = CONTEXT) -> Any:  # noqa: ANN401 - either engine
        bundle = bundle_of(arch)
        path = next((bundle / "base").rglob("model.gguf" if backend == "gguf" else "model.onnx"))
        engine = ENGINES[backend](path, context_length=context_length, threads=1)
        engines.append(engine)
        for name in ("prefix", "long", "lora"):
            engine.load_adapter(name, bundle / "adapters" / name / BACKENDS[backend].ADAPTER_FILE)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["gguf", "onnx"])
def engine(request: pytest.FixtureRequest, open_engine: Callable[[str, str], Any]) -> Any:  # noqa: ANN401 - as above
    return open_engine("llama", request.param)


def run(engine: Any, adapters: dict[str, float], tokens: Sequence[int] = ROW) -> np.ndarray:  # noqa: ANN401 - as above
    engine.activate(adapters)
    engine.truncate(0)
    logits: np.ndarray = engine.decode_all(tokens)
    return logits


@pytest.mark.parametrize(("arch", "backend"), CASES)
def test_an_engine_computes_behind_a_prefix_what_torch_computes(
    arch: str, backend: str, tiny_source: Sources, open_engine: Callable[[str, str], Any]
) -> None:
    source, engine = tiny_source(arch), open_engine(arch, backend)
    parts = parts_of(source.path)
    base = run(engine, {})
    for adapters in ({"prefix": 1.0}, {"long": 1.0}, {"prefix": 1.0, "lora": 1.0}):
        chosen = [parts[name] for name in adapters]
        prefix, delta = (next((p for p in chosen if isinstance(p, kind)), None) for kind in (Prefix, LowRank))
        expected, found = torch_logits(source, ROW, prefix, delta), run(engine, adapters)
        assert divergence(expected, found).mean() < CLOSE[backend]
        assert (expected.argmax(-1) == found.argmax(-1)).mean() > 0.95
        assert divergence(expected, base).mean() > 0.05
    assert np.array_equal(run(engine, {}), base)
    assert np.array_equal(run(open_engine(arch, backend), {}), base)


@pytest.mark.parametrize(("arch", "backend"), [case for case in CASES if case[0] in ("llama", "gemma3")])
def test_a_sequence_behind_a_prefix_is_trimmed_saved_and_restored(
    arch: str, backend: str, open_engine: Callable[[str, str], Any]
) -> None:
    engine = open_engine(arch, backend)
    for name in ("prefix", "long"):
        whole = run(engine, {name: 1.0})
        state = engine.save_state()
        kept = engine.truncate(10)
        assert engine.decode_all(ROW[kept:]) == Close(whole[kept:], 0.03)
        assert engine.truncate(0) == 0
        assert np.array_equal(engine.decode_all(ROW), whole)
        following = engine.decode(ROW[:3])
        run(engine, {})
        engine.activate({name: 1.0})
        engine.restore_state(state)
        assert engine.decode(ROW[:3]) == Close(following, 0.03)


def test_scores_behind_a_prefix_are_those_of_decoding_the_labels(engine: Any) -> None:  # noqa: ANN401 - as above
    labels = [ROW[5:8], ROW[5:7], ROW[20:24]]
    run(engine, {"prefix": 1.0}, ROW[:4])
    scores = engine.score(labels)
    for label, score in zip(labels, scores, strict=True):
        rows = run(engine, {"prefix": 1.0}, ROW[:4] + label)[3:-1].astype(np.float64)
        log_p = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        assert score == pytest.approx(log_p[range(len(label)), label].sum(), abs=0.02)


def test_a_low_rank_switch_keeps_the_sequence_and_another_prefix_drops_it(engine: Any) -> None:  # noqa: ANN401 - as above
    run(engine, {"prefix": 1.0}, ROW[:10])
    engine.activate({"prefix": 1.0, "lora": 1.0})
    assert engine.truncate(10) == 10
    engine.activate({"long": 1.0})
    assert engine.decode_all(ROW) == Close(run(engine, {"long": 1.0}), 0.03)


def test_the_prefix_takes_its_share_of_the_context(engine: Any) -> None:  # noqa: ANN401 - as above
    room = CONTEXT - TOKENS
    assert [engine.capacity(adapters) for adapters in ({}, {"lora": 1.0}, {"prefix": 1.0})] == [CONTEXT, CONTEXT, room]
    run(engine, {"prefix": 1.0}, [7] * room)
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens do not fit"):
        engine.decode([7])
    with pytest.raises(UsageError, match="do not fit"):
        engine.score([[7]])


def test_two_prefixes_or_a_scaled_one_are_refused_and_leave_the_sequence(engine: Any) -> None:  # noqa: ANN401 - as above
    before = run(engine, {"prefix": 1.0})
    for adapters, message in (({"prefix": 1.0, "long": 1.0}, "both prefixes"), ({"prefix": 0.5}, "cannot be scaled")):
        with pytest.raises(UsageError, match=message):
            engine.activate(adapters)
        with pytest.raises(UsageError, match=message):
            engine.capacity(adapters)
    engine.truncate(0)
    assert np.array_equal(engine.decode_all(ROW), before)
    assert np.array_equal(run(engine, {"prefix": 0.0}), run(engine, {}))


def test_a_prefix_that_leaves_no_room_is_refused(open_engine: Callable[..., Any]) -> None:
    for backend in ENGINES:
        with pytest.raises(IncompatibleError, match="'long' is a prefix of 30 tokens, too long for a context of 31"):
            open_engine("llama", backend, 31)


def test_a_state_of_another_prefix_is_refused(open_engine: Callable[[str, str], Any]) -> None:
    engine = open_engine("llama", "onnx")
    run(engine, {"prefix": 1.0})
    state = engine.save_state()
    engine.activate({})
    with pytest.raises(VerificationError, match="does not fit"):
        engine.restore_state(state)


CHOICES: list[Adapters] = [None, "prefix", "lora", {"prefix": 1.0, "lora": 1.0}, "long", {"prefix": 0.0}, {"lora": 0.5}]
PROMPTS = ["turn on the warm light in the kitchen", "turn on the warm light in the hall", "play"]


def greedy(runtime: Runtime, prompt: str, adapters: Adapters) -> list[int]:
    """The likeliest three tokens one after another, -1 from where two are as good as equal."""
    context, active = loaded_bundle(runtime).context(adapters)
    chosen: list[int] = []
    with context.hold():
        logits = context.start(active, context.engine.tokenizer.tokenize(prompt)).logits
        while len(chosen) < 3:
            second, first = np.partition(logits, -2)[-2:]
            if first - second < 0.05:
                return [*chosen, *[-1] * (3 - len(chosen))]
            chosen.append(int(logits.argmax()))
            logits = context.extend([chosen[-1]])[0]
    return chosen


@pytest.mark.parametrize(("arch", "backend"), [case for case in CASES if case[0] in ("llama", "gemma3")])
def test_switching_gives_the_answers_of_a_fresh_runtime(
    arch: str, backend: str, bundle_of: Callable[[str], Path]
) -> None:
    def opened() -> Runtime:
        return Runtime.open(bundle_of(arch), engine=backend, context_length=160)

    @cache
    def expected(prompt: int, choice: int) -> list[int]:
        with opened() as runtime:
            return greedy(runtime, PROMPTS[prompt], CHOICES[choice])

    rng = random.Random(0)
    with opened() as runtime:
        for _ in range(30):
            prompt, choice = rng.randrange(len(PROMPTS)), rng.randrange(len(CHOICES))
            found = greedy(runtime, PROMPTS[prompt], CHOICES[choice])
            pairs = zip(found, expected(prompt, choice), strict=True)
            assert all(one == other or -1 in (one, other) for one, other in pairs)
    assert len({tuple(expected(0, choice)) for choice in range(5)}) > 2


@pytest.mark.parametrize("backend", ENGINES)
def test_switching_back_to_a_prefix_computes_nothing_again(backend: str, bundle_of: Callable[[str], Path]) -> None:
    with Runtime.open(bundle_of("llama"), engine=backend, exact=False) as runtime:
        first = runtime.generate(PROMPTS[0], adapter="prefix", temperature=0, max_tokens=4)
        runtime.generate(PROMPTS[0], temperature=0, max_tokens=4)
        again = runtime.generate(PROMPTS[0], adapter="prefix", temperature=0, max_tokens=4)
        assert again.timings.reused_tokens == again.timings.prompt_tokens - 1
        assert again.text == first.text


@pytest.mark.parametrize("backend", ENGINES)
def test_a_state_is_not_carried_over_to_another_prefix(
    backend: str, bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with Runtime.open(bundle_of("llama"), engine=backend, disk_mb=0) as runtime:
        for first, second in ((None, "prefix"), ("prefix", "lora"), ("prefix", "long"), ("prefix", None)):
            with runtime.session(first) as session:
                session.use(second, carry="reuse")
                session.use(first, carry="reuse")
                session.send(PROMPTS[0], max_tokens=4)
                with pytest.raises(IncompatibleError, match=r"different prefixes \(.* and .*\); use carry="):
                    session.use(second, carry="reuse")
                assert session.send(PROMPTS[2], max_tokens=4).timings.carried_tokens
                session.use(second)
                assert session.send(PROMPTS[2], max_tokens=4).timings.carried_tokens == 0
        with runtime.session("prefix") as session:
            session.send(PROMPTS[0], max_tokens=4)
            session.use({"prefix": 1.0, "lora": 1.0}, carry="reuse")
            assert session.send(PROMPTS[2], max_tokens=4).timings.carried_tokens
            # As in a file that an earlier version wrote.
            session.adapter, session._carries = "lora", True
            session.save(tmp_path / "saved")
        with runtime.load_session(tmp_path / "saved") as session, pytest.raises(IncompatibleError, match="prefixes"):
            session.send(PROMPTS[2], max_tokens=4)


@pytest.mark.parametrize("backend", ENGINES)
def test_prompts_answers_and_texts_fill_what_the_prefix_leaves(backend: str, bundle_of: Callable[[str], Path]) -> None:
    with Runtime.open(bundle_of("llama"), engine=backend, context_length=90) as runtime:
        answer = runtime.generate("play", adapter="long", temperature=0, max_tokens=100)
        # The last token is not decoded, so it needs no room.
        assert answer.stop_reason == "length"
        assert answer.timings.prompt_tokens + answer.tokens == 90 - 30 + 1
        with pytest.raises(UsageError, match="the context allows 1 to 60"):
            runtime.generate("play " * 40, adapter="long")
        with pytest.raises(UsageError, match="both prefixes"):
            runtime.generate("play", adapter={"long": 1.0, "prefix": 1.0})
        with pytest.raises(UsageError, match="both prefixes"):
            runtime.session({"long": 1.0, "prefix": 1.0})
        with runtime.session("long") as session:
            with pytest.raises(UsageError, match="cannot be scaled"):
                session.use({"long": 0.5})
            assert session.adapter == "long"
        nats, count = runtime.negative_log_likelihood("turn on the light in the hall " * 20, adapter="long")
        assert count > 100
        assert np.isfinite(nats)


@pytest.mark.parametrize("backend", ENGINES)
def test_every_call_says_that_a_prefix_leaves_too_little_of_the_context(
    backend: str, bundle_of: Callable[[str], Path]
) -> None:
    with Runtime.open(bundle_of("llama"), engine=backend, context_length=31) as runtime:
        for call in (runtime.generate, runtime.perplexity):
            with pytest.raises(IncompatibleError, match=r"for a context of 31; open .* at least 32"):
                call("play music", adapter="long")
        with pytest.raises(IncompatibleError, match="too long for a context of 31"):
            runtime.session("long")


def file_of(bundle: Path, backend: str) -> Path:
    return bundle / "adapters/prefix" / str(BACKENDS[backend].ADAPTER_FILE)


def changed(prefix: Prefix, **changes: np.ndarray) -> Prefix:
    return Prefix("prefix", "prefix", changes.get("keys", prefix.keys), changes.get("values", prefix.values))


def test_a_prefix_of_another_base_is_not_written(tiny_source: Sources, bundle_of: Callable[[str], Path]) -> None:
    prefix = random_prefix(tiny_source("llama").path, 4)
    wrong = [
        changed(prefix, keys=prefix.keys[:1], values=prefix.values[:1]),
        changed(prefix, keys=prefix.keys[:, :1], values=prefix.values[:, :1]),
        changed(prefix, keys=prefix.keys[:, :, :0], values=prefix.values[:, :, :0]),
    ]
    bundle = bundle_of("llama")
    for backend, base in (("gguf", "model.gguf"), ("onnx", "model.onnx")):
        path, out = next((bundle / "base").rglob(base)), bundle / "none"
        for prefix in wrong:
            with pytest.raises(IncompatibleError, match="prefix 'prefix' has keys of shape"):
                BACKENDS[backend].write_adapter(prefix, path, out, dtype="f16", base_fingerprint="0" * 64)
        assert not out.exists()


def test_values_that_16_bits_cannot_hold_are_not_written(tiny_source: Sources, tmp_path: Path) -> None:
    source = tiny_source("llama")
    prefix = random_prefix(source.path, 4)
    prefix.values[1, 0, 2, 3] = 7e4
    with pytest.raises(VerificationError, match="'prefix' in its values reaches 7e"):
        BACKENDS["gguf"].write_adapter(prefix, source.path, tmp_path / "x", base_fingerprint="")


def rewritten(engine: Any, path: Path, prefix: Prefix, out: Path) -> Path:  # noqa: ANN401 - as above
    """The file with another prefix's values but nothing checked; GGUF tensors keep their headers."""
    import onnxruntime  # noqa: PLC0415 - only where a test needs it

    if isinstance(engine, OnnxEngine):
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        made = onnxruntime.AdapterFormat()
        made.set_adapter_version(1)
        made.set_model_version(file.get_model_version())
        values = {}
        for layer, (keys, rows) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            values |= {f"past_key_values.{layer}.key": keys[None], f"past_key_values.{layer}.value": rows[None]}
        given = {key: np.ascontiguousarray(value) for key, value in values.items()}
        made.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in given.items()})
        made.export_adapter(str(out))
        return out
    data = bytearray(path.read_bytes())
    for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        for which, heads in zip("kv", pair, strict=True):
            tensor = read_header(path).tensors[f"blk.{layer}.prefix_{which}"]
            data[tensor.offset : tensor.offset + tensor.nbytes] = heads.swapaxes(0, 1).astype("<f4").tobytes()
    out.write_bytes(data)
    return out


def test_values_that_are_no_numbers_are_refused(
    engine: Any,  # noqa: ANN401 - as above
    tiny_source: Sources,
    bundle_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    backend = "onnx" if isinstance(engine, OnnxEngine) else "gguf"
    for number in (np.nan, np.inf):
        prefix = random_prefix(tiny_source("llama").path, TOKENS)
        prefix.keys[1, 0, 2, 3] = number
        path = rewritten(engine, file_of(bundle_of("llama"), backend), prefix, tmp_path / "damaged")
        with pytest.raises(VerificationError, match="finite"):
            engine.load_adapter("damaged", path)


def test_a_prefix_of_other_shapes_or_another_base_is_refused(
    open_engine: Callable[[str, str], Any], tiny_source: Sources, bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for backend in ENGINES:
        engine = open_engine("llama", backend)
        file = file_of(bundle_of("llama"), backend)
        with pytest.raises(IncompatibleError, match="another base"):
            engine.load_adapter("new", file, "0" * 64)
        for arch in ("gemma3", "qwen2"):
            other = file_of(bundle_of(arch), backend)
            if backend == "gguf" or arch == "gemma3":
                with pytest.raises(IncompatibleError):
                    engine.load_adapter("new", other)
    prefix = random_prefix(tiny_source("llama").path, TOKENS)
    fewer = changed(prefix, keys=prefix.keys[:, :, :5])
    path = rewritten(engine, file, fewer, tmp_path / "fewer")
    with pytest.raises(VerificationError, match="same number of tokens"):
        engine.load_adapter("new", path)
    narrow = changed(prefix, keys=prefix.keys[..., :8])
    with pytest.raises(IncompatibleError, match="heads of 16"):
        engine.load_adapter("new", rewritten(engine, file, narrow, tmp_path / "narrow"))


def test_a_damaged_gguf_prefix_is_refused_or_harmless(
    open_engine: Callable[[str, str], Any], bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    engine, file = open_engine("llama", "gguf"), file_of(bundle_of("llama"), "gguf")
    data, rng = file.read_bytes(), random.Random(0)
    start = min(tensor.offset for tensor in read_header(file).tensors.values())
    before, refused = run(engine, {"prefix": 1.0}), 0
    path = tmp_path / "damaged.gguf"
    for number in range(300):
        flipped = bytearray(data)
        flipped[rng.randrange(start)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            engine.load_adapter(str(number), path)
            run(engine, {str(number): 1.0}, ROW[:2])
        except EdgetuneError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150
    path.write_bytes(data[:-9])
    with pytest.raises(VerificationError, match="ends within"):
        engine.load_adapter("cut", path)
    assert np.array_equal(run(engine, {"prefix": 1.0}), before)


def test_a_state_that_llama_cpp_does_not_give_back_is_refused(
    open_engine: Callable[[str, str], Any], bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, file = open_engine("llama", "gguf"), file_of(bundle_of("llama"), "gguf")
    for wrong in (0, 2):
        monkeypatch.setattr("edgetune_runtime.engines.gguf.state._F16", wrong)
        with pytest.raises(IncompatibleError, match="has another layout than adapter"):
            engine.load_adapter("new", file)

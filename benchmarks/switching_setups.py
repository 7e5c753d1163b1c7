"""The setups that `switching.py` compares: several adapters on one base, in edgetune and in other libraries.

Each setup is a class. `answer` gives the tokens of a greedy answer, the time of the switch call and the time to first
token; `cold` drops all cached tokens. Each process runs one setup, so that its resident memory can be measured.
"""

from __future__ import annotations

from benchmarks.harness.bundles import resolve_base

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from benchmarks.libraries import complete, genai_adapters, genai_generator, llama_server_params, open_llama

CONTEXT = 1280
STEPS = 16

Tokens = list[int] | list[str]
"""The ids of tokens, or their texts if a setup does not return ids."""


@dataclass(frozen=True)
class TimedAnswer:
    """A greedy answer, the time of the switch call, and the time to first token including the switch, in seconds.

    `steps_s` are the seconds of each token after the first.
    """

    tokens: Tokens
    switch_s: float
    first_s: float
    steps_s: list[float]


class Setup(Protocol):
    """A setup that can switch between adapters."""

    def answer(self, request: Request) -> TimedAnswer:
        """Switch to the request's adapter and answer its prompt."""

    def cold(self) -> None:
        """Drop all cached tokens."""


@dataclass(frozen=True)
class Folder:
    """The prepared files: a bundle with all adapters, or with the first one only."""

    path: Path
    adapters: int
    threads: int

    @property
    def bundle(self) -> Path:
        return self.path / ("bundle" if self.adapters > 1 else "one")

    @property
    def base(self) -> Path:
        return next((self.bundle / "base").glob("*.gguf"))

    def name(self, adapter: int) -> str:
        return f"task{adapter}"

    def files(self, file: str) -> dict[str, Path]:
        """The file of this name of each adapter."""
        names = map(self.name, range(self.adapters))
        return {name: self.bundle / "adapters" / name / file for name in names}


@dataclass(frozen=True)
class Request:
    """One request: an adapter, the whole prompt, the length of its fixed part, and its last message."""

    adapter: int
    prompt: list[int]
    fixed: int
    message: str


class Edgetune:
    """edgetune's runtime: switch, restore the prompt's state, prefill the message."""

    def __init__(self, folder: Folder, engine: str, *, repack: bool | None = None) -> None:
        from edgetune_runtime import Runtime
        from edgetune_runtime.inference.measuring import loaded_bundle

        self.folder = folder
        self.runtime = Runtime.open(
            folder.bundle,
            engine=engine,
            threads=folder.threads,
            context_length=CONTEXT,
            cache_mb=1000,
            disk_mb=0,
            contexts=1,
            repack=repack,
            map_large_blocks=True,
        )
        self.loaded = loaded_bundle(self.runtime)
        self.runtime.warm()

    def answer(self, request: Request) -> TimedAnswer:
        begin = time.perf_counter()
        call = self.loaded.call(request.message, self.folder.name(request.adapter))
        assert (call.job.tokens, call.job.fixed) == (request.prompt, request.fixed)
        with call.lease() as context:
            start = context.run(call.job)

            def steps() -> Iterator[int]:
                token = int(start.logits.argmax())
                while True:
                    yield token
                    token = int(context.extend([token])[0].argmax())

            return _timed(steps(), begin, start.switch_us / 1e6)

    def cold(self) -> None:
        self.runtime.clear_cache()

    def states_mb(self) -> float:
        """Size of the states in memory, in 10^6 bytes."""
        return self.loaded.context()[0].shared.cache.bytes / 1e6

    def adapters_mb(self) -> float:
        """Size of the adapters' files, in 10^6 bytes."""
        entries, files = self.runtime.manifest.adapters.values(), self.runtime.manifest.files
        return sum(files[entry.files[self.runtime.engine]].bytes for entry in entries) / 1e6


class LowLevel:
    """llama-cpp-python's low-level switch on one `Llama`; the whole prompt is recomputed."""

    def __init__(self, folder: Folder) -> None:
        import llama_cpp

        self.low, self.llama = llama_cpp, _llama(folder)
        paths = folder.files("adapter.gguf").values()
        adapters = [llama_cpp.llama_adapter_lora_init(self.llama.model, bytes(path)) for path in paths]
        self.adapters = [(llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter) for adapter in adapters]
        self.scale = (ctypes.c_float * 1)(1.0)

    def answer(self, request: Request) -> TimedAnswer:
        begin = time.perf_counter()
        self.low.llama_set_adapters_lora(self.llama.ctx, self.adapters[request.adapter], 1, self.scale)
        switch_s = time.perf_counter() - begin
        self.llama.reset()
        return _timed(self.llama.generate(request.prompt, temp=0.0), begin, switch_s)

    def cold(self) -> None:
        self.llama.reset()


class Reload:
    """llama-cpp-python's `Llama(lora_path=…)`, created again for each change of the adapter."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.llama: Any = None
        self.adapter = -1

    def answer(self, request: Request) -> TimedAnswer:
        begin = time.perf_counter()
        if request.adapter != self.adapter:
            if self.llama is not None:
                self.llama.close()
            self.llama = self._make(str(self.folder.files("adapter.gguf")[self.folder.name(request.adapter)]))
            self.adapter = request.adapter
        switch_s = time.perf_counter() - begin
        return _timed(self.llama.generate(request.prompt, temp=0.0), begin, switch_s)

    def cold(self) -> None:
        self.adapter = -1

    def _make(self, adapter: str) -> Any:  # noqa: ANN401 - a `Llama`
        return _llama(self.folder, lora_path=adapter)


class Defaults(Reload):
    """llama-cpp-python's `Llama` with its defaults, threads included; only adapter and context length are set."""

    def _make(self, adapter: str) -> Any:  # noqa: ANN401 - a `Llama`
        from edgetune_runtime.engines.gguf.llama import library

        return library().Llama(str(self.folder.base), n_ctx=CONTEXT, verbose=False, lora_path=adapter)


class Server:
    """llama.cpp's server, with the adapters' scales in each request and prompt caching on (its default)."""

    def __init__(self, folder: Folder) -> None:
        import xllamacpp

        self.folder, self.cached = folder, True
        adapters = [*folder.files("adapter.gguf").values()]
        self.server = xllamacpp.Server(llama_server_params(folder.base, adapters, folder.threads, CONTEXT))

    def answer(self, request: Request) -> TimedAnswer:
        begin = time.perf_counter()
        pieces = complete(
            self.server,
            prompt=request.prompt,
            n_predict=STEPS,
            top_k=1,
            ignore_eos=True,
            cache_prompt=self.cached,
            lora=[{"id": n, "scale": float(n == request.adapter)} for n in range(self.folder.adapters)],
        )
        texts = [text for text, _ in pieces if text]
        times = [end for text, end in pieces if text]
        return TimedAnswer(texts, 0.0, times[0] - begin, _between(times))

    def cold(self) -> None:
        self.cached = False


class Genai:
    """onnxruntime-genai: `set_active_adapter` after a rewind to the start."""

    def __init__(self, folder: Folder) -> None:
        import onnxruntime_genai

        self.folder = folder
        self.model = onnxruntime_genai.Model(str(folder.bundle / "base/onnx"))
        self.adapters = genai_adapters(self.model, folder.files("adapter.onnx_adapter"))
        self.cold()

    def answer(self, request: Request) -> TimedAnswer:
        begin = time.perf_counter()
        self.generator.rewind_to(0)
        self.generator.set_active_adapter(self.adapters, self.folder.name(request.adapter))
        switch_s = time.perf_counter() - begin
        self.generator.append_tokens(request.prompt)

        def steps() -> Iterator[int]:
            while True:
                self.generator.generate_next_token()
                yield int(self.generator.get_next_tokens()[0])

        return _timed(steps(), begin, switch_s)

    def cold(self) -> None:
        self.generator = genai_generator(self.model, CONTEXT)


class Peft:
    """transformers with PEFT's `set_adapter`, on the CPU, with the base dequantized to bf16."""

    def __init__(self, folder: Folder) -> None:
        import torch
        from peft import PeftModel

        from edgetune.bases import load_torch

        torch.set_num_threads(folder.threads)
        self.torch, self.folder = torch, folder
        model = load_torch(resolve_base(str(folder.base), work=folder.path), torch.bfloat16)
        first, *others = [folder.name(adapter) for adapter in range(folder.adapters)]
        self.model: Any = PeftModel.from_pretrained(model, folder.path / "peft" / first, adapter_name=first)
        for name in others:
            self.model.load_adapter(folder.path / "peft" / name, adapter_name=name)
        self.model.eval()

    def answer(self, request: Request) -> TimedAnswer:
        torch, begin = self.torch, time.perf_counter()
        self.model.set_adapter(self.folder.name(request.adapter))
        switch_s = time.perf_counter() - begin

        def steps() -> Iterator[int]:
            ids, cache = torch.tensor([request.prompt]), None
            while True:
                with torch.inference_mode():
                    out = self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
                cache, token = out.cache, int(out.logits[0, -1].argmax())
                yield token
                ids = torch.tensor([[token]])

        return _timed(steps(), begin, switch_s)

    def cold(self) -> None:
        pass


class Merged:
    """A full model per task, each with its own context, in which the task's prompt stays cached."""

    def __init__(self, folder: Folder) -> None:
        from edgetune_runtime.engines.gguf.engine import GgufEngine

        paths = [folder.path / "merged" / f"{folder.name(adapter)}.gguf" for adapter in range(folder.adapters)]
        self.engines = [GgufEngine(path, context_length=CONTEXT, threads=folder.threads) for path in paths]
        self.cold()

    def answer(self, request: Request) -> TimedAnswer:
        begin, engine = time.perf_counter(), self.engines[request.adapter]
        if request.adapter not in self.cached:
            engine.truncate(0)
            engine.decode(request.prompt[: request.fixed])
            self.cached.add(request.adapter)
        engine.truncate(request.fixed)

        def steps() -> Iterator[int]:
            token = int(engine.decode(request.prompt[request.fixed :]).argmax())
            while True:
                yield token
                token = int(engine.decode([token]).argmax())

        return _timed(steps(), begin, 0.0)

    def cold(self) -> None:
        self.cached: set[int] = set()


SETUPS: dict[str, Callable[[Folder], Setup]] = {
    "edgetune gguf": lambda folder: Edgetune(folder, "gguf"),
    "edgetune gguf mapped": lambda folder: Edgetune(folder, "gguf", repack=False),
    "edgetune onnx": lambda folder: Edgetune(folder, "onnx"),
    "Llama(lora_path) reload": Reload,
    "low-level switch": LowLevel,
    "llama-server": Server,
    "onnxruntime-genai": Genai,
    "transformers + PEFT": Peft,
    "merged models": Merged,
}


def _llama(folder: Folder, **options: str) -> Any:  # noqa: ANN401 - a `Llama`
    # Flash attention is faster for long prompts.
    return open_llama(folder.base, folder.threads, CONTEXT, flash_attn=True, **options)


def _timed(steps: Iterator[int], begin: float, switch_s: float) -> TimedAnswer:
    tokens, times = [], []
    for token in islice(steps, STEPS):
        tokens.append(token)
        times.append(time.perf_counter())
    return TimedAnswer(tokens, switch_s, times[0] - begin, _between(times))


def _between(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]

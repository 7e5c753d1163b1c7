"""A folder that `switching.py` prepared in; ways of answering with several adapters on one base out.

Each way is a class: `answer` takes a request and gives the tokens of a greedy answer, how long the switch call took and
how long the first token took; `cold` makes it forget all that it knows. A process runs one way, so that its memory is
its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

CONTEXT = 1280
STEPS = 16


@dataclass(frozen=True)
class Answered:
    """A greedy answer, and seconds of the switch call and up to the first token, the switch included.

    `tokens` are the texts of the tokens where a way does not tell their numbers. `steps_s` are the seconds of each
    token after the first.
    """

    tokens: list[int] | list[str]
    switch_s: float
    first_s: float
    steps_s: list[float]


class Way(Protocol):
    """One way of answering."""

    def answer(self, request: Request) -> Answered:
        """Switch to the request's adapter and answer its prompt."""

    def cold(self) -> None:
        """Forget everything but the weights."""


@dataclass(frozen=True)
class Folder:
    """What a way runs on: a bundle of all adapters, or of the first alone."""

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

    def file(self, adapter: int, kind: str) -> Path:
        return self.bundle / "adapters" / self.name(adapter) / kind


@dataclass(frozen=True)
class Request:
    """One request: an adapter, the whole prompt with its fixed part's length, and the message that it ends with."""

    adapter: int
    prompt: list[int]
    fixed: int
    message: str


class Edgetune:
    """edgetune's runtime: switch, put the prompt's state back, compute the message."""

    def __init__(self, folder: Folder, engine: str, *, repack: bool | None = None) -> None:
        from edgetune_runtime import Runtime
        from edgetune_runtime.measuring import loaded_bundle

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

    def answer(self, request: Request) -> Answered:
        begin = time.perf_counter()
        call = self.loaded.call(request.message, self.folder.name(request.adapter))
        assert (call.job.tokens, call.job.fixed) == (request.prompt, request.fixed)
        with call.pool.lease(call.job) as context:
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
        """Memory that the states take, in 10^6 bytes."""
        return self.loaded.context()[0].shared.cache.bytes / 1e6

    def adapters_mb(self) -> float:
        """Size of the adapters' files, in 10^6 bytes."""
        entries, files = self.runtime.manifest.adapters.values(), self.runtime.manifest.files
        return sum(files[entry.files[self.runtime.engine]].bytes for entry in entries) / 1e6


class LowLevel:
    """llama-cpp-python's low-level switch on one `Llama`, the whole prompt computed again."""

    def __init__(self, folder: Folder) -> None:
        import llama_cpp

        self.low, self.llama = llama_cpp, _llama(folder)
        paths = [folder.file(adapter, "adapter.gguf") for adapter in range(folder.adapters)]
        adapters = [llama_cpp.llama_adapter_lora_init(self.llama.model, bytes(path)) for path in paths]
        self.adapters = [(llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter) for adapter in adapters]
        self.scale = (ctypes.c_float * 1)(1.0)

    def answer(self, request: Request) -> Answered:
        begin = time.perf_counter()
        self.low.llama_set_adapters_lora(self.llama.ctx, self.adapters[request.adapter], 1, self.scale)
        switch_s = time.perf_counter() - begin
        self.llama.reset()
        return _timed(self.llama.generate(request.prompt, temp=0.0), begin, switch_s)

    def cold(self) -> None:
        self.llama.reset()


class MadeAnew:
    """llama-cpp-python's `Llama(lora_path=…)`, made anew when another adapter is wanted."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.llama: Any = None
        self.adapter = -1

    def answer(self, request: Request) -> Answered:
        begin = time.perf_counter()
        if request.adapter != self.adapter:
            if self.llama is not None:
                self.llama.close()
            self.llama = self._make(str(self.folder.file(request.adapter, "adapter.gguf")))
            self.adapter = request.adapter
        switch_s = time.perf_counter() - begin
        return _timed(self.llama.generate(request.prompt, temp=0.0), begin, switch_s)

    def cold(self) -> None:
        self.adapter = -1

    def _make(self, adapter: str) -> Any:  # noqa: ANN401 - a `Llama`
        return _llama(self.folder, lora_path=adapter)


class Defaults(MadeAnew):
    """llama-cpp-python's `Llama` with no option but the adapter and the context, its own number of threads included."""

    def _make(self, adapter: str) -> Any:  # noqa: ANN401 - a `Llama`
        from edgetune_runtime.engines.gguf.llama import library

        return library().Llama(str(self.folder.base), n_ctx=CONTEXT, verbose=False, lora_path=adapter)


class Server:
    """llama.cpp's server with the adapters' scales in each request, its cache of prompts on (its default)."""

    def __init__(self, folder: Folder) -> None:
        import xllamacpp

        self.folder = folder
        params = xllamacpp.CommonParams()
        params.model.path = str(folder.base)
        params.n_ctx, params.n_parallel, params.warmup = CONTEXT, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = folder.threads
        adapters = []
        for adapter in range(folder.adapters):
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(folder.file(adapter, "adapter.gguf")), 0.0
            adapters.append(info)
        params.lora_adapters = adapters
        self.server = xllamacpp.Server(params)
        self.cached = True

    def answer(self, request: Request) -> Answered:
        begin = time.perf_counter()
        times: list[float] = []
        pieces: list[str] = []
        asked = {
            "prompt": request.prompt,
            "n_predict": STEPS,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": self.cached,
            "lora": [{"id": n, "scale": float(n == request.adapter)} for n in range(self.folder.adapters)],
        }

        def take(chunk: Any) -> bool:  # noqa: ANN401 - what the server hands out
            text = chunk["choices"][0]["text"]
            if text:
                times.append(time.perf_counter())
                pieces.append(text)
            return False

        self.server.handle_completions(asked, take)
        return Answered(pieces, 0.0, times[0] - begin, _between(times))

    def cold(self) -> None:
        self.cached = False


class Genai:
    """onnxruntime-genai: `set_active_adapter` after a rewind to the beginning."""

    def __init__(self, folder: Folder) -> None:
        import onnxruntime_genai as og

        self.og, self.folder = og, folder
        self.model = og.Model(str(folder.bundle / "base/onnx"))
        self.adapters = og.Adapters(self.model)
        for adapter in range(folder.adapters):
            self.adapters.load(str(folder.file(adapter, "adapter.onnx_adapter")), folder.name(adapter))
        self._make()

    def answer(self, request: Request) -> Answered:
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
        self._make()

    def _make(self) -> None:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        self.generator = self.og.Generator(self.model, params)


class Peft:
    """transformers with PEFT's `set_adapter`, on the CPU, the base's weights dequantized to bf16."""

    def __init__(self, folder: Folder) -> None:
        import torch
        from peft import PeftModel

        from edgetune.bases import load_torch, resolve
        from edgetune.progress import Progress

        torch.set_num_threads(folder.threads)
        self.torch, self.folder = torch, folder
        base = resolve(
            str(folder.base),
            folder=Path(),
            quantize=None,
            work=folder.path,
            progress=Progress(quiet=True),
            converter=None,
        )
        model = load_torch(base, torch.bfloat16)
        first, *others = [folder.name(adapter) for adapter in range(folder.adapters)]
        self.model: Any = PeftModel.from_pretrained(model, folder.path / "peft" / first, adapter_name=first)
        for name in others:
            self.model.load_adapter(folder.path / "peft" / name, adapter_name=name)
        self.model.eval()

    def answer(self, request: Request) -> Answered:
        torch, begin = self.torch, time.perf_counter()
        self.model.set_adapter(self.folder.name(request.adapter))
        switch_s = time.perf_counter() - begin

        def steps() -> Iterator[int]:
            ids, cache = torch.tensor([request.prompt]), None
            while True:
                with torch.inference_mode():
                    out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
                yield token
                ids = torch.tensor([[token]])

        return _timed(steps(), begin, switch_s)

    def cold(self) -> None:
        pass


class Merged:
    """A whole model a task, each with a context of its own that keeps the task's prompt."""

    def __init__(self, folder: Folder) -> None:
        from edgetune_runtime.engines.gguf.engine import GgufEngine

        paths = [folder.path / "merged" / f"{folder.name(adapter)}.gguf" for adapter in range(folder.adapters)]
        self.engines = [GgufEngine(path, context_length=CONTEXT, threads=folder.threads) for path in paths]
        self.cold()

    def answer(self, request: Request) -> Answered:
        begin, engine = time.perf_counter(), self.engines[request.adapter]
        if request.adapter not in self.known:
            engine.truncate(0)
            engine.decode(request.prompt[: request.fixed])
            self.known.add(request.adapter)
        engine.truncate(request.fixed)

        def steps() -> Iterator[int]:
            token = int(engine.decode(request.prompt[request.fixed :]).argmax())
            while True:
                yield token
                token = int(engine.decode([token]).argmax())

        return _timed(steps(), begin, 0.0)

    def cold(self) -> None:
        self.known: set[int] = set()


WAYS: dict[str, Callable[[Folder], Way]] = {
    "edgetune gguf": lambda folder: Edgetune(folder, "gguf"),
    "edgetune gguf mapped": lambda folder: Edgetune(folder, "gguf", repack=False),
    "edgetune onnx": lambda folder: Edgetune(folder, "onnx"),
    "Llama(lora_path) anew": MadeAnew,
    "low-level switch": LowLevel,
    "llama-server": Server,
    "onnxruntime-genai": Genai,
    "transformers + PEFT": Peft,
    "merged models": Merged,
}


def _llama(folder: Folder, **more: str) -> Any:  # noqa: ANN401 - a `Llama`
    """llama-cpp-python's own class as it is by default, but with flash attention, which is faster for long prompts."""
    from edgetune_runtime.engines.gguf.llama import library

    # With the log silenced, where each tensor of an adapter has a line.
    return library().Llama(
        str(folder.base),
        n_ctx=CONTEXT,
        n_threads=folder.threads,
        n_threads_batch=folder.threads,
        flash_attn=True,
        verbose=False,
        **more,
    )


def _timed(steps: Iterator[int], begin: float, switch_s: float) -> Answered:
    tokens, times = [], []
    for token in islice(steps, STEPS):
        tokens.append(token)
        times.append(time.perf_counter())
    return Answered(tokens, switch_s, times[0] - begin, _between(times))


def _between(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]

"""The setups that `batching.py` compares: a base with adapters for several callers, in edgetune and other libraries.

Each setup opens a bundle for a number of callers and gives a function that answers one request greedily. Each caller
calls it from its own thread. Each process runs one setup, and its end closes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest, resolve
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.text.chat import messages_for, render

from benchmarks.libraries import complete, genai_adapters, genai_generator, llama_server_params, open_genai
from benchmarks.serve import CONTEXT, MOST_TOKENS, Ask

Piece = tuple[str, float]
"""A piece of an answer's text, and when it came."""
Answering = Callable[[Ask], list[Piece]]

DRAFTS = {"": True, ", no drafts": False}
"""Whether edgetune's setups use drafts, by the end of their names."""


@dataclass(frozen=True)
class Place:
    """What a setup opens: a bundle, for so many callers at the same time."""

    bundle: Path
    threads: int
    callers: int

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    def base(self, engine: str) -> Path:
        return resolve(self.bundle, self.manifest.base.files[engine])

    def adapters(self, engine: str) -> dict[str, Path]:
        return {name: resolve(self.bundle, entry.files[engine]) for name, entry in self.manifest.adapters.items()}

    def rendered(self, template: str | None, ask: Ask) -> str:
        """The prompt as the base's chat template gives it, with the adapter's system prompt."""
        system = self.manifest.adapter(ask.adapter).system if ask.adapter else None
        return render(template, messages_for(ask.prompt, system), add_generation_prompt=True, bos="", eos="")


@dataclass(frozen=True)
class Setup:
    """A way to answer: the engine whose files it opens, and the package that it needs."""

    open: Callable[[Place], Answering]
    engine: str
    package: str = "edgetune_runtime"

    def lacks(self, manifest: Manifest) -> str:
        """What it cannot run without; empty if nothing is missing."""
        if self.engine not in manifest.base.files:
            return f"the bundle has no files for {self.engine}"
        return "" if find_spec(self.package) else f"the package {self.package} is not installed"


def edgetune(engine: str, place: Place, *, drafts: bool) -> Answering:
    """edgetune's runtime with a context per caller."""
    runtime = Runtime.open(
        place.bundle, engine=engine, threads=place.threads, contexts=place.callers, disk_mb=0, drafts=drafts
    )

    def answer(ask: Ask) -> list[Piece]:
        pieces = runtime.stream(ask.prompt, adapter=ask.adapter or None, max_tokens=MOST_TOKENS)
        return [(piece, time.perf_counter()) for piece in pieces]

    return answer


def llama_server(place: Place) -> Answering:
    """llama.cpp's server with a slot per caller, and its prompt cache."""
    import xllamacpp

    base, adapters = place.base("gguf"), place.adapters("gguf")
    params = llama_server_params(base, [*adapters.values()], place.threads, CONTEXT * place.callers)
    params.n_parallel = place.callers
    server, tokenizer = xllamacpp.Server(params), GgufTokenizer(base)

    def answer(ask: Ask) -> list[Piece]:
        scales = [{"id": number, "scale": float(name == ask.adapter)} for number, name in enumerate(adapters)]
        prompt = place.rendered(tokenizer.chat_template, ask)
        return complete(server, prompt=prompt, n_predict=MOST_TOKENS, cache_prompt=True, lora=scales)

    return answer


def genai(place: Place) -> Answering:
    """onnxruntime-genai with a generator per request."""
    model, tokenizer, template = open_genai(place.base("onnx").parent, place.threads)
    adapters = genai_adapters(model, place.adapters("onnx"))

    def answer(ask: Ask) -> list[Piece]:
        generator, pieces = genai_generator(model, CONTEXT), list[Piece]()
        if ask.adapter:
            generator.set_active_adapter(adapters, ask.adapter)
        generator.append_tokens(tokenizer.encode(place.rendered(template, ask)))
        stream = tokenizer.create_stream()
        while not generator.is_done() and len(pieces) < MOST_TOKENS:
            generator.generate_next_token()
            pieces.append((stream.decode(generator.get_next_tokens()[0]), time.perf_counter()))
        return pieces

    return answer


SETUPS = {
    **{
        f"edgetune {engine}{ending}": Setup(partial(edgetune, engine, drafts=drafts), engine)
        for engine in ("gguf", "onnx")
        for ending, drafts in DRAFTS.items()
    },
    "llama-server": Setup(llama_server, "gguf", "xllamacpp"),
    "onnxruntime-genai": Setup(genai, "onnx", "onnxruntime_genai"),
}

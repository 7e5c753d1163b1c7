"""The setups that `decoding.py` compares: ways of answering prompts, in edgetune and in other libraries.

Each setup opens a bundle's base with one adapter and gives a function from a prompt to a timed greedy answer. Each
process runs one setup, and its end closes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import AdapterEntry, Manifest, read_manifest, resolve
from edgetune_runtime.decoding.output import KINDS, OutputSpec
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.text.chat import Message, messages_for, render

from benchmarks.libraries import complete, genai_adapters, genai_generator, llama_server_params, open_genai, open_llama
from edgetune.tasks.data import TaskRow

MOST_TOKENS = 160
CONTEXT = 1024
PLAIN, MARGINS = "adapter", "margins"

Prompt = list[Message]


def prompt_of(row: TaskRow) -> Prompt:
    """The row's chat messages."""
    if row.messages is not None:
        return [dict(message) for message in row.messages]
    return [{"role": "user", "content": row.text or ""}]


@dataclass(frozen=True)
class Timed:
    """One answer: its text, its tokens, and the seconds from the call to its end, and to its first token.

    `margins` has the text of each token and by how many nats it was more likely than the next best, where recorded.
    """

    text: str
    tokens: int
    whole_s: float
    first_s: float
    tokens_per_step: float = 0.0
    margins: tuple[tuple[str, float], ...] = ()


Answering = Callable[[Prompt], Timed]


@dataclass(frozen=True)
class Place:
    """What a setup opens: a bundle, its file format, one of its adapters, and the adapter's output constraint."""

    bundle: Path
    engine: str
    adapter: str
    spec: OutputSpec | None
    threads: int

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    @property
    def entry(self) -> AdapterEntry:
        return self.manifest.adapter(self.adapter)

    @property
    def base(self) -> Path:
        return resolve(self.bundle, self.manifest.base.files[self.engine])

    @property
    def adapter_file(self) -> Path:
        return resolve(self.bundle, self.entry.files[self.engine])


@dataclass(frozen=True)
class Setup:
    """A way to answer: the engines that it runs on, and the kinds of output constraints that it needs one of."""

    open: Callable[[Place], Answering]
    engines: tuple[str, ...] = ("gguf", "onnx")
    constraints: tuple[str, ...] = ()

    def fits(self, engine: str, spec: OutputSpec | None) -> bool:
        """Whether it runs with this engine, and for an adapter with this constraint."""
        return engine in self.engines and (not self.constraints or (spec is not None and spec.kind in self.constraints))


def edgetune(
    *, base: bool = False, drafts: bool = False, constrained: bool = False, records_margins: bool = False
) -> Setup:
    """edgetune's runtime; with `records_margins` it is slower."""

    def open_place(place: Place) -> Answering:
        options: dict[str, Any] = {"unconstrained": True}
        if constrained and place.spec is not None:
            is_json = place.spec.kind in {"schema", "choices"}
            options = {place.spec.kind: json.loads(place.spec.text) if is_json else place.spec.text}
            if place.entry.output is not None:
                # Stored, with its spacing.
                options = {}
        name = None if base else place.adapter
        runtime = Runtime.open(place.bundle, engine=place.engine, threads=place.threads, disk_mb=0, drafts=drafts)

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            made = runtime.generate(
                prompt, adapter=name, max_tokens=MOST_TOKENS, logprobs=2 if records_margins else None, **options
            )
            whole_s, timings = time.perf_counter() - begin, made.timings
            # The end of turn counts as a token in all setups.
            margins = tuple((token.text, token.top[0].logprob - token.top[1].logprob) for token in made.logprobs or ())
            return Timed(made.text, made.tokens + 1, whole_s, timings.ttft_ms / 1e3, timings.tokens_per_step, margins)

        return answer

    return Setup(open_place, constraints=KINDS if constrained else ())


def llama_cpp_python(*, lookup: bool = False, constrained: bool = False) -> Setup:
    """llama-cpp-python's `Llama` with the same adapter."""

    def open_place(place: Place) -> Answering:
        from llama_cpp.llama_grammar import LlamaGrammar
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        drafts = LlamaPromptLookupDecoding(num_pred_tokens=4) if lookup else None
        adapter = str(place.adapter_file)
        llama = open_llama(place.base, place.threads, CONTEXT, lora_path=adapter, draft_model=drafts)
        grammar = LlamaGrammar.from_json_schema(place.spec.text, verbose=False) if constrained and place.spec else None
        template = llama.metadata.get("tokenizer.chat_template")

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            tokens = llama.tokenize(rendered(template, prompt, place).encode(), add_bos=False, special=True)
            parts = llama.create_completion(
                tokens, max_tokens=MOST_TOKENS, temperature=0.0, grammar=grammar, stream=True
            )
            pieces = [(part["choices"][0]["text"], time.perf_counter()) for part in parts]
            whole_s, text = time.perf_counter() - begin, "".join(piece for piece, _ in pieces)
            # The end of turn counts as a token, as in the other setups.
            return Timed(text, len(llama.tokenize(text.encode(), add_bos=False)) + 1, whole_s, pieces[0][1] - begin)

        return answer

    return Setup(open_place, engines=("gguf",), constraints=("schema",) if constrained else ())


def llama_server(*, lookup: bool = False, constrained: bool = False) -> Setup:
    """llama.cpp's server with the same adapter: with `lookup` its n-gram speculation, else without any."""

    def open_place(place: Place) -> Answering:
        import xllamacpp

        params = llama_server_params(place.base, [place.adapter_file], place.threads, CONTEXT, scale=1.0)
        if lookup:
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            # Its default of 12 tokens is longer than what short answers repeat.
            params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = 3, 4
        server, tokenizer = xllamacpp.Server(params), GgufTokenizer(place.base)
        more = {"json_schema": json.loads(place.spec.text)} if constrained and place.spec else {}

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            tokens = tokenizer.tokenize(rendered(tokenizer.chat_template, prompt, place))
            pieces = complete(server, prompt=tokens, n_predict=MOST_TOKENS, **more)
            whole_s, text = time.perf_counter() - begin, "".join(piece for piece, _ in pieces)
            return Timed(text, len(tokenizer.tokenize(text, continues=True)) + 1, whole_s, pieces[0][1] - begin)

        return answer

    return Setup(open_place, engines=("gguf",), constraints=("schema",) if constrained else ())


def genai(*, constrained: bool = False) -> Setup:
    """onnxruntime-genai with the same files; `constrained` by its guidance."""

    def open_place(place: Place) -> Answering:
        model, tokenizer, template = open_genai(place.base.parent, place.threads)
        adapters = genai_adapters(model, {place.adapter: place.adapter_file})
        guidance = {"json_schema": place.spec.text} if constrained and place.spec else {}

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            generator = genai_generator(model, CONTEXT, **guidance)
            generator.set_active_adapter(adapters, place.adapter)
            generator.append_tokens(tokenizer.encode(rendered(template, prompt, place)))
            tokens: list[int] = []
            first_s = 0.0
            while not generator.is_done() and len(tokens) < MOST_TOKENS:
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))
                first_s = first_s or time.perf_counter() - begin
            whole_s = time.perf_counter() - begin
            return Timed(tokenizer.decode(tokens), len(tokens), whole_s, first_s)

        return answer

    return Setup(open_place, engines=("onnx",), constraints=("schema",) if constrained else ())


def rendered(template: str | None, prompt: Prompt, place: Place) -> str:
    """The prompt as the base's chat template gives it, with the adapter's system prompt."""
    messages: Sequence[Message] = messages_for(prompt, place.entry.system)
    return render(template, messages, add_generation_prompt=True, bos="", eos="")


SETUPS = {
    MARGINS: edgetune(records_margins=True),
    "base": edgetune(base=True),
    PLAIN: edgetune(),
    f"{PLAIN}, drafts": edgetune(drafts=True),
    f"{PLAIN}, constraint": edgetune(constrained=True),
    f"{PLAIN}, drafts and constraint": edgetune(drafts=True, constrained=True),
    "llama-cpp-python": llama_cpp_python(),
    "llama-cpp-python, prompt lookup": llama_cpp_python(lookup=True),
    "llama-cpp-python, grammar": llama_cpp_python(constrained=True),
    "llama-server": llama_server(),
    "llama-server, n-grams": llama_server(lookup=True),
    "llama-server, JSON schema": llama_server(constrained=True),
    "llama-server, n-grams and JSON schema": llama_server(lookup=True, constrained=True),
    "onnxruntime-genai": genai(),
    "onnxruntime-genai, guidance": genai(constrained=True),
}

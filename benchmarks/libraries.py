"""Opens other libraries with a base and its adapters: llama-cpp-python, llama.cpp's server and onnxruntime-genai.

Each function imports only its own library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def open_llama(base: Path, threads: int, context: int, **options: object) -> Any:  # noqa: ANN401 - a `Llama`
    """llama-cpp-python's class with so many threads, and otherwise its defaults."""
    # This import silences the log, which has a line for each tensor of an adapter.
    from edgetune_runtime.engines.gguf.llama import library

    return library().Llama(
        str(base), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, **options
    )


def llama_server_params(base: Path, adapters: Sequence[Path], threads: int, context: int, *, scale: float = 0.0) -> Any:  # noqa: ANN401 - xllamacpp's own
    """Parameters of llama.cpp's server with one slot, and with the scale of the adapters if a request sets none."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    infos = []
    for adapter in adapters:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), scale
        infos.append(info)
    params.lora_adapters = infos
    return params


def complete(server: Any, **asked: object) -> list[tuple[str, float]]:  # noqa: ANN401 - xllamacpp's own
    """The pieces of an answer of llama.cpp's server, with the time of each."""
    pieces: list[tuple[str, float]] = []

    def receive(chunk: Any) -> bool:  # noqa: ANN401 - a JSON object
        pieces.append((chunk["choices"][0]["text"], time.perf_counter()))
        return False

    server.handle_completions({"temperature": 0.0, "stream": True, **asked}, receive)
    return pieces


def open_genai(folder: Path, threads: int) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and chat template of onnxruntime-genai for an exported base, with so many threads."""
    import onnxruntime_genai as og

    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    session = {**config["model"]["decoder"]["session_options"], "intra_op_num_threads": threads}
    settings = og.Config(str(folder))
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model, template = og.Model(settings), folder / "chat_template.jinja"
    return model, og.Tokenizer(model), template.read_text(encoding="utf-8") if template.exists() else None


def genai_generator(model: Any, context: int, **guidance: str) -> Any:  # noqa: ANN401 - the library's own
    """A greedy generator of onnxruntime-genai; `guidance` maps a kind of constraint to its text."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(max_length=context, do_sample=False)
    for kind, text in guidance.items():
        params.set_guidance(kind, text)
    return og.Generator(model, params)


def genai_adapters(model: Any, files: dict[str, Path]) -> Any:  # noqa: ANN401 - the library's own
    """The adapters of a model of onnxruntime-genai, by name."""
    import onnxruntime_genai as og

    adapters = og.Adapters(model)
    for name, file in files.items():
        adapters.load(str(file), name)
    return adapters

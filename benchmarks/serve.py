"""Measure a bundle's server under the load of many clients, beside llama.cpp's server; writes a table.

    pip install -e '.[demo,bench]' -e 'runtime[gguf,server]'
    edgetune build benchmarks/recipes/serve.yaml --out build/serve
    python benchmarks/serve.py build/serve --recipe benchmarks/recipes/serve.yaml --out benchmarks/results

Both servers run in a process of their own on loopback and get the same requests: a validation row of one of the
adapters, all adapters in turn, `--at-once` requests at a time, every second one streamed. edgetune's answers are
compared with those of a cold runtime, llama.cpp's with its own answers to one request at a time.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.memory import status_mb
from benchmarks.harness.server import serving
from benchmarks.harness.tables import markdown
from benchmarks.harness.turns import p99
from benchmarks.harness.worker import Worker

import argparse
import asyncio
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import httpx
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.text.chat import messages_for, render

from benchmarks.libraries import llama_server_params
from edgetune.recipe.model import Recipe
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import read_task

MOST_TOKENS = 48
CONTEXT = 512
WARM = 100
"""Requests after which the memory is taken that later requests are compared with."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request: an adapter's name, empty for the base, and a prompt."""

    adapter: str
    prompt: str


@dataclass(frozen=True)
class Reply:
    """What came back: the text or the error, and the seconds from the request to the end and to each streamed piece."""

    text: str
    whole_s: float
    pieces_s: Sequence[float] = ()
    error: str = ""


@dataclass(frozen=True)
class Target:
    """A server: its address, the process whose memory counts, and how it is asked and answers."""

    url: str
    pid: int
    path: str
    body: Callable[[Ask, bool], Body]
    piece: Callable[[Any], str]
    whole: Callable[[Any], str]


def main() -> None:
    """Serve the bundle, send the requests, and write the figures."""
    parser = BENCHMARK.parser(only=[*SERVERS], threads=2)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe with the rows")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=16, help="requests at a time")
    parser.add_argument("--rows", type=int, default=25, help="validation rows per adapter")
    options = BENCHMARK.options(parser, requests=8, at_once=4, rows=2)
    asks = asks_of(options)
    tokenizer = GgufTokenizer(resolve(options.bundle, read_manifest(options.bundle).base.files["gguf"]))
    figures = {}
    for name in options.only:
        with SERVERS[name](options) as target:
            reference = references(options, asks) if name == "edgetune" else one_at_a_time(target, asks)
            sent = list(islice(cycle(asks), options.requests))
            figures[name] = measure(target, sent, options.at_once, reference, tokenizer.tokenize)
    BENCHMARK.report(options, {"servers": figures})


def asks_of(options: argparse.Namespace) -> list[Ask]:
    """Rows of all adapters in turn."""
    recipe = Recipe.from_file(options.recipe)
    rows = {name: read_task(name, recipe).validation[: options.rows] for name in recipe.adapters}
    return [
        Ask(name, _prompt(row[place]))
        for place in range(options.rows)
        for name, row in rows.items()
        if place < len(row)
    ]


def _prompt(row: TaskRow) -> str:
    return str(row.messages[-1]["content"] if row.messages else row.text)


def references(options: argparse.Namespace, asks: Sequence[Ask]) -> dict[Ask, str]:
    """Answers of a runtime that keeps no states, one after another."""
    with Runtime.open(options.bundle, threads=options.threads, cache_mb=0, disk_mb=0, contexts=1) as runtime:
        texts = {}
        for ask in asks:
            runtime.clear_cache()
            texts[ask] = runtime.generate(ask.prompt, adapter=ask.adapter, max_tokens=MOST_TOKENS).text
        return texts


def one_at_a_time(target: Target, asks: Sequence[Ask]) -> dict[Ask, str]:
    """The server's own answers to one request at a time."""
    return {ask: reply.text for ask, reply in zip(asks, asyncio.run(_load(target, asks, 1))[0], strict=True)}


def measure(
    target: Target,
    asks: Sequence[Ask],
    at_once: int,
    reference: dict[Ask, str],
    tokenize: Callable[[str], Sequence[int]],
) -> dict[str, Any]:
    """Figures of a load: times in ms, memory in 10^6 bytes; the tokens are those of the answers, in all."""
    begin = time.perf_counter()
    replies, warm_mb = asyncio.run(_load(target, asks, at_once))
    seconds = time.perf_counter() - begin
    good = [reply for reply in replies if not reply.error]
    return {
        "errors": len(replies) - len(good),
        "first_error": next((reply.error for reply in replies if reply.error), ""),
        "other_texts": sum(
            reply.text != reference[ask] for ask, reply in zip(asks, replies, strict=True) if not reply.error
        ),
        "requests_per_s": round(len(replies) / seconds, 2),
        "tokens_per_s": round(sum(len(tokenize(reply.text)) for reply in good) / seconds, 1),
        **latencies(good),
        "rss_mb": {"after_100": round(warm_mb, 1), "end": round(status_mb(target.pid, "VmRSS"), 1)},
    }


def latencies(replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
    """The times in ms to the first token, between tokens, of which one step can give several, and of whole answers."""
    streamed = [reply.pieces_s for reply in replies if reply.pieces_s]
    times_s = {
        "ttft_ms": [pieces[0] for pieces in streamed],
        "between_ms": [after - before for pieces in streamed for before, after in pairwise(pieces)],
        "answer_ms": [reply.whole_s for reply in replies],
    }
    return {name: _spread([value * 1e3 for value in values]) for name, values in times_s.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    return {"p50": round(statistics.median(values), 1), "p99": round(p99(values), 1)}


async def _load(target: Target, asks: Sequence[Ask], at_once: int) -> tuple[list[Reply], float]:
    """The replies in the order of the requests, and the memory after the first ones."""
    replies: list[Reply | None] = [None] * len(asks)
    places, warm_mb = iter(range(len(asks))), 0.0
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=target.url, timeout=300, limits=limits) as client:

        async def work() -> None:
            nonlocal warm_mb
            for place in places:
                replies[place] = await _ask(client, target, asks[place], streams=place % 2 == 0)
                if place == WARM:
                    warm_mb = status_mb(target.pid, "VmRSS")

        await asyncio.gather(*(work() for _ in range(at_once)))
    return [reply for reply in replies if reply is not None], warm_mb


async def _ask(client: httpx.AsyncClient, target: Target, ask: Ask, *, streams: bool) -> Reply:
    begin, text, pieces_s = time.perf_counter(), "", list[float]()
    body = target.body(ask, streams)
    try:
        if not streams:
            reply = await client.post(target.path, json=body)
            reply.raise_for_status()
            return Reply(target.whole(reply.json()), time.perf_counter() - begin)
        async with client.stream("POST", target.path, json=body) as streamed:
            streamed.raise_for_status()
            async for line in streamed.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if piece := target.piece(json.loads(line.removeprefix("data: "))):
                    pieces_s.append(time.perf_counter() - begin)
                    text += piece
        return Reply(text, time.perf_counter() - begin, pieces_s)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Reply("", time.perf_counter() - begin, error=f"{type(error).__name__}: {error}")


@contextmanager
def edgetune(options: argparse.Namespace) -> Iterator[Target]:
    """`edgetune-run serve`."""

    def body(ask: Ask, streams: bool) -> Body:
        messages = [{"role": "user", "content": ask.prompt}]
        return {"model": ask.adapter, "messages": messages, "max_tokens": MOST_TOKENS, "stream": streams}

    def piece(event: Any) -> str:  # noqa: ANN401 - JSON
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])

    def whole(answer: Any) -> str:  # noqa: ANN401 - JSON
        return str(answer["choices"][0]["message"]["content"])

    limits = ["--threads", str(options.threads), "--max-waiting", str(options.at_once)]
    with serving(options.bundle, limits) as server:
        yield Target(server.url, server.process.pid, "/v1/chat/completions", body, piece, whole)


@contextmanager
def llama_server(options: argparse.Namespace) -> Iterator[Target]:
    """llama.cpp's server with the same adapters, a slot for each core, and its prompt cache."""
    manifest = read_manifest(options.bundle)
    numbers = {name: number for number, name in enumerate(manifest.adapters)}

    def body(ask: Ask, streams: bool) -> Body:
        messages = messages_for(ask.prompt, manifest.adapters[ask.adapter].system)
        scales = [{"id": number, "scale": float(name == ask.adapter)} for name, number in numbers.items()]
        return {
            "prompt": render(template, messages, add_generation_prompt=True),
            "n_predict": MOST_TOKENS,
            "temperature": 0.0,
            "stream": streams,
            "cache_prompt": True,
            "lora": scales,
        }

    def piece(event: Any) -> str:  # noqa: ANN401 - JSON
        return str(event.get("content", ""))

    with Worker(start_llama_server, options.bundle, options.threads) as worker:
        url, template, pid = worker()
        yield Target(url, pid, "/completion", body, piece, lambda answer: str(answer["content"]))


def start_llama_server(bundle: Path, threads: int) -> Callable[[], tuple[str, str | None, int]]:
    """Run llama.cpp's server in this process; returns a function that gives its address, chat template and process."""
    import xllamacpp

    manifest = read_manifest(bundle)
    base = resolve(bundle, manifest.base.files["gguf"])
    files = [resolve(bundle, entry.files["gguf"]) for entry in manifest.adapters.values()]
    params = llama_server_params(base, files, threads, CONTEXT * threads)
    params.n_parallel, params.warmup = threads, True
    with socket.create_server(("127.0.0.1", 0)) as free:
        params.port = free.getsockname()[1]
    server = xllamacpp.Server(params)
    template = GgufTokenizer(base).chat_template
    return lambda: (server.listening_address, template, os.getpid())


SERVERS = {"edgetune": edgetune, "llama-server": llama_server}


def table(result: Result) -> str:
    """Markdown: a row for each server."""
    about = (
        f"{result['requests']} requests, {result['at_once']} at a time, {said_of_machine(result)}. RSS after {WARM} "
        "requests and at the end."
    )
    columns = {
        "server": "{name}",
        "errors": "{errors}",
        "other texts": "{other_texts}",
        "requests/s": "{requests_per_s:.1f}",
        "tokens/s": "{tokens_per_s:.0f}",
        "TTFT p50 / p99, ms": "{ttft_ms[p50]:.0f} / {ttft_ms[p99]:.0f}",
        "between tokens": "{between_ms[p50]:.0f} / {between_ms[p99]:.0f}",
        "answer p50 / p99": "{answer_ms[p50]:.0f} / {answer_ms[p99]:.0f}",
        "RSS, MB": "{rss_mb[after_100]:.0f} / {rss_mb[end]:.0f}",
    }
    rows = [{"name": name, **figures} for name, figures in result["servers"].items()]
    return f"{about}\n\n{markdown(rows, columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

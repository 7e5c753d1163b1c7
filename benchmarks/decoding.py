"""A bundle and rows of its tasks in; how fast each way of decoding answers them out: a table and a plot.

    pip install -e '.[demo]'
    python benchmarks/decoding.py build/smart-home --recipe examples/smart-home/quick.yaml --out benchmarks/results

Both engines answer the same validation rows of each adapter greedily: as the plain base, with the adapter token by
token, with its output constraint, with drafts, and with both. llama-cpp-python answers them with the same adapter, also
with its prompt lookup and with its grammar. Each setup runs in its own process, several rounds in turn, so that no two
share the processor's caches; the medians are over all rounds. Without `output` in the recipe, the constraint is
inferred from the training rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Python searches the script's folder first, where onnx.py would hide the package onnx.
sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).resolve().parent]

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.decoding.output import KINDS, OutputSpec
from edgetune_runtime.text.chat import Message, messages_for, render

from edgetune.data import TaskRow
from edgetune.outputs.infer import infer
from edgetune.recipe.model import load_recipe
from edgetune.tasks import read_task

MOST_TOKENS = 160
CONTEXT = 1024
PLAIN = "adapter"


@dataclass(frozen=True)
class Timed:
    """One answer: its text, its tokens, and the seconds from the call to its end, and to its first token."""

    text: str
    tokens: int
    whole_s: float
    first_s: float
    tokens_per_step: float = 0.0


def figures(answers: Sequence[Timed], reference: Sequence[Timed] | None) -> dict[str, Any]:
    """Medians and rates as JSON values; `differ` counts texts, of all rounds, that are not those of `reference`."""
    decoded = sum(answer.tokens - 1 for answer in answers)
    seconds = sum(answer.whole_s - answer.first_s for answer in answers)
    steps = [answer.tokens_per_step for answer in answers if answer.tokens_per_step]
    found = {
        "answer_ms": round(statistics.median(answer.whole_s for answer in answers) * 1e3, 1),
        "ttft_ms": round(statistics.median(answer.first_s for answer in answers) * 1e3, 1),
        "tokens_per_s": round(decoded / seconds, 1) if decoded else 0.0,
        "tokens": round(sum(answer.tokens for answer in answers) / len(answers), 1),
    }
    found |= {"tokens_per_step": round(statistics.fmean(steps), 2)} if steps else {}
    if reference is not None:
        found["differ"] = sum(one.text != other.text for one, other in zip(answers, reference, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ways of decoding on the rows of a bundle's tasks.")
    parser.add_argument("bundle", type=Path, help="a bundle with draft tables")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe with the rows")
    parser.add_argument("--rows", type=int, default=40, help="validation rows per adapter")
    parser.add_argument("--threads", type=int, default=2, help="threads of all setups")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write decoding.json, decoding.md and decoding.png here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3, help="processes per setup")
    parser.add_argument("--worker", metavar="ENGINE/ADAPTER/SETUP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, adapter, setup = options.worker.split("/")
        print(json.dumps([asdict(answer) for answer in measure(options, engine, adapter, setup)]))
        return
    manifest = read_manifest(options.bundle)
    engines = {
        engine: {adapter: _adapter(options, engine, adapter) for adapter in manifest.adapters}
        for engine in manifest.base.files
    }
    result = {
        "machine": _machine(),
        "rows": options.rows,
        "rounds": options.rounds,
        "threads": options.threads,
        "engines": engines,
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decoding.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "decoding.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "decoding.png")
    print(json.dumps(result) if options.json else table(result))


def _adapter(options: argparse.Namespace, engine: str, adapter: str) -> dict[str, Any]:
    """The figures of each setup, from `rounds` processes each."""
    spec = _constraint(options, adapter)
    names = [name for name, setup in SETUPS.items() if setup.fits(engine, spec)]
    answers: dict[str, list[Timed]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, *sys.argv, "--worker", f"{engine}/{adapter}/{name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            answers[name] += [Timed(**answer) for answer in json.loads(done.stdout)]
    plain = answers[PLAIN]
    return {name: figures(found, plain if name.startswith(PLAIN) else None) for name, found in answers.items()}


def measure(options: argparse.Namespace, engine: str, adapter: str, setup: str) -> list[Timed]:
    """The answers of one setup, after one to warm up."""
    task = read_task(adapter, load_recipe(options.recipe))
    rows = [_prompt_of(row) for row in task.validation[: options.rows]]
    with SETUPS[setup].opened(options, engine, adapter, _constraint(options, adapter)) as answer:
        return [answer(row) for row in [rows[0], *rows]][1:]


def _constraint(options: argparse.Namespace, adapter: str) -> OutputSpec | None:
    stored = read_manifest(options.bundle).adapter(adapter).output
    if stored is not None:
        return OutputSpec.from_json(stored)
    task = read_task(adapter, load_recipe(options.recipe))
    return infer([row.completion or "" for row in task.train])


Prompt = list[Message]


Answering = Callable[[Prompt], Timed]


@dataclass(frozen=True)
class Setup:
    """A way to answer: the engines that it runs on, and the kinds of output constraints that it needs one of."""

    opened: Callable[..., AbstractContextManager[Answering]]
    engines: tuple[str, ...] = ("gguf", "onnx")
    constraints: tuple[str, ...] = ()

    def fits(self, engine: str, spec: OutputSpec | None) -> bool:
        """Whether it runs with this engine, and for an adapter with this constraint."""
        return engine in self.engines and (not self.constraints or (spec is not None and spec.kind in self.constraints))


def _own(*, base: bool = False, drafts: bool = False, constrained: bool = False) -> Setup:
    """edgetune's runtime."""

    @contextmanager
    def opened(options: argparse.Namespace, engine: str, adapter: str, spec: OutputSpec | None) -> Iterator[Answering]:
        more: dict[str, Any] = {"free": True}
        if constrained and spec is not None:
            more = {spec.kind: json.loads(spec.text) if spec.kind in ("schema", "choices") else spec.text}
        name = None if base else adapter
        with Runtime.open(options.bundle, engine=engine, threads=options.threads, disk_mb=0, drafts=drafts) as runtime:

            def answer(prompt: Prompt) -> Timed:
                begin = time.perf_counter()
                found = runtime.generate(prompt, adapter=name, max_tokens=MOST_TOKENS, **more)
                whole_s, timings = time.perf_counter() - begin, found.timings
                return Timed(found.text, found.tokens, whole_s, timings.ttft_ms / 1e3, timings.tokens_per_step)

            yield answer

    return Setup(opened, constraints=KINDS if constrained else ())


def _llama_cpp(*, lookup: bool = False, constrained: bool = False) -> Setup:
    """llama-cpp-python's `Llama` with the same adapter."""

    @contextmanager
    def opened(options: argparse.Namespace, engine: str, adapter: str, spec: OutputSpec | None) -> Iterator[Answering]:
        from edgetune_runtime.engines.gguf.llama import library
        from llama_cpp.llama_grammar import LlamaGrammar
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        manifest = read_manifest(options.bundle)
        entry = manifest.adapter(adapter)
        llama = library().Llama(
            str(resolve(options.bundle, manifest.base.files[engine])),
            lora_path=str(resolve(options.bundle, entry.files[engine])),
            n_ctx=CONTEXT,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4) if lookup else None,
        )
        grammar = LlamaGrammar.from_json_schema(spec.text, verbose=False) if constrained and spec else None
        template = llama.metadata["tokenizer.chat_template"]

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            messages = messages_for(prompt, entry.system)
            text = render(template, messages, add_generation_prompt=True, bos="", eos="")
            tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
            pieces, first_s = [], 0.0
            parts = llama.create_completion(
                tokens, max_tokens=MOST_TOKENS, temperature=0.0, grammar=grammar, stream=True
            )
            for part in parts:
                pieces.append(part["choices"][0]["text"])
                first_s = first_s or time.perf_counter() - begin
            whole_s, whole = time.perf_counter() - begin, "".join(pieces)
            return Timed(whole, len(llama.tokenize(whole.encode(), add_bos=False)) + 1, whole_s, first_s)

        yield answer
        llama.close()

    return Setup(opened, engines=("gguf",), constraints=("schema",) if constrained else ())


SETUPS = {
    "base": _own(base=True),
    PLAIN: _own(),
    f"{PLAIN}, drafts": _own(drafts=True),
    f"{PLAIN}, constraint": _own(constrained=True),
    f"{PLAIN}, drafts and constraint": _own(drafts=True, constrained=True),
    "llama-cpp-python": _llama_cpp(),
    "llama-cpp-python, prompt lookup": _llama_cpp(lookup=True),
    "llama-cpp-python, grammar": _llama_cpp(constrained=True),
}


def _prompt_of(row: TaskRow) -> Prompt:
    if row.messages is not None:
        return [dict(message) for message in row.messages]
    return [{"role": "user", "content": row.text or ""}]


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    kind = "AVX-512 bf16" if any("avx512_bf16" in line for line in lines) else "no bf16"
    return {"cpu": cpu, "kind": kind, "cores": os.cpu_count(), "python": platform.python_version()}


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each engine and adapter, a row for each setup."""
    machine = result["machine"]
    about = f"{result['rows']} validation rows per adapter, {result['threads']} threads"
    lines = [f"{about}, {machine['cpu']} ({machine['kind']})."]
    for engine, adapters in result["engines"].items():
        for name, setups in adapters.items():
            plain = setups[PLAIN]["tokens_per_s"]
            head = "| setup | answer, ms | TTFT, ms | decode, tokens/s | speedup | tokens per step | other texts |"
            lines += ["", f"{engine}, {name}", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
            for setup, found in setups.items():
                cells = [
                    f"{found['answer_ms']:.0f}",
                    f"{found['ttft_ms']:.0f}",
                    f"{found['tokens_per_s']:.0f}",
                    f"{found['tokens_per_s'] / plain:.2f}" if plain else "",
                    str(found.get("tokens_per_step", "")),
                    str(found.get("differ", "")),
                ]
                lines.append(f"| {setup} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], out: Path) -> None:
    """Median time of an answer in each setup, a panel for each engine and adapter."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        (engine, name, setups) for engine, adapters in result["engines"].items() for name, setups in adapters.items()
    ]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 1.9 * len(panels)), squeeze=False)
    for (engine, name, setups), (axis,) in zip(panels, axes, strict=True):
        names = list(setups)[::-1]
        bars = axis.barh(names, [setups[setup]["answer_ms"] for setup in names], color="#4878a8")
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(f"{engine}, {name}: median ms per answer", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""A bundle and rows of its tasks in; how fast each way of decoding answers them out: a table and a plot.

    pip install -e '.[demo]'
    python benchmarks/decoding.py build/smart-home --recipe examples/smart-home/quick.yaml --out benchmarks/results

Both engines answer the same validation rows of each adapter greedily: as the plain base, with the adapter token by
token, with its output constraint, with drafts, and with both. llama-cpp-python answers them with the same adapter, also
with its prompt lookup and with its grammar. The setups take turns row by row, in one process per engine. Without
`output` in the recipe, the constraint is inferred from the training rows.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Python searches the script's folder first, where onnx.py would hide the package onnx.
sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).resolve().parent]

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.decoding.output import OutputSpec
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


@dataclass
class Sums:
    """What one setup measured of all rows."""

    answers: list[Timed] = field(default_factory=list)

    def figures(self, reference: Sums | None) -> dict[str, Any]:
        """Medians and rates as JSON values; `differ` counts other texts than those of `reference`."""
        decoded = sum(answer.tokens - 1 for answer in self.answers)
        seconds = sum(answer.whole_s - answer.first_s for answer in self.answers)
        steps = [answer.tokens_per_step for answer in self.answers if answer.tokens_per_step]
        found = {
            "answer_ms": round(statistics.median(answer.whole_s for answer in self.answers) * 1e3, 1),
            "tokens_per_s": round(decoded / seconds, 1) if decoded else 0.0,
            "tokens": round(sum(answer.tokens for answer in self.answers) / len(self.answers), 1),
        }
        found |= {"tokens_per_step": round(statistics.fmean(steps), 2)} if steps else {}
        if reference is not None:
            pairs = zip(self.answers, reference.answers, strict=True)
            found["differ"] = sum(one.text != other.text for one, other in pairs)
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
    parser.add_argument("--worker", metavar="ENGINE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    engines = {engine: _run(engine) for engine in read_manifest(options.bundle).base.files}
    result = {"machine": _machine(), "rows": options.rows, "threads": options.threads, "engines": engines}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decoding.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "decoding.md").write_text(table(result), encoding="utf-8")
        plot(result, options.out / "decoding.png")
    print(json.dumps(result) if options.json else table(result))


def _run(engine: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *sys.argv, "--worker", engine], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each adapter and setup with one engine."""
    recipe = load_recipe(options.recipe)
    opening: dict[str, Any] = {"engine": options.worker, "threads": options.threads, "disk_mb": 0}
    found = {}
    with (
        Runtime.open(options.bundle, **opening) as drafting,
        Runtime.open(options.bundle, **opening, drafts=False) as plain,
    ):
        for name in drafting.adapters:
            task = read_task(name, recipe)
            rows = [_prompt_of(row) for row in task.validation[: options.rows]]
            stored = drafting.manifest.adapter(name).output
            spec = (
                infer([row.completion or "" for row in task.train]) if stored is None else OutputSpec.from_json(stored)
            )
            setups = _own(drafting, plain, name, spec)
            if options.worker == "gguf":
                setups |= _llama_cpp(options, name, spec)
            sums = {setup: Sums() for setup in setups}
            for number, prompt in enumerate([rows[0], *rows]):
                for setup, answer in setups.items():
                    timed = answer(prompt)
                    # The first round only warms up.
                    if number:
                        sums[setup].answers.append(timed)
            found[name] = {
                setup: of.figures(sums[PLAIN] if setup.startswith(PLAIN) else None) for setup, of in sums.items()
            }
    return found


Prompt = list[Message]


def _own(drafting: Runtime, plain: Runtime, name: str, spec: OutputSpec | None) -> dict[str, Callable[[Prompt], Timed]]:
    constraint = {} if spec is None else {spec.kind: json.loads(spec.text) if spec.kind != "regex" else spec.text}

    def of(runtime: Runtime, adapter: str | None, **more: Any) -> Callable[[Prompt], Timed]:  # noqa: ANN401 - options
        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            found = runtime.generate(prompt, adapter=adapter, max_tokens=MOST_TOKENS, **more)
            whole_s, timings = time.perf_counter() - begin, found.timings
            return Timed(found.text, found.tokens, whole_s, timings.ttft_ms / 1e3, timings.tokens_per_step)

        return answer

    setups = {
        "base": of(plain, None),
        PLAIN: of(plain, name, free=True),
        f"{PLAIN}, drafts": of(drafting, name, free=True),
    }
    if constraint:
        setups[f"{PLAIN}, constraint"] = of(plain, name, **constraint)
        setups[f"{PLAIN}, drafts and constraint"] = of(drafting, name, **constraint)
    return setups


def _llama_cpp(options: argparse.Namespace, name: str, spec: OutputSpec | None) -> dict[str, Callable[[Prompt], Timed]]:
    from edgetune_runtime.engines.gguf.llama import library
    from llama_cpp.llama_grammar import LlamaGrammar
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    manifest = read_manifest(options.bundle)
    entry = manifest.adapter(name)

    def of(grammar: Any = None, **more: Any) -> Callable[[Prompt], Timed]:  # noqa: ANN401 - options of `Llama`
        llama = library().Llama(
            str(resolve(options.bundle, manifest.base.files["gguf"])),
            lora_path=str(resolve(options.bundle, entry.files["gguf"])),
            n_ctx=CONTEXT,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
            **more,
        )
        template = llama.metadata["tokenizer.chat_template"]

        def answer(prompt: Prompt) -> Timed:
            begin = time.perf_counter()
            messages = messages_for(prompt, entry.system)
            text = render(template, messages, add_generation_prompt=True, bos="", eos="")
            pieces, first_s = [], 0.0
            for part in llama.create_completion(
                llama.tokenize(text.encode(), add_bos=False, special=True),
                max_tokens=MOST_TOKENS,
                temperature=0.0,
                grammar=grammar,
                stream=True,
            ):
                pieces.append(part["choices"][0]["text"])
                first_s = first_s or time.perf_counter() - begin
            whole_s = time.perf_counter() - begin
            whole = "".join(pieces)
            return Timed(whole, len(llama.tokenize(whole.encode(), add_bos=False)) + 1, whole_s, first_s)

        return answer

    setups = {
        "llama-cpp-python": of(),
        "llama-cpp-python, prompt lookup": of(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4)),
    }
    if spec is not None and spec.kind == "schema":
        setups["llama-cpp-python, grammar"] = of(LlamaGrammar.from_json_schema(spec.text, verbose=False))
    return setups


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
            head = "| setup | answer, ms | decode, tokens/s | speedup | tokens per step | other texts |"
            lines += ["", f"{engine}, {name}", "", head, "| --- | --- | --- | --- | --- | --- |"]
            for setup, figures in setups.items():
                cells = [
                    f"{figures['answer_ms']:.0f}",
                    f"{figures['tokens_per_s']:.0f}",
                    f"{figures['tokens_per_s'] / plain:.2f}" if plain else "",
                    str(figures.get("tokens_per_step", "")),
                    str(figures.get("differ", "")),
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

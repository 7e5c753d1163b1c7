"""Run a bundle and its server within the memory of a small board, in both engines, and compare it with the prediction.

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/small_board.py build/smart-home --out benchmarks/results

The server runs in a memory cgroup without swap, which needs root on Linux (elsewhere: only resident memory). It answers
requests to the base and to every adapter with a prompt of half the context. The bundle and the libraries are private
copies that are dropped from the page cache first, so that their pages count. Weights are mapped, not repacked, as on
the Pi Zero 2 W.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result
from benchmarks.harness.cgroup import memory_limit
from benchmarks.harness.memory import status_mb
from benchmarks.harness.prompts import words
from benchmarks.harness.server import serving
from benchmarks.harness.tables import markdown

import json
import os
import shutil
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetune_devices import boards, fit
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.sizing.needs import needs_of_bundle
from edgetune_runtime.sizing.options import with_options

BOARD = "pi-zero-2w"
CONTEXT = 1024
CACHE_MB = 8
ANSWER_TOKENS = 24
PATIENCE_S = 120
"""An answer takes seconds; a server that reads its mapped files again and again takes longer than this."""
LIBRARIES = ("numpy", "numpy.libs", "llama_cpp", "onnxruntime", "tokenizers", "llguidance")


def main() -> None:
    """Serve the bundle with each engine within the limit, and write the figures."""
    parser = BENCHMARK.parser(only=ENGINES)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, default=280)
    options = BENCHMARK.options(parser)
    figures = {}
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        copies = Path(folder)
        bundle = shutil.copytree(options.bundle, copies / "bundle")
        for name in LIBRARIES:
            copy_library(name, copies / "site")
        for engine in options.only:
            drop_from_cache(copies)
            figures[engine] = measure(bundle, copies / "site", engine, options.limit_mb)
    BENCHMARK.report(options, {"context_length": CONTEXT, "engines": figures})


def measure(bundle: Path, site: Path, engine: str, limit_mb: float) -> dict[str, Any]:
    """What the server used within the limit, the answers that came in time, and what was predicted."""
    names = ("", *read_manifest(bundle).adapters)
    needs = needs_of_bundle(bundle, context_length=CONTEXT, engine=engine)
    needs = with_options(needs, cache_mb=CACHE_MB, serves=True)
    board = boards.load(BOARD)
    limited = replace(board, ram_free_mib=int(limit_mb * 1e6 / 2**20))
    predicted, within = fit.fit(needs, board), fit.fit(needs, limited)
    places = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    environment = {"PYTHONPATH": ":".join(places), "EDGETUNE_CACHE": str(site.parent / "states")}
    # As in a unit: the limit is for one process.
    environment |= {"EDGETUNE_PREFLIGHT": "0"}
    flags = ["--engine", engine, "--context-length", str(CONTEXT), "--cache-mb", str(CACHE_MB), "--contexts", "1"]
    with (
        memory_limit(limit_mb) as limit,
        serving(bundle, [*flags, "--no-repack"], environment=environment, within=limit.started_in) as server,
    ):
        answers: dict[str, str] = {}
        with suppress(TimeoutError):
            for name in names:
                answers[name] = ask(server.url, name)
        keys = {"peak": "VmHWM", "anonymous": "RssAnon"}
        resident = {name: status_mb(server.process.pid, key) for name, key in keys.items()}
        peak, kills = limit.peak_mb, limit.kills
    return {
        "asked": len(names),
        "answers": answers,
        "kills": kills,
        "cgroup_peak_mb": peak,
        "resident_mb": resident,
        "predicted_mb": round(predicted.needed_mb, 1),
        "predicted_kept_mb": round(predicted.kept_mb, 1),
        "predicted_fits_board": predicted.fits,
        "predicted_fits_limit": within.fits,
    }


def ask(url: str, adapter: str) -> str:
    """The answer of an adapter, or of the base, to a prompt of half the context."""
    models = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"]
    model = adapter or models[0]["id"]
    body = {
        "model": model,
        "max_tokens": ANSWER_TOKENS,
        "messages": [{"role": "user", "content": words(CONTEXT // 2 - 90)}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=PATIENCE_S).read())
    return str(answer["choices"][0]["message"]["content"])


def copy_library(name: str, site: Path) -> None:
    """Copy an installed package, so that its pages are counted for the process that reads them first."""
    spec = find_spec("numpy" if name == "numpy.libs" else name)
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent.with_name(name)
    if folder.is_dir():
        shutil.copytree(folder, site / name)


def drop_from_cache(folder: Path) -> None:
    """Drop the pages of all files in the folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def table(result: Result) -> str:
    """The figures as a Markdown table."""
    columns = {
        "engine": "{engine}",
        "answers": "{answered} of {asked}",
        "limit, MB": "{limit_mb:.0f}",
        "cgroup peak": "{cgroup_peak_mb:.0f}",
        "killed": "{kills}",
        "resident peak": "{resident_mb[peak]:.0f}",
        "without mapped files": "{resident_mb[anonymous]:.0f}",
        "predicted": "{predicted_mb:.0f}",
        "at least": "{predicted_kept_mb:.0f}",
        f"fits {BOARD}, limit": "{predicted_fits_board}, {predicted_fits_limit}",
    }
    rows = [
        {"engine": engine, "limit_mb": result["limit_mb"], "answered": len(figures["answers"]), **figures}
        for engine, figures in result["engines"].items()
    ]
    return markdown(rows, columns)


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

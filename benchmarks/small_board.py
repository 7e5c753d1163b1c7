"""Run a bundle and its server within the memory of a small board, in both engines, and compare it with the prediction.

    edgetune build examples/smart-home/quick.yaml --out build/smart-home
    python benchmarks/small_board.py build/smart-home --out benchmarks/results

The server runs in a memory cgroup without swap, which needs root on Linux (elsewhere: only resident memory). It answers
requests to the base and to every adapter with a prompt of half the context. The bundle and the libraries are private
copies that are dropped from the page cache first, so that their pages count. Weights are mapped, not repacked, as on
the Pi Zero 2 W.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

# Python imports from the script's folder first, where onnx.py would shadow the package onnx.
sys.path[:] = [
    str(Path(__file__).resolve().parents[1]),
    *(place for place in sys.path if Path(place) != Path(__file__).resolve().parent),
]

from dataclasses import replace

from edgetune_devices import boards, fit
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.sizing.options import with_options

from benchmarks.cgroup import MemoryLimit, memory_limit
from benchmarks.fit import WORDS
from benchmarks.machine import this_machine

BOARD = "pi-zero-2w"
ENGINES = ("gguf", "onnx")
CONTEXT = 1024
CACHE_MB = 8
ANSWER_TOKENS = 24
PATIENCE_S = 120
"""An answer takes seconds; a server that reads its mapped files again and again takes longer than this."""
LIBRARIES = ("numpy", "numpy.libs", "llama_cpp", "onnxruntime", "tokenizers", "llguidance")


def main() -> None:
    """Serve the bundle with each engine within the limit, and write the figures."""
    parser = argparse.ArgumentParser(description="Run a bundle's server within the memory of a small board.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, default=280)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write small_board.json and small_board.md here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        copies = Path(folder)
        bundle = shutil.copytree(options.bundle, copies / "bundle")
        for name in LIBRARIES:
            copy_library(name, copies / "site")
        for engine in ENGINES:
            drop_from_cache(copies)
            found[engine] = measure(bundle, copies / "site", engine, options.limit_mb)
    result = {"machine": this_machine(), "limit_mb": options.limit_mb, "context_length": CONTEXT, "engines": found}
    if options.out:
        (options.out / "small_board.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (options.out / "small_board.md").write_text(table(result), encoding="utf-8")
    print(json.dumps(result) if options.json else table(result))


def measure(bundle: Path, site: Path, engine: str, limit_mb: float) -> dict[str, Any]:
    """What the server used within the limit, the answers that came in time, and what was predicted."""
    names = ("", *read_manifest(bundle).adapters)
    needs = fit.needs_of_bundle(bundle, context_length=CONTEXT, engine=engine)
    needs = with_options(needs, cache_mb=CACHE_MB, serves=True)
    board = boards.load(BOARD)
    limited = replace(board, ram_free_mib=int(limit_mb * 1e6 / 2**20))
    predicted, within = fit.fit(needs, board), fit.fit(needs, limited)
    with memory_limit(limit_mb) as limit, serving(bundle, site, engine, limit) as (url, process):
        answers: dict[str, str] = {}
        with suppress(TimeoutError):
            for name in names:
                answers[name] = ask(url, name)
        resident = resident_mb(process.pid)
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


@contextmanager
def serving(bundle: Path, site: Path, engine: str, limit: MemoryLimit) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server in the cgroup, and its process."""
    command = [sys.executable, "-m", "edgetune_runtime", "serve", str(bundle), "--engine", engine, "--port", "0"]
    command += ["--context-length", str(CONTEXT), "--cache-mb", str(CACHE_MB), "--contexts", "1", "--no-repack"]
    places = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    environment = {**os.environ, "PYTHONPATH": ":".join(places), "EDGETUNE_CACHE": str(site.parent / "states")}
    # As in a unit: the limit is for one process.
    environment |= {"EDGETUNE_PREFLIGHT": "0"}
    join = f'echo $$ > {limit.procs} && exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", join, "sh", *command],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rsplit(" at ")[1].strip(), process
            break
        else:
            raise RuntimeError(f"the server with {engine} did not start within the limit")
    finally:
        process.kill()
        process.wait()
        time.sleep(0.2)


def ask(url: str, adapter: str) -> str:
    """The answer of an adapter, or of the base, to a prompt of half the context."""
    text = " ".join(islice(cycle(WORDS.split()), CONTEXT // 2 - 90))
    models = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"]
    model = adapter or models[0]["id"]
    body = {"model": model, "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=PATIENCE_S).read())
    return str(answer["choices"][0]["message"]["content"])


def resident_mb(pid: int) -> dict[str, float]:
    """Resident memory of a process: in all, and without mapped files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        key: int(lines[name].split()[0]) * 1024 / 1e6 for key, name in (("peak", "VmHWM"), ("anonymous", "RssAnon"))
    }


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


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| engine | answers | limit, MB | cgroup peak | killed | resident peak | without mapped files | predicted "
        f"| at least | fits {BOARD}, limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for engine, found in result["engines"].items():
        resident = found["resident_mb"]
        fits = [("yes" if found[key] else "no") for key in ("predicted_fits_board", "predicted_fits_limit")]
        cells = [
            engine,
            f"{len(found['answers'])} of {found['asked']}",
            f"{result['limit_mb']:.0f}",
            f"{found['cgroup_peak_mb']:.0f}",
            str(found["kills"]),
        ]
        cells += [f"{resident['peak']:.0f}", f"{resident['anonymous']:.0f}", f"{found['predicted_mb']:.0f}"]
        lines.append(f"| {' | '.join([*cells, format(found['predicted_kept_mb'], '.0f'), ', '.join(fits)])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

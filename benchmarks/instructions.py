"""Count the instructions that llama.cpp's CPU backend takes per token on emulated boards: which variant does less work?

    sudo .venv/bin/python benchmarks/instructions.py build/smart-home --json --out benchmarks/results

Installs the bundle's kit on the emulated board of tests/arm64, requantizes its base, and decodes with each processor
under qemu, which logs every block of instructions of the backend's library. The instructions of a token are the
difference between runs with more and with fewer tokens. A sanity check, and no measure of time: instructions differ in
what they cost, and memory is not emulated.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import Benchmark, Result
from benchmarks.harness.tables import markdown, progress

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm64.board import SHARED, Board
from arm64.rootfs import missing, prepare
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_runtime.bundle import read_manifest

from edgetune.common.progress import Progress
from edgetune.delivery.kit.make import KitOptions, make_kit

CPUS = {"cortex-a72": "Pi 4", "cortex-a76": "Pi 5"}
QUANTIZATIONS = ("q4_0", "q8_0")
# Tokens of the prompt and steps: the first is subtracted from the others.
LEAST, MORE_STEPS, LONGER = (1, 0), (1, 2), (9, 0)
# On the board: decode a prompt and some steps; print where the backend's code is, and its name.
PROGRAM = """\
import sys
from pathlib import Path
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.gguf.ggml import cpu_backend
from edgetune_runtime.engines.gguf.llama import library
engine = GgufEngine(Path(sys.argv[1]), context_length=64, threads=1)
code = next(line for line in open("/proc/self/maps") if "libggml-cpu-" in line and " r-xp " in line)
print(code.split()[0].replace("-", "..0x"), cpu_backend(library()).variant)
engine.decode(range(5, 5 + int(sys.argv[2])))
for token in range(int(sys.argv[3])):
    engine.decode([5 + token])
"""
# As long as a real range: the arguments and the environment must not move the library.
ANYWHERE = "0x000000000000..0x000000000001"


def executed(log: Iterable[str]) -> int:
    """The instructions executed according to qemu's log of blocks: what each contains, and each time that it ran."""
    lengths: dict[int, int] = {}
    runs: Counter[int] = Counter()
    block: int | None = None
    for line in log:
        if line.startswith("Trace"):
            runs[int(line.split("/", 2)[1], 16)] += 1
        elif line.startswith("IN:"):
            block = None
        elif line.startswith("0x"):
            if block is None:
                block = int(line.partition(":")[0], 16)
                lengths[block] = 0
            lengths[block] += 1
    return sum(count * lengths[block] for block, count in runs.items())


@dataclass(frozen=True)
class Decoding:
    """A model in the board's folder, decoded as the processor `cpu` by the runtime of `python`."""

    board: Board
    python: str
    model: str
    cpu: str

    def run(self, size: tuple[int, int], code: str) -> tuple[str, str, int]:
        """The place of the backend's code, the backend's variant, and the instructions executed at `code`."""
        fifo = self.board.shared / "log"
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        counts: list[int] = []

        def count() -> None:
            with fifo.open(encoding="ascii", errors="replace") as log:
                counts.append(executed(log))

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        log = (f"QEMU_DFILTER={code}", "QEMU_LOG=in_asm,exec,nochain", f"QEMU_LOG_FILENAME={SHARED}/{fifo.name}")
        # Without randomized addresses, so that the next run finds the code at the same place.
        command = ("setarch", "-R", "env", "PYTHONHASHSEED=0", *log, self.python, "-c", PROGRAM)
        place, variant = self.board.run(*command, f"{SHARED}/{self.model}", *map(str, size), cpu=self.cpu).split()
        counter.join()
        return f"0x{place}", variant, counts[0]

    def measure(self) -> dict[str, Any]:
        """Millions of instructions per token, of a prompt and of a step."""
        code, variant, _ = self.run(LEAST, ANYWHERE)
        counts = {}
        for size in (LEAST, MORE_STEPS, LONGER):
            place, _, counts[size] = self.run(size, code)
            if place != code:
                raise SystemExit(f"the code of {variant} is at {place}, not at {code} as before: run it again")
        prefill = (counts[LONGER] - counts[LEAST]) / (LONGER[0] - LEAST[0])
        decode = (counts[MORE_STEPS] - counts[LEAST]) / MORE_STEPS[1]
        return {"backend": variant, "prefill": round(prefill / 1e6, 1), "decode": round(decode / 1e6, 1)}


def install(bundle: Path, board: Board) -> str:
    """Install the bundle's kit on the board; returns the path of its Python there."""
    kit = board.shared / "kit"
    make_kit(bundle, "pi-4", kit, KitOptions("3.13", "gguf"), Progress(quiet=True))
    board.run("sh", f"{SHARED}/kit/install.sh", "--prefix", f"{SHARED}/edgetune", cpu="cortex-a72")
    return f"{SHARED}/edgetune/current/venv/bin/python"


def main() -> None:
    """Measure each processor with each quantization, and print a table."""
    parser = BENCHMARK.parser(only=QUANTIZATIONS)
    parser.add_argument("bundle", type=Path)
    options = BENCHMARK.options(parser)
    if missing():
        raise SystemExit(f"this needs {'; and '.join(missing())}")
    base = options.bundle / read_manifest(options.bundle).base.files["gguf"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        board = Board(prepare(), Path(folder))
        python = install(options.bundle, board)
        for quantization in options.only:
            model = f"{quantization}.gguf"
            quantize_gguf(base, board.shared / model, quantization, again=True)
            for cpu, name in CPUS.items():
                figures = Decoding(board, python, model, cpu).measure()
                rows.append({"quantization": quantization, "processor": f"{cpu} ({name})", **figures})
                progress(str(rows[-1]))
    BENCHMARK.report(options, {"rows": rows})


def table(result: Result) -> str:
    """The rows as a table in Markdown, in millions of instructions per token."""
    return markdown(result["rows"], {name: f"{{{name}}}" for name in result["rows"][0]})


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

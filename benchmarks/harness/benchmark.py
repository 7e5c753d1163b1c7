"""A benchmark's command line, and its results as JSON, a Markdown table and a plot."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import this_machine

ENGINES = ("gguf", "onnx")
Result = dict[str, Any]
_UNRECORDED = ("json", "out", "only", "quick")
"""Options that do not change what is measured."""


def _as_json(result: Result) -> str:
    return json.dumps(result, indent=2)


@dataclass(frozen=True)
class Benchmark:
    """The benchmark in `file`: its docstring, its results as Markdown (default: JSON), and a plot of them.

    `plot` draws the results into the file that it gets.
    """

    file: str
    doc: str | None
    table: Callable[[Result], str] = _as_json
    plot: Callable[[Result, Path], None] | None = None

    def parser(
        self, *, writes: bool = True, only: Sequence[str] = (), threads: int | None = None, works: bool = False
    ) -> argparse.ArgumentParser:
        """The options that benchmarks share.

        `writes` adds those of results, `only` a choice among these names, `threads` their number, `works` a folder for
        prepared files.
        """
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        if only:
            names = ", ".join(only)
            parser.add_argument(
                "--only", nargs="+", choices=only, default=only, metavar="NAME", help=f"some of: {names}"
            )
        if threads:
            parser.add_argument("--threads", type=int, default=threads, help="of each engine (default: %(default)s)")
        if works:
            parser.add_argument("--work", type=Path, metavar="DIR", help="keep prepared files here")
        if writes:
            files = ", ".join(path.name for path in self._files(Path()).values())
            parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {files} here")
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        return parser

    def options(self, parser: argparse.ArgumentParser, **quick: object) -> argparse.Namespace:
        """The parsed options; `quick` has the defaults of `--quick`."""
        small = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in quick.items())
        if quick:
            parser.add_argument("--quick", action="store_true", help=f"a short run, to see that it works: {small}")
        options = parser.parse_args()
        if quick and options.quick:
            parser.set_defaults(**quick)
            options = parser.parse_args()
        return options

    def report(self, options: argparse.Namespace, result: Result) -> None:
        """Print the result with the machine and the options, and write it to `--out`."""
        settings = {
            name: value
            for name, value in vars(options).items()
            if name not in _UNRECORDED and isinstance(value, int | float | str | None)
        }
        result = {"machine": this_machine(), **settings, **result}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            files = self._files(options.out)
            files["json"].write_text(_as_json(result) + "\n", encoding="utf-8")
            if "md" in files:
                files["md"].write_text(self.table(result), encoding="utf-8")
            if self.plot:
                self.plot(result, files["png"])
        print(json.dumps(result) if options.json else self.table(result))

    def _files(self, folder: Path) -> dict[str, Path]:
        kinds = {"json": True, "md": self.table is not _as_json, "png": self.plot is not None}
        return {kind: folder / f"{Path(self.file).stem}.{kind}" for kind, is_written in kinds.items() if is_written}


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of `--work`, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

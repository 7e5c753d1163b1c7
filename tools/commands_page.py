"""Write the documentation page of both commands from their help texts: python tools/commands_page.py > PAGE"""

from __future__ import annotations

import io
import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTRODUCTION = """\
# Commands

`edgetune` trains and exports on a computer; `edgetune-run` runs bundles on a board. Results go to standard output,
progress and errors to standard error. `NO_COLOR` is respected, `--debug` prints tracebacks.

Exit codes: 0 success; 1 unexpected error; 2 usage or recipe; 3 not found; 4 verification; 5 incompatible; 6 out of
space; 7 too many calls are waiting, or another deploy is at work; 8 board or teacher not reached; 9 unsure
answer; 130 interrupted.

| variable | what it sets |
| --- | --- |
| `EDGETUNE_CACHE` | the folder of prompt states and past answers (default: `edgetune/states` in the user's cache) |
| `EDGETUNE_PREFLIGHT=0` | open new bundles without a child process first |
| `EDGETUNE_DEFER_KEY` | the key of the bigger model of `--defer-to` |
| `EDGETUNE_REGISTRY_PASSWORD` | the password for an OCI registry |
| `EDGETUNE_KEYS_PASSPHRASE`, `EDGETUNE_KEYS_PIN` | of signing keys |
| `HF_TOKEN`, `OPENAI_API_KEY`, `NO_COLOR` | as elsewhere |
"""
# The lines of a help text that start with the name of a command.
_COMMAND = re.compile(r"^ {2,4}([a-z][a-z-]*)(?:  |$)", re.MULTILINE)


def main() -> None:
    """Print the page, 100 columns wide."""
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    print(INTRODUCTION)
    for program in ("edgetune", "edgetune-run"):
        for command, text in pages(program, ()):
            depth = "##" if command == program else "###"
            print(f"{depth} {command}\n\n```text\n{text}\n```\n")


def pages(program: str, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and help text of a command and all its subcommands."""
    text = help_of(program, path)
    yield " ".join((program, *path)), text
    for name in commands_in(text):
        yield from pages(program, (*path, name))


def commands_in(text: str) -> list[str]:
    """The names of the commands in a help text."""
    _, _, listed = text.partition("ommands:\n")
    return _COMMAND.findall(listed)


def help_of(program: str, path: tuple[str, ...]) -> str:
    """The output of `program path --help`."""
    project = ROOT / "runtime" if program == "edgetune-run" else ROOT
    scripts = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts[program].partition(":")
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        getattr(import_module(module), function)([*path, "--help"])
    return out.getvalue().strip()


if __name__ == "__main__":
    main()

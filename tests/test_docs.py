"""Runs the commands and Python blocks of the documentation and READMEs, page by page, on a tiny base.

A block of `sh`, `python`, `js` or `go` is run unless the line above it is `<!-- not run: REASON -->`. A block below
`<!-- file: NAME -->` is written to that file first. `edgetune-run serve` and `python -m http.server` run until the end
of the page, on a free port in place of 8080.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from edgetune_runtime.sizing import bench
from ports import free_port, wait_for_port

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ("home-assistant", "smart-home", "triage")
# Made by `make docs`, from the commands' own help.
GENERATED = {"reference/commands.md"}
PAGES = sorted(page for path in DOCS.rglob("*.md") if (page := path.relative_to(DOCS).as_posix()) not in GENERATED)
READMES = ("README.md", "runtime/README.md", *(f"examples/{name}/README.md" for name in EXAMPLES))
CHECKED = [*READMES, *(f"docs/{page}" for page in PAGES)]
FORMS = {"sh", "python", "js", "go", "ini", "yaml", "json", "text"}
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<form>[^\n]*)\n(?P<text>.*?)```", re.DOTALL)
# What makes a build of a page's recipe a matter of seconds; more threads only wait for each other on a tiny base.
QUICK = ("training.max_steps=2", "training.precision=fp32", "threads=1")
ROWS = 20
BUILD = ["edgetune", "build", "examples/smart-home/recipe.yaml", "--out", "build/smart-home"]


@dataclass(frozen=True)
class Block:
    """A fenced block: what the comment above it says, its language and its text."""

    mark: str
    form: str
    text: str

    @property
    def is_run(self) -> bool:
        return self.form in {"sh", "python", "js", "go"} and not self.mark.startswith("not run: ")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, which is named by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(found["mark"] or "", found["form"], found["text"]) for found in BLOCK.finditer(text)]


RUN = [page for page in CHECKED if any(block.is_run for block in blocks(page))]


@pytest.fixture(scope="session")
def build_folder(
    tiny_gguf: Callable[[str], Path],
    once: Callable[[str, Callable[[Path], object]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder `build` of all pages, with what the command BUILD makes, beside their examples with few rows."""

    def make(folder: Path) -> None:
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (folder / "examples/smart-home/data").glob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:ROWS]), encoding="utf-8")
        with contextlib.chdir(folder):
            assert run(BUILD, tiny_gguf("llama")) == 0

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(once("docs", make), folder, dirs_exist_ok=True)
    # The base to move to, beside the other one.
    tiny_gguf("qwen2")
    return folder / "build"


def run(words: list[str], base: Path) -> int:
    """Run a command in this process, its recipe with the tiny base, a short training and few rows; the exit code."""
    if ">" in words:
        *words, _, file = words
        with Path(file).open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
            return run(words, base)
    program, *rest = words
    if program == "python":
        return run_script(rest)
    if program == "edgetune" and rest[0] in {"build", "plan"}:
        rest += [word for setting in (f"base={base}", *QUICK) for word in ("--set", setting)]
    if program == "edgetune" and rest[0] == "rebase":
        rest[rest.index("--base") + 1] = str(base.with_name("qwen2.gguf"))
        settings = (*QUICK, "targets=[gguf]")
        rest += ["--margin", "inf", *(word for setting in settings for word in ("--set", setting))]
    if program == "edgetune" and rest[0] == "evaluate" and "--limit" not in rest:
        rest += ["--limit", "5"]
    project = ROOT / "runtime" if program == "edgetune-run" else ROOT
    scripts = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts[program].partition(":")
    code: int = getattr(import_module(module), function)(rest)
    return code


@contextlib.contextmanager
def serving(words: list[str], port: int) -> Iterator[None]:
    """Run `edgetune-run serve` in a process of its own until the block ends."""
    command = [sys.executable, "-m", "edgetune_runtime", *words[1:], "--port", str(port), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["url"].endswith(f":{port}")
            yield
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def serving_files(words: list[str], port: int) -> Iterator[None]:
    """Run `python -m http.server` in a process of its own until the block ends."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *words[1:]], **quiet) as process:
        try:
            wait_for_port(port)
            yield
        finally:
            process.terminate()
            process.wait(60)


GO = """package main

import (
{imports}
)

func main() {{
{text}}}
"""


def run_outside(words: list[str]) -> None:
    """Run curl, cp, node or go, which must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, '"error"' in done.stdout) == (0, False), done.stdout + done.stderr


def run_go(text: str) -> None:
    """Run the inside of a Go function that prints, with the packages that it names."""
    packages = sorted(set(re.findall(r"\b(fmt|io|os|strings|http|json)\.", text)))
    paths = {"http": "net/http", "json": "encoding/json"}
    imports = "\n".join(f'\t"{paths.get(name, name)}"' for name in packages)
    Path("main.go").write_text(GO.format(imports=imports, text=text), encoding="utf-8")
    run_outside(["go", "run", "main.go"])


def run_script(arguments: list[str]) -> int:
    """Run `python ARGUMENTS` in this process; 0, as an error of the script ends the test."""
    before, sys.argv = sys.argv, arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv = before
    return 0


def run_line(words: list[str], port: int, servers: contextlib.ExitStack, base: Path, built: list[list[str]]) -> None:
    """Run a line of a block of `sh`, which must succeed, unless it is one of the commands that have `built` a bundle.

    A server runs until `servers` is closed.
    """
    if words[:2] == ["edgetune-run", "serve"]:
        servers.enter_context(serving(words, port))
    elif words[:3] == ["python", "-m", "http.server"]:
        servers.enter_context(serving_files(words, port))
    elif words[0] in {"curl", "cp"}:
        run_outside(words)
    elif words[0] == "export":
        # Other variables are the shell's own.
        name, value = words[1].split("=", 1)
        if name.startswith("EDGETUNE_"):
            servers.enter_context(pytest.MonkeyPatch.context()).setenv(name, value)
    elif words not in built:
        assert run(words, base) == 0, words
        if words[:2] == ["edgetune", "build"]:
            built.append(words)


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(
    page: str, build_folder: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (build_folder, build_folder.with_name("examples")):
        Path(folder.name).symlink_to(folder)
    names: dict[str, object] = {}
    port = free_port()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    # It reads the variable when it is imported.
    monkeypatch.delitem(sys.modules, "ollama", raising=False)
    # `bench` starts as many processes; tests/runtime/test_cli.py has its figures.
    monkeypatch.setattr(bench, "STARTS", 1)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    missing = set()
    # The fixture has run BUILD.
    built = [BUILD]
    with contextlib.ExitStack() as servers:
        for block in blocks(page):
            text = block.text.replace("8080", str(port))
            program = {"js": "node", "go": "go"}.get(block.form)
            if block.mark.startswith("file: "):
                Path(block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
            elif block.is_run and block.form == "python":
                exec(compile(text, page, "exec"), names)
            elif block.is_run and program is not None and shutil.which(program) is None:
                missing.add(program)
            elif block.is_run and block.form == "js":
                run_outside(["node", "--input-type=module", "--eval", text])
            elif block.is_run and block.form == "go":
                run_go(text)
            elif block.is_run:
                for line in text.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        run_line(words, port, servers, tiny_gguf("llama"), built)
    if missing:
        pytest.skip(f"all but the blocks for {', '.join(sorted(missing))}, which is not installed")


@pytest.mark.parametrize("page", CHECKED)
def test_every_block_names_its_form_and_what_is_not_run_says_why(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {block.form for block in blocks(page)} <= FORMS
    assert not re.search(r"^ {4}(edgetune|python|pip|make)\b", text, re.MULTILINE), "use a fenced block"
    for block in blocks(page):
        if block.mark.startswith("not run"):
            assert len(block.mark) > len("not run: ") + 10
            assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", block.mark)), block.mark
        if block.form == "json":
            assert [json.loads(line) for line in block.text.splitlines()]


def test_every_page_is_in_the_navigation() -> None:
    def pages(entries: list[object]) -> set[str]:
        found = set()
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                found |= pages(value) if isinstance(value, list) else {value}
        return found

    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert pages(project["nav"]) == {*PAGES, *GENERATED}


def test_the_page_of_commands_finds_all_commands() -> None:
    made = runpy.run_path(str(ROOT / "tools/commands_page.py"))
    of_runtime = {command for command, _ in made["pages"]("edgetune-run", ())}
    assert {"edgetune-run", "edgetune-run bench", "edgetune-run cache ls"} <= of_runtime
    listed = set(made["commands_in"](made["help_of"]("edgetune", ())))
    assert {"build", "compare", "devices", "evaluate", "export", "init", "plan", "report", "schema"} <= listed

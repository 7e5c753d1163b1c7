"""Mutations of each kind of file: `make fuzz` with a few cases, and the files of tests/corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from fuzz import corpus
from fuzz.__main__ import SEEDS, valid_file
from fuzz.guided import harmful_files
from fuzz.kinds import KINDS
from fuzz.names import OTHER_BASES
from fuzz.pool import Worker
from fuzz.seeds import write_seeds

CASES = 3


@pytest.fixture(scope="session")
def seeds(
    tiny_source: Callable[[str], Source],
    tiny_folder: Callable[[str], Path],
    tiny_gguf: Callable[[str], Path],
    once: Callable[[str, Callable[[Path], object]], Path],
) -> Path:
    """The folder with the valid files, which take 20 s to make."""

    def make(is_made: Path) -> None:
        others = {name: tiny_gguf(name) for name in OTHER_BASES}
        # Not in what is renamed when it is made, as one of the files has the path of another.
        write_seeds(is_made.with_name("fuzz") / SEEDS, tiny_source("llama"), tiny_folder("llama"), others)
        is_made.touch()

    return once("fuzz-is-made", make).with_name("fuzz") / SEEDS


@pytest.mark.parametrize("kind", corpus.kinds())
def test_a_file_that_once_did_harm_is_opened_or_refused_in_one_line(kind: str, seeds: Path) -> None:
    form, valid = KINDS[kind].form, valid_file(kind, seeds)
    files = [(entry.cause, form.applied(valid, entry.edits)) for entry in corpus.entries(kind)]
    with closing(Worker(kind, seeds, is_guarded=True)) as worker:
        outcomes = [(once, worker.run(file)) for once, file in files]
    assert [f"{once} | {now.kind}: {now.cause}" for once, now in outcomes if now.is_finding] == []


def test_coverage_guides_cases_where_atheris_is_installed(seeds: Path) -> None:
    pytest.importorskip("atheris")
    assert list(harmful_files("kit", seeds, valid_file("kit", seeds), CASES, seed=1)) == []


def test_fuzzing_runs_cases_of_the_kinds_that_are_named(seeds: Path) -> None:
    kinds = {"gguf-adapter", "kit"}
    flags = [word for kind in sorted(kinds) for word in ("--kind", kind)]
    # Each worker takes a second or more to start.
    options = ["--cases", str(CASES), "--workers", "1", "--out", str(seeds.parent)]
    command = [sys.executable, "-m", "fuzz", *options, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")} == kinds

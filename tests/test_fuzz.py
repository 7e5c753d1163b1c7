"""Mutations of each kind of file: `make fuzz` with a few cases, and the files of tests/corpus."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from edgetune_export.backends.base import Source
from fuzz import corpus
from fuzz.__main__ import SEEDS, main, valid_file
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


# Files of PEFT have a process of their own, as no other kind loads it.
@pytest.mark.parametrize("needs_peft", [False, True])
def test_files_that_once_did_harm_are_opened_or_refused_in_one_line(needs_peft: bool, seeds: Path) -> None:
    kinds = [kind for kind in corpus.kinds() if kind.startswith("peft") == needs_peft]
    found = []
    with closing(Worker(kinds, seeds, is_guarded=True)) as worker:
        for kind in kinds:
            form, valid = KINDS[kind].form, valid_file(kind, seeds)
            for entry in corpus.entries(kind):
                outcome = worker.run(form.applied(valid, entry.edits))
                if outcome.is_finding:
                    found.append(f"{kind}: {entry.cause} | {outcome.kind}: {outcome.cause}")
            worker.next_kind()
    assert found == []


def test_coverage_guides_cases_where_atheris_is_installed(seeds: Path) -> None:
    pytest.importorskip("atheris")
    assert list(harmful_files("kit", seeds, valid_file("kit", seeds), CASES, seed=1)) == []


def test_fuzzing_runs_cases_of_the_kinds_that_are_named(
    seeds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"gguf-adapter", "kit"}
    flags = [word for kind in sorted(kinds) for word in ("--kind", kind)]
    # Each worker takes a second or more to start.
    options = ["--cases", str(CASES), "--workers", "1", "--out", str(seeds.parent)]
    monkeypatch.setattr(sys, "argv", ["fuzz", *options, *flags])
    code, out = main(), capsys.readouterr().out
    assert code == 0, out
    assert {line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")} == kinds

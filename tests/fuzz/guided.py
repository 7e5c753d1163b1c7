"""Cases of atheris, where it is installed: it keeps changed files that reach other code, and changes them again.

One child process opens them; the first one that does harm ends it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .forms.raw import RAW, Edit
from .pool import CASE_S, environment
from .worker import WORK, import_libraries, limit_memory, outcome_of

_PACKAGES = ("edgetune", "edgetune_export", "edgetune_runtime", "tuf", "securesystemslib")
"""Code whose coverage guides the changes."""
_VALID, _FOUND = "valid", "found-"
_MOST_FOUND = 10


def is_installed() -> bool:
    """Whether there is atheris."""
    return find_spec("atheris") is not None


def as_edits(file: bytes) -> list[Edit]:
    """A whole file, as edits of any other one."""
    return [[RAW, "cut", 0, 10**9], [RAW, "insert", 0, file.hex()]]


def harmful_files(kind: str, seeds: Path, valid: bytes, cases: int, seed: int) -> Iterator[bytes]:
    """Files that did harm among so many cases, which begin with the valid file; after each, as many from another seed.

    RuntimeError if the child process fails otherwise.
    """
    for number in range(_MOST_FOUND):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name)
            (folder / "corpus").mkdir()
            (folder / "corpus" / _VALID).write_bytes(valid)
            options = [f"-runs={cases}", f"-seed={seed + number}", f"-max_len={2 * len(valid) + 4096}"]
            options += [f"-timeout={CASE_S:.0f}", "-rss_limit_mb=0", "-report_slow_units=1000"]
            command = [sys.executable, "-m", "fuzz.guided", kind, str(seeds), f"-artifact_prefix={folder}/{_FOUND}"]
            done = subprocess.run(
                [*command, *options, str(folder / "corpus")],
                env=environment(folder, is_guarded=False),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            found = [path.read_bytes() for path in folder.glob(f"{_FOUND}*")]
        if done.returncode and not found:
            raise RuntimeError(f"the guided worker for {kind} fails: {done.stderr.splitlines()[-5:]}")
        yield from found
        if not found:
            return


def main() -> None:
    """Open the files of the kind in the first argument, with seeds in the second one; the rest is for libFuzzer."""
    kind, seeds, *options = sys.argv[1:]
    atheris = import_module("atheris")
    with tempfile.TemporaryDirectory(dir=os.environ[WORK]) as work:
        # Modules are changed when they are imported, some of them by the first file that is opened.
        with atheris.instrument_imports(include=_PACKAGES):
            import_libraries(kind)
            kinds = import_module("fuzz.kinds")
            valid, open_changed = kinds.opener(kind, Path(seeds), Path(work))
            open_changed(valid)
        form = kinds.KINDS[kind].form
        limit_memory()

        def open_one(data: bytes) -> None:
            outcome = outcome_of(open_changed, data, kind)
            if outcome["outcome"] not in {"opened", "refused"}:
                raise AssertionError(str(outcome))

        def change(data: bytes, most: int, seed: int) -> bytes:
            try:
                changed: bytes = form.applied(data, form.edits(data, random.Random(seed)))
            except Exception:  # it is of no form any more
                changed = bytes(atheris.Mutate(data, most))
            return changed[:most]

        atheris.Setup(["fuzz", *options], open_one, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

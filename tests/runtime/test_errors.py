from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, OutOfSpaceError, UsageError
from edgetune_runtime.errors import error_to_report, importing

FULL = Path("/dev/full")


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("another.py", "", "serving needs no_such_library, which is not installed; run: pip install x"),
        (
            "no_such_library.py",
            "import no_such_library.part",
            "cannot be loaded: No module named 'no_such_lib",
        ),
        ("no_such_library.py", "from os import no_name", "cannot be loaded: cannot import name 'no_name' from 'os'"),
        ("no_such_library.py", "raise RuntimeError('no\\nlibrary')", "cannot be loaded: no library; "),
        (
            "no_such_library.abi3.so",
            "no library",
            "abi3.so: file too short; run: pip install --upgrade x",
        ),
    ],
)
def test_a_library_that_is_missing_is_told_from_one_that_cannot_be_loaded(
    file: str, text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(IncompatibleError) as raised, importing("serving needs", "x"):
        import_module("no_such_library")
    assert told in str(raised.value)
    assert ("not installed" in str(raised.value)) == (file == "another.py")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_lack_of_memory_is_no_unexpected_error(error: Exception) -> None:
    told = str(error_to_report(error))
    assert told.startswith("the system gives this process no more memory or threads; free some memory, or raise")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no file that is always full")
def test_what_numpy_cannot_write_for_lack_of_space_is_told_as_such() -> None:
    with FULL.open("wb") as file, pytest.raises(OSError, match="requested") as raised:
        np.zeros(1 << 16).tofile(file)
    assert isinstance(error_to_report(raised.value), OutOfSpaceError)


def test_an_error_that_caused_what_it_is_raised_after_is_reported() -> None:
    first = UsageError("wrong")
    second = ValueError()
    first.__cause__, second.__cause__ = second, first
    assert error_to_report(first) is first

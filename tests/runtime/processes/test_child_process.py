from __future__ import annotations

import os
import sys
import time

import pytest
from edgetune_runtime.processes import child_process
from edgetune_runtime.processes.child_process import ProcessResult
from edgetune_runtime.wording import printable


def run(code: str, **options: object) -> ProcessResult:
    return child_process.run([sys.executable, "-c", code], **{"timeout_s": 20.0, **options})  # type: ignore[arg-type]


def test_a_child_reads_its_input_and_both_streams_are_kept() -> None:
    ended = run("import sys; print(sys.stdin.read()); print('a\\n\\n b\\x1b[2J\\n', file=sys.stderr)", stdin=b"yes")
    assert (ended.code, ended.output, ended.last_line, ended.how) == (0, b"yes\n", "b [2J", "ended with exit code 0")


def test_only_the_end_of_a_long_output_stays() -> None:
    ended = run("import sys; [print('x' * 10**6) for _ in range(9)]; print('end')")
    assert len(ended.output) == 1 << 20
    assert ended.output.endswith(b"x\nend\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_a_signal_is_named() -> None:
    ended = run("import os; os.write(2, b'/tmp/pip/src/x.cpp:7: GGML_ASSERT(a / b) failed'); os.abort()")
    assert (ended.how, ended.last_line) == ("was ended by SIGABRT", "x.cpp:7: GGML_ASSERT(a / b) failed")


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "import os, time; os.close(1); time.sleep(60)"])
def test_a_child_that_takes_too_long_is_killed(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_CLOSING_S", 0.5)
    begin = time.monotonic()
    ended = run(code, timeout_s=1.0)
    assert time.monotonic() - begin < 10
    assert ended.how == "was killed after 1 s"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_what_a_child_leaves_behind_does_not_keep_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_CLOSING_S", 0.5)
    begin = time.monotonic()
    run("import os, time; os.fork() or (os.setsid(), time.sleep(8))", timeout_s=1.0)
    assert time.monotonic() - begin < 7


def test_a_program_that_is_missing_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        child_process.run(["/nowhere/python"], timeout_s=1.0)


def test_control_characters_become_spaces() -> None:
    assert printable("a\x1b]0;b\x07\x9bc\n é") == "a ]0;b  c  é"

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from edgetune_runtime.engines.gguf import llama, tiles


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor with AMX, which the tests' own machine may not have."""
    monkeypatch.setattr(tiles, "_uses_amx", lambda: True)
    yield
    tiles._forget()


def test_without_amx_the_callers_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_uses_amx", lambda: False)
    assert tiles.compute(threading.get_ident) == threading.get_ident()


@pytest.mark.usefixtures("amx")
def test_with_amx_each_thread_has_one_of_its_own_that_computes() -> None:
    found: list[int] = []
    both = threading.Barrier(2)

    def ask() -> None:
        found.append(tiles.compute(threading.get_ident))
        both.wait()

    other = threading.Thread(target=ask)
    other.start()
    mine = {tiles.compute(threading.get_ident) for _ in range(3)}
    both.wait()
    other.join()
    assert len(mine) == 1
    assert not mine & {threading.get_ident(), *found}


@pytest.mark.usefixtures("amx")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_that_slow_down_others_end_before_steps_and_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch on the caller's thread, and those of the partner, which a forked process would count."""
    partner, ended = tiles.compute(threading.get_ident), list[int]()
    end = partial(partial, lambda: ended.append(threading.get_ident()))
    for module in (llama, tiles):
        monkeypatch.setattr(module, "end_threads", end)
    tiles.compute(lambda: 1)
    assert ended == [threading.get_ident()]
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    assert ended[1:] == [partner]


FORK = """
import os, signal, torch
torch.set_num_threads(2)
torch.zeros(300_000).add_(1)
if not (child := os.fork()):
    signal.alarm(20)
    from edgetune_runtime.engines.gguf import tiles
    tiles._uses_amx = lambda: True
    os._exit(tiles.compute(lambda: 7))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another system may not fork")
def test_a_process_forked_from_one_that_used_torch_computes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == "7\n"


@pytest.mark.usefixtures("amx")
def test_an_error_is_raised_where_it_was_called() -> None:
    with pytest.raises(ZeroDivisionError):
        tiles.compute(lambda: 1 / 0)
    assert tiles.compute(lambda: 1) == 1


@pytest.mark.usefixtures("amx")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_computes() -> None:
    tiles.compute(lambda: 1)
    child = os.fork()
    if not child:
        os._exit(tiles.compute(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

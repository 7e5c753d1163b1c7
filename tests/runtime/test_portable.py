"""The runtime imports and answers without the modules of Python that Windows lacks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ANSWERS = """
import sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp")))
from importlib import import_module
from pkgutil import walk_packages
import edgetune_runtime
for module in walk_packages(edgetune_runtime.__path__, "edgetune_runtime."):
    if not module.name.endswith("__main__"):
        import_module(module.name)
from edgetune_runtime.threads.machine import peak_mb
# Linux tells it without the module resource.
assert peak_mb() > 0 if sys.platform == "linux" else peak_mb() is None
for engine in ("gguf", "onnx"):
    with edgetune_runtime.Runtime.open(sys.argv[1], engine=engine, disk_mb=0) as runtime:
        print(runtime.generate("play", adapter="command", max_tokens=2).tokens)
"""


def test_the_runtime_answers_without_modules_of_unix(both_of: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", ANSWERS, str(both_of("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n2\n"), done.stderr

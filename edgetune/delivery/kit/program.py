"""Packs the program that runs on the board, and the script that starts it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import edgetune_runtime
from edgetune_runtime import store

from edgetune import delivery
from edgetune.common.templates import template_of
from edgetune.delivery import board
from edgetune.delivery.wheel.platforms import OLDEST_PYTHON
from edgetune.delivery.wheel.wheel_file import zip_bytes

from .target_python import TargetPython

RUNTIME_MODULES = (
    "bundle/__init__", "bundle/files", "bundle/parts", "bundle/reading", "bundle/records", "errors", "formats/atomic",
    "formats/regular_file", "limits", "processes/child_process", "processes/interrupts", "processes/streams",
    "threads/machine", "type_checks", "update/current", "update/state", "wording",
)  # fmt: skip
"""The modules of the runtime that board and store use; they import nothing but the standard library and each other."""
_MAIN = """\
import sys
from edgetune.delivery.board.main import main

sys.exit(main())
"""
_INSTALL = Path(__file__).with_name("install.sh.jinja")


def board_program() -> bytes:
    """The zipapp board.pyz."""
    contents = {"__main__.py": _MAIN.encode()}
    empty = [f"{'/'.join(delivery.__name__.split('.')[: depth + 1])}/__init__.py" for depth in range(2)]
    runtime = Path(edgetune_runtime.__name__)
    empty += sorted({f"{(runtime / name).parent}/__init__.py" for name in RUNTIME_MODULES})
    contents |= dict.fromkeys(empty, b"")
    for package in (board, store):
        for path in sorted(Path(*package.__path__).glob("*.py")):
            contents[f"{package.__name__.replace('.', '/')}/{path.name}"] = path.read_bytes()
    for name in RUNTIME_MODULES:
        contents[f"{runtime}/{name}.py"] = (files(edgetune_runtime) / f"{name}.py").read_bytes()
    return zip_bytes(contents)


def install_script(target: TargetPython) -> bytes:
    """The script install.sh, which finds a Python for the kit's wheels and runs board.pyz with it."""
    return template_of(_INSTALL, autoescape=False).render(target=target, oldest=OLDEST_PYTHON).encode()

"""`edgetune wheel --platform NAME`: llama-cpp-python for every board of a platform, at full speed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Quiet, output_option


def wheel(
    *,
    platform: Annotated[
        str, typer.Option("--platform", metavar="NAME", help="linux-aarch64, for boards, or linux-x86_64.")
    ],
    out: Annotated[
        Path | None,
        output_option(
            "--out", metavar="DIR", help="Copy the wheel to this folder (default: print its path in the cache folder)."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Build a wheel of llama-cpp-python for boards.

    Compiles the installed version on this machine, for Debian 12 or newer, with a CPU backend for each generation of
    processors; llama.cpp picks the fastest that the board supports. Keeps the wheel in the cache folder.
    """
    from edgetune.common.progress import Progress
    from edgetune.delivery.wheel.build import llama_wheel

    built = llama_wheel(platform, progress=Progress(quiet=quiet))
    if out is not None and out.resolve() != built.parent.resolve():
        out.mkdir(parents=True, exist_ok=True)
        built = Path(shutil.copy(built, out))
    print(built)

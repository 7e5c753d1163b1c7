"""`edgetune kit BUNDLE --board NAME`: an offline install for a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.delivery.wheel.platforms import SYSTEM_PYTHON

from .arguments import (
    BOARD,
    AsJson,
    BundlePath,
    CacheMb,
    ContextLength,
    Engine,
    Kv,
    Quiet,
    output_option,
    print_json,
)


def kit(
    bundle: BundlePath,
    *,
    board: Annotated[str, typer.Option(metavar="NAME", help=BOARD)],
    out: Annotated[Path, output_option(metavar="KIT", help="The kit's folder, or a tar file if it ends in .tar.")],
    python: Annotated[str, typer.Option(metavar="VERSION", help="The board's Python.")] = SYSTEM_PYTHON,
    engine: Engine = None,
    context_length: ContextLength = None,
    kv: Kv = None,
    cache_mb: CacheMb = None,
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A wheel of llama-cpp-python for the board (default: built here)."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pack a bundle, the runtime and an installer for a board that has no network.

    On the board, run `sh install.sh` in the kit's folder. The same bundle and versions give the same bytes. The
    board opens the bundle with --context-length, --kv and --cache-mb, which make one fit that does not otherwise.
    """
    from edgetune_runtime.store.opening import Opening

    from edgetune.common.progress import Progress
    from edgetune.delivery.kit.make import KitOptions, make_kit

    options = KitOptions(python, engine, Opening(context_length, kv, cache_mb), wheel)
    result = make_kit(bundle, board, out, options, Progress(quiet=quiet))
    figures = {"path": str(out), **result.to_json()}
    if as_json:
        print_json(figures)
        return
    runtime_mb, bundle_mb = (figures["bytes"] - figures["bundle_bytes"]) / 1e6, figures["bundle_bytes"] / 1e6
    print(f"version {figures['version']}: {runtime_mb:.1f} MB, and {bundle_mb:.1f} MB of the bundle")
    print(out)

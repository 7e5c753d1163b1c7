"""`edgetune imatrix RECIPE`: an importance matrix of a recipe's rows, for llama.cpp's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .arguments import Quiet, RecipePath, Settings, check_not_read, output_option, settings_of


def imatrix(
    recipe: RecipePath,
    *,
    out: Annotated[Path, output_option(metavar="FILE", help="The .gguf file to write.")] = Path("imatrix.gguf"),
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Write the importance matrix of a recipe's base and training rows.

    `llama-quantize --imatrix` reads the file. A build with `imatrix: auto` in its recipe needs none.
    """
    from edgetune_export.base_file.importance import write_imatrix

    from edgetune.building.decoder.importance import importance_of
    from edgetune.common.progress import Progress
    from edgetune.recipe.model import Recipe

    loaded = Recipe.from_file(recipe, settings_of(settings))
    check_not_read(out, loaded.files())
    write_imatrix(importance_of(loaded, Progress(quiet=quiet)), out, f"training rows of {loaded.name}")
    print(out)

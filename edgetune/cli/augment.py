"""`edgetune augment RECIPE --teacher URL`: new rows, made with a larger model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import printable

from .arguments import Quiet, RecipePath, Settings, check_rows_file, data_option, output_option, settings_of

KEY_VARIABLE = "OPENAI_API_KEY"


def augment(
    recipe: RecipePath,
    *,
    teacher: Annotated[str, typer.Option(metavar="URL", help="Address of OpenAI's chat API, up to /v1.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The teacher's model.")],
    rows: Annotated[int, data_option(min=1, metavar="N", help="Rows to make.")],
    out: Annotated[Path, output_option(metavar="FILE", help="The .jsonl file to write; its rows count.")],
    adapter: Annotated[
        str | None, data_option(metavar="NAME", help="The adapter to make rows for (default: the only one).")
    ] = None,
    per_minute: Annotated[float, typer.Option(metavar="N", min=0.1, help="Most requests per minute.")] = 60,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Most requests of this run (default: 6 per row).")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most tokens per answer, with what the model thinks.")
    ] = 2000,
    yes: Annotated[bool, typer.Option("--yes", help="Send; without it, show what would be sent.")] = False,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Make new rows of a task with a larger model.

    The teacher words new prompts and answers each twice. A row is kept if both answers fit the task and agree. Without
    --yes, shows the first requests and sends nothing. Run it again to go on after an interruption. The key is that of
    the variable OPENAI_API_KEY, if it is set.
    """
    from edgetune.common.progress import Progress
    from edgetune.curation.checking.check import files_read
    from edgetune.curation.teaching.new_rows import Lesson
    from edgetune.curation.teaching.teacher import Teacher
    from edgetune.recipe.model import Recipe
    from edgetune.tasks.task import read_task

    loaded = Recipe.from_file(recipe, settings_of(settings))
    if adapter is None and len(loaded.adapters) > 1:
        raise UsageError("the recipe has several adapters", f"add --adapter {next(iter(loaded.adapters))}")
    name = adapter or next(iter(loaded.adapters))
    loaded.check_adapter(name)
    check_rows_file(out, files_read(loaded, {}))
    most = requests or 6 * rows
    key = os.environ.get(KEY_VARIABLE)
    progress = Progress(quiet=quiet)
    asking = Teacher(teacher, model, key, per_minute, most, max_tokens, progress.say)
    lesson = Lesson(read_task(name, loaded), asking)
    if not yes:
        first = lesson.first_requests(out)
        print(f"first two of at most {most} requests to {teacher}, each with rows of {name}:")
        for request in first:
            print(printable(json.dumps(request, ensure_ascii=False)))
        print("nothing was sent; add --yes to send", file=sys.stderr)
        return
    left_out = lesson.learn(out, rows, progress)
    for reason, count in left_out.most_common():
        print(f"left out {count} {reason}", file=sys.stderr)
    print(out)

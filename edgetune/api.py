"""The Python API: the commands of `edgetune` as functions, whose modules are imported when they are called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export import backends
from edgetune_runtime.errors import CancelledError, UsageError
from edgetune_runtime.wording import suggestion

from .common.cluster import load_ray
from .common.process_state import own_process_state
from .common.progress import OnProgress, Progress
from .recipe.model import Recipe
from .recipe.parts import NAME_PATTERN
from .recipe.rows import Rows
from .recipe.saved import save_recipe, save_source

if TYPE_CHECKING:
    from .building.result import Build
    from .comparison.comparison import Comparison
    from .comparison.sweep import Run
    from .planning.records import BuildPlan
    from .retraining.learning.learn import Learned
    from .retraining.rebasing.rebase import Rebased
    from .tasks.evaluation import Evaluation

AnyRecipe = Recipe | Mapping[str, Any] | str | os.PathLike[str]
"""A recipe, its keys and values, or the path of a recipe file."""
ENGINES = ("local", "ray")
"""Where the trainings of a build and the trials of a comparison can run."""
AnyRows = Any
"""A file, a hub id, or rows: a list or iterator of mappings, a pandas DataFrame or a datasets.Dataset."""
# Of transformers and PEFT, about what edgetune does on purpose or cannot change; pyproject.toml gives the reasons.
_UNHELPFUL_WARNINGS = {
    "`is_gradient_checkpointing` is deprecated": FutureWarning,
    "Could not find a config file in": UserWarning,
    "OLoRA changes the base weights": UserWarning,
}


def plan(recipe: AnyRecipe, out: str | Path | None = None, *, into: str | Path | None = None) -> BuildPlan:
    """Plan a build: its base, adapters and sizes, the memory, disk and time that it needs, and what the board will do.

    Reads the header of the base and all rows, downloads and trains nothing. `out` is where the bundle would be built,
    by default `build/NAME`; `into`, in its place, is a bundle that the adapters would be added to, as by `build`.
    Raises one EdgetuneError for all problems of the recipe, its base and its rows, one for an `out` that is something
    else than a bundle, and what `build` raises for a bundle that cannot take the adapters.
    """
    from .building.into import plan_for  # noqa: PLC0415 - numpy and the formats

    return plan_for(_recipe(recipe), None if out is None else Path(out), None if into is None else Path(into)).plan


def build(
    recipe: AnyRecipe,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
    resume: bool = True,
    *,
    into: str | Path | None = None,
    engine: str = "local",
    converter: str | Path | None = None,
) -> Build:
    """Train the adapters of a recipe, export them with their base, compare with the trained model, and pack a bundle.

    `out` is the bundle's folder, by default `build/NAME`; intermediate files are in `<out>.work`. A build that was
    interrupted, or whose process died, resumes from there; with `resume=False` it starts again. `converter` is a
    llama.cpp checkout to convert the base with, by default one that pip downloads.

    `into` takes the place of `out`: a bundle on the same base, to which the adapters of the recipe are added. Adapters
    of the same names are replaced; the files of all others, and of the base, stay as they are. With `route` in the
    recipe, the bundle's router is trained again, on the rows of all adapters of the recipe.

    `engine` is where adapters are trained: local, or ray for a Ray cluster, whose nodes share the folders of the
    recipe, its data and the bundle.

    Raises KeyboardInterrupt for Ctrl-C, after the training was saved; EdgetuneError if the recipe, its base or its rows
    cannot be built, if another build uses `<out>.work`, and if an exported file does not match the trained model. `out`
    is then unchanged.
    """
    check_engine(engine)
    from .building.into import check_one_bundle  # noqa: PLC0415 - numpy and the formats

    check_one_bundle(out, into)
    loaded = _recipe(recipe)
    from .building import pipeline  # noqa: PLC0415 - torch

    folder, progress = Path(into or out or loaded.default_out), Progress(on_progress)
    with _interruptible(progress):
        return pipeline.build(
            loaded,
            folder,
            progress=progress,
            converter=_script_of(converter),
            resume=resume,
            into=into is not None,
            on_cluster=engine == "ray",
        )


def export(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    quantization: str | None = None,
    systems: Mapping[str, str] | None = None,
    merged: bool = False,
    targets: Sequence[str] = (backends.DEFAULT,),
    converter: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Build:
    """Pack a bundle from adapters trained elsewhere: folders saved by PEFT, by name, that were trained on `base`.

    `systems` has system prompts by the adapters' names. `quantization` is that of the base, by default a .gguf file
    unchanged and otherwise q8_0; with `merged`, each adapter is merged into a full model.

    Raises EdgetuneError if an adapter does not belong to the base or its exported file does not match it.
    """
    if not adapters:
        raise UsageError("adapters is empty", "give at least one folder saved by PEFT, by its adapter's name")
    targets = _names(targets)
    if not targets:
        raise UsageError("targets is empty", f"give at least one format, of: {', '.join(backends.names())}")
    for name in adapters:
        if not NAME_PATTERN.fullmatch(name):
            message = f"adapters: the name {name!r} may contain only a-z, 0-9, _ and -, up to 100"
            raise UsageError(message, "choose another name for the folder")
    unknown = next((name for name in systems or () if name not in adapters), None)
    if unknown is not None:
        raise UsageError(f"systems: no adapter {unknown!r}", suggestion(unknown, list(adapters)))
    for target in targets:
        if (error := backends.unknown(target)) is not None:
            raise error
    from .building import pipeline  # noqa: PLC0415 - torch

    progress = Progress(on_progress)
    with _interruptible(progress):
        return pipeline.export_trained(
            str(base),
            {name: Path(folder) for name, folder in adapters.items()},
            Path(out),
            quantization=quantization,
            systems=systems,
            merged=merged,
            targets=tuple(targets),
            progress=progress,
            converter=_script_of(converter),
        )


def evaluate(
    bundle: str | Path,
    data: AnyRows,
    adapter: str | None = None,
    *,
    limit: int | None = None,
    engine: str | None = None,
    kv: str | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score an adapter of a bundle (None: the base without one) on rows, which the runtime answers as on the board.

    Each turn of the assistant in a conversation is a row, with the turns before it.

    `data` is a file, a hub id or rows, in a form of the training data. At most `limit` rows are scored, spread evenly.
    `engine` and `kv` are those of `edgetune_runtime.Runtime.open`.

    Raises EdgetuneError if the bundle has no such adapter, and for rows that its metric cannot score.
    """
    from .tasks import evaluation  # noqa: PLC0415 - numpy and the engines

    rows = _source("data", data)
    return evaluation.evaluate(
        Path(bundle), adapter, rows, limit=limit, engine=engine, kv=kv, progress=Progress(on_progress)
    )


def learn(
    bundle: str | Path,
    log: str | Path,
    *,
    recipe: AnyRecipe | None = None,
    into: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Learned:
    """Train the adapters of a bundle again with the corrections in a log of its answers, and with the old rows.

    `log` is the file of `edgetune-run serve --log-answers`, or of an `edgetune_runtime.AnswerLog`. `recipe` has the old
    rows, by default the recipe beside the bundle. Old and new adapters answer the old validation rows and a quarter of
    the corrections, which are not learned. If none got worse by more than one standard error, the new bundle takes the
    place of the old one, or is `into`.

    Raises EdgetuneError for the log of another bundle, too few corrections or some that are not answers of the task,
    and what `build` raises.
    """
    from .retraining.learning import learn as learning  # noqa: PLC0415 - torch

    folder, progress = Path(bundle), Progress(on_progress)
    entries = learning.read_logs(folder, [Path(log)], progress.say)
    with _interruptible(progress):
        return learning.learn(folder, entries, _file_or_recipe(recipe), None if into is None else Path(into), progress)


def rebase(
    bundle: str | Path,
    base: str | Path | None = None,
    out: str | Path | None = None,
    *,
    quantization: str | None = None,
    recipe: AnyRecipe | None = None,
    folder: str | Path = "",
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, AnyRows] | None = None,
    margin: float = 1.0,
    without_worse: bool = False,
    converter: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Rebased:
    """Train all adapters of a bundle again on another base, or on another quantization of the same one.

    `recipe` has the rows, by default the recipe beside the bundle, or the one in it, whose paths start in `folder`;
    `settings` are dotted keys of it. A .gguf file ships unchanged unless there is a `quantization`; for other bases it
    is by default the recipe's. Both bundles answer the validation rows, and test rows in `data`, by adapter. If none
    got worse by more than `margin` standard errors, the new bundle is packed as `out`, by default `BUNDLE-rebased`;
    with `without_worse`, without those that did.

    Raises EdgetuneError, before any training, for a bundle without a recipe, rows that are gone, and a base that cannot
    hold the adapters or is that of the bundle; and what `build` raises.
    """
    from .common.work_folder import rebased_folder  # noqa: PLC0415 - filelock
    from .retraining.rebasing import rebase as rebasing  # noqa: PLC0415 - torch
    from .retraining.rebasing.recipe import RecipeSource  # noqa: PLC0415 - as above

    path = Path(bundle)
    source = RecipeSource(
        None if base is None else str(base),
        quantization,
        _file_or_recipe(recipe),
        Path(folder),
        settings,
    )
    progress = Progress(on_progress)
    with _interruptible(progress):
        return rebasing.rebase(
            path,
            rebased_folder(path) if out is None else Path(out),
            source,
            {name: _source(f"data.{name}", rows) for name, rows in (data or {}).items()},
            progress=progress,
            margin=margin,
            without_worse=without_worse,
            converter=_script_of(converter),
        )


def compare(
    recipe: AnyRecipe,
    task: str,
    methods: Sequence[str],
    out: str | Path,
    *,
    ranks: Sequence[int] = (),
    targets: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    data: AnyRows = None,
    limit: int = 100,
    rows: Sequence[int] = (),
    engine: str = "local",
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Train, export and measure each method, at each rank, on one task of a recipe, and recommend one.

    With `rows`, each is trained on each of these numbers of rows, and the result says what more rows would give.

    `out` gets the trials, which resume after an interruption, tables and plots. Keys of `settings` are dotted keys of
    the recipe; those that begin with a method's name apply only to that method. At most `limit` rows of `data`, by
    default the task's validation rows, are scored. `engine` is where trials run: local, or ray for a Ray cluster.

    Raises KeyboardInterrupt for Ctrl-C, with finished trials kept; EdgetuneError for a wrong request, and if no trial
    succeeded.
    """
    from .comparison.grid import Request  # noqa: PLC0415 - numpy and torch
    from .comparison.sweep import check_folder  # noqa: PLC0415
    from .comparison.sweep import compare as run  # noqa: PLC0415

    runner, folder = _runner(engine), Path(out)
    check_folder(folder)
    # Each trial is a process, which reads files.
    saved = folder / "recipe"
    request = Request(
        recipe=Path(recipe) if isinstance(recipe, str | os.PathLike) else save_recipe(_recipe(recipe), saved),
        task=task,
        methods=_names(methods),
        out=folder,
        ranks=ranks,
        targets=None if targets is None else _names(targets),
        settings=settings or {},
        data=None if data is None else save_source(_source("data", data), saved),
        limit=limit,
        rows=rows,
    )
    progress = Progress(on_progress)
    with _interruptible(progress):
        return run(request, runner, progress)


def _recipe(recipe: AnyRecipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_file(Path(recipe)) if isinstance(recipe, str | os.PathLike) else Recipe.from_dict(recipe)


def _file_or_recipe(recipe: AnyRecipe | None) -> Path | Recipe | None:
    """For work that reads the file more than once, or writes about it."""
    return Path(recipe) if isinstance(recipe, str | os.PathLike) else None if recipe is None else _recipe(recipe)


def _source(name: str, data: AnyRows) -> str | Rows:
    return os.fspath(data) if isinstance(data, str | os.PathLike) else Rows.of(name, data)


def _names(names: Sequence[str]) -> Sequence[str]:
    """Several names, or one, which Python takes for a sequence of letters."""
    return (names,) if isinstance(names, str) else names


def _script_of(converter: str | Path | None) -> Path | None:
    """The script of the given converter; NotFoundError if it has none, also where the base needs no conversion."""
    from edgetune_export.base_file.convert import find_converter  # noqa: PLC0415 - numpy

    return None if converter is None else find_converter(Path(converter))


def check_engine(engine: str) -> None:
    """UsageError for a place where nothing can run, IncompatibleError if what it needs is missing."""
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", f"choose one of: {', '.join(ENGINES)}")
    if engine == "ray":
        load_ray()


def _runner(engine: str) -> Run:
    check_engine(engine)
    from .comparison import engines  # noqa: PLC0415 - numpy

    return engines.run_on_ray if engine == "ray" else engines.run_here


@contextmanager
def _interruptible(progress: Progress) -> Iterator[None]:
    """Raise KeyboardInterrupt, with the same message, for work that the user stopped and that was saved.

    The block has the process to itself, as in `own_process_state`. Warnings of libraries that no user can act on are
    ignored.
    """
    try:
        with own_process_state(progress.say), warnings.catch_warnings():
            for message, category in _UNHELPFUL_WARNINGS.items():
                warnings.filterwarnings("ignore", message, category)
            yield
    except CancelledError as error:
        raise KeyboardInterrupt(str(error)) from error

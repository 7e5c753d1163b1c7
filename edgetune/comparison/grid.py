"""Makes the trials of a comparison from a recipe, a task, methods and ranks; reports all errors before any training.

A trial is the recipe reduced to one task, with one method at one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from edgetune_export.adapters.fold import find_weights
from edgetune_runtime.bundle import MARK, sha256_of
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.wording import suggestion
from pydantic.fields import FieldInfo

from edgetune import methods
from edgetune.common.digests import key_of
from edgetune.common.spread import check_limit
from edgetune.methods.lora import alpha_at
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import MethodSpec
from edgetune.recipe.problems import check_set_once, other_names
from edgetune.recipe.targets import shapes_in

from .figures import TrialResult

RANK = "r"
"""The option for a method's rank."""
MEAN_RANK = "target_r"
"""The option for the mean rank of a method that ends with a different rank per module."""
ALPHAS = {"lora_alpha", "alpha"}
"""The options that scale an update relative to its rank."""

Fields = Mapping[str, FieldInfo]


@dataclass(frozen=True)
class Request:
    """What to compare, from the command line.

    `settings` are dotted keys of the recipe; keys that begin with a method's name apply only to that method.
    """

    recipe: Path
    task: str
    methods: Sequence[str]
    out: Path
    ranks: Sequence[int] = ()
    targets: Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    limit: int = 100
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Trial:
    """A method at one rank, on a number of training rows (None: all), to train, export and measure, as JSON values.

    Each trial runs in a separate process. `overrides` are changes to the recipe; `targets` are the formats that support
    the method, `refused` maps the others to the reason. At most `limit` rows are scored. `fingerprint` is that of the
    base, and `key` identifies everything that the outcome depends on.
    """

    name: str
    method: str
    rank: int | None
    recipe: str
    task: str
    overrides: Mapping[str, Any]
    targets: Sequence[str]
    folder: str
    data: str | None
    limit: int
    rows: int | None
    fingerprint: str
    refused: Mapping[str, str] = field(default_factory=dict)
    key: str = ""

    @cached_property
    def one_task(self) -> Recipe:
        """The recipe of this trial."""
        return _one_task(Recipe.from_file(self.recipe, self.overrides), self.task)

    @property
    def is_refused(self) -> bool:
        """Whether no format supports the method."""
        return not self.targets

    def check_unchanged(self) -> None:
        """UsageError if the recipe, or a file that it names, is not what the comparison began with."""
        if _key(self) != self.key:
            message = f"recipe {self.recipe} or its data has changed since the comparison began"
            raise UsageError(message, "run it again")

    def without_figures(self, status: Literal["failed", "refused"], reason: str) -> TrialResult:
        """The outcome of the trial if it is not done."""
        return TrialResult(self.name, self.method, self.rank, status, reason, refused=self.refused)


def recipe_of(request: Request) -> Recipe:
    """The recipe reduced to the requested task and formats; UsageError for unknown names and invalid ranks."""
    _check_lists(request)
    common, _ = _split(request)
    recipe = Recipe.from_file(request.recipe, common)
    if request.task not in recipe.adapters:
        raise UsageError(f"no task {request.task!r}", suggestion(request.task, list(recipe.adapters)))
    recipe.task_type.check_offers("compare", f"recipe {request.recipe}")
    if recipe.domain is not None:
        message = f"recipe {request.recipe} has a domain, and each trial would repeat its continued pretraining"
        remedy = "build it, then compare on that bundle's base, with domain: null and base: BUNDLE/base/FILE.gguf"
        raise UsageError(message, remedy)
    if request.rows:
        # The trials set it.
        recipe = Recipe.from_file(request.recipe, {**common, f"adapters.{request.task}.data.rows": None})
    return _one_task(recipe, request.task)


def trials_of(request: Request, recipe: Recipe, fingerprint: str) -> list[Trial]:
    """The trials of the request; `recipe` is from `recipe_of`, and its base has this fingerprint.

    A method without a rank gets one trial. Raises UsageError for invalid options.
    """
    trials: list[Trial] = []
    for name in dict.fromkeys(request.methods):
        key = _rank_key(methods.load(name).options.model_fields)
        for rank in dict.fromkeys(request.ranks) if key and request.ranks else (None,):
            for rows in dict.fromkeys(request.rows) or (None,):
                trials.append(_trial(request, recipe, name, rank, fingerprint, rows=rows))
    return trials


def _check_lists(request: Request) -> None:
    for name in request.methods:
        error = methods.unknown(name)
        if error is not None:
            raise error
    for rank in request.ranks:
        if rank < 1:
            raise UsageError(f"{rank} is not a rank", "use whole numbers of at least 1")
    for rows in request.rows:
        if rows < 1:
            raise UsageError(f"{rows} is not a number of training rows", "use whole numbers of at least 1")
    check_limit(request.limit)
    check_set_once(request.settings, _keys_of_flags(request))


def _keys_of_flags(request: Request) -> dict[str, list[str]]:
    """The settings that each of the other options given sets for all trials."""
    prefix = f"adapters.{request.task}"
    ranks = [f"{prefix}.method.{name}" for name in (RANK, "rank", MEAN_RANK)]
    for method in request.methods:
        options = methods.load(method).options
        key = _rank_key(options.model_fields)
        ranks += [] if key is None else [f"{method}.{name}" for name in (key, *other_names(key, options))]
    keys = {"ranks": ranks if request.ranks else [], "rows": [f"{prefix}.data.rows"] if request.rows else []}
    return {**keys, "targets": [] if request.targets is None else ["targets"]}


def _trial(
    request: Request, recipe: Recipe, method: str, rank: int | None, fingerprint: str, *, rows: int | None
) -> Trial:
    common, by_method = _split(request)
    settings = by_method.get(method, {})
    training = {key: value for key, value in settings.items() if key.startswith("training.")}
    options = {key: value for key, value in settings.items() if key not in training}
    prefix = f"adapters.{request.task}"
    overrides = {
        **common,
        **({} if rows is None else {f"{prefix}.data.rows": rows}),
        f"{prefix}.merged": False,
        f"{prefix}.method": _options(recipe.adapters[request.task].method, method, rank),
        **{f"{prefix}.{key}": value for key, value in training.items()},
        **{f"{prefix}.method.{key}": value for key, value in options.items()},
    }
    loaded = _one_task(Recipe.from_file(request.recipe, overrides), request.task)
    spec = loaded.adapters[request.task].method
    key = _rank_key(type(spec.options).model_fields)
    used_rank = None if key is None else getattr(spec.options, key)
    name = method if used_rank is None else f"{method}-r{used_rank}"
    name = name if rows is None else f"{name}-{rows}rows"
    refused = _refusals(spec, loaded.targets)
    supported = [target for target in loaded.targets if target not in refused]
    if supported:
        overrides["targets"] = supported
    trial = Trial(
        name=name,
        method=method,
        rank=used_rank,
        recipe=str(request.recipe.resolve()),
        task=request.task,
        overrides=overrides,
        targets=supported,
        folder=str(request.out.resolve() / "trials" / name),
        data=request.data,
        limit=request.limit,
        rows=rows,
        fingerprint=fingerprint,
        refused=refused,
    )
    return replace(trial, key=_key(trial))


def _split(request: Request) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings of all trials, and those of each method."""
    common: dict[str, Any] = {} if request.targets is None else {"targets": list(request.targets)}
    by_method: dict[str, dict[str, Any]] = {}
    for key, value in request.settings.items():
        method, dot, rest = key.partition(".")
        if dot and method in methods.names():
            by_method.setdefault(method, {})[rest] = value
        else:
            common[key] = value
    unused = next((method for method in by_method if method not in request.methods), None)
    if unused is not None:
        raise UsageError(f"{unused} has settings, but is not among the methods", "add it, or remove these")
    return common, by_method


def _options(spec: MethodSpec, method: str, rank: int | None) -> dict[str, Any]:
    """The method's options at the rank, as a recipe has them.

    Options that `spec`, the recipe's own, sets apply to its method, and to methods with the same rank and alpha options
    and defaults, so that trials differ only in the method. Alpha is scaled with the rank, so that updates keep their
    scale.
    """
    fields, spec_fields = methods.load(method).options.model_fields, type(spec.options).model_fields
    options: dict[str, Any] = {"name": method}
    if method == spec.name or _scales_alike(fields, spec_fields):
        set_options = spec.options.model_dump(mode="json", include=spec.options.model_fields_set)
        options |= {key: value for key, value in set_options.items() if key in fields}
    key = _rank_key(fields)
    if rank is not None and key is not None:
        share = rank / _value(options, fields, key)
        use_rslora = "use_rslora" in fields and _value(options, fields, "use_rslora")
        # A mean rank applies at the end of training and does not change what alpha is divided by.
        for alpha in fields.keys() & ALPHAS if key == RANK else ():
            options[alpha] = alpha_at(_value(options, fields, alpha), share, use_rslora=use_rslora)
        options[key] = rank
        if key == MEAN_RANK:
            # The recipe's own belongs to its mean rank.
            options.pop("init_r", None)
    return options


def _scales_alike(one: Fields, other: Fields) -> bool:
    shared = {RANK, *ALPHAS} & one.keys()
    return len(shared) > 1 and all(key in other and one[key].default == other[key].default for key in shared)


def _rank_key(fields: Fields) -> str | None:
    return next((key for key in (RANK, MEAN_RANK) if key in fields), None)


def _value(options: Mapping[str, Any], fields: Fields, key: str) -> Any:  # noqa: ANN401 - a JSON value
    return options.get(key, fields[key].default)


def _refusals(spec: MethodSpec, targets: Sequence[str]) -> dict[str, str]:
    refused = {}
    for target in targets:
        try:
            shapes_in((target,), spec.name, spec.options)
        except IncompatibleError as error:
            refused[target] = error.message
    return refused


def _one_task(recipe: Recipe, task: str) -> Recipe:
    # Nobody asks a trial how sure it is.
    unrated = {"confidence": False, "confidence_folds": None, "min_confidence": None, "unsure": MARK, "ask": None}
    adapter = recipe.adapters[task].model_copy(update=unrated)
    return recipe.only([task]).model_copy(update={"adapters": {task: adapter}, "route": None})


def _key(trial: Trial) -> str:
    """A digest of the version, the base, the resolved recipe and the files that are read.

    NotFoundError and IncompatibleError for a folder to start from without weights.
    """
    recipe = trial.one_task
    spec = recipe.adapters[trial.task]
    others = [other.data for other in recipe.others(trial.task).values()] if spec.learns_from_others else []
    sources = [source for _, source in recipe.sources()] + [data.train for data in others]
    names = [str(source) for source in (*sources, trial.data) if source is not None]
    names += [] if spec.start_from is None else [str(find_weights(Path(spec.start_from)))]
    files = {name: sha256_of(Path(name)) if Path(name).is_file() else name for name in names}
    columns = [data.model_dump(mode="json", include={"columns"}) for data in others]
    state = [version("edgetune"), trial.fingerprint, recipe.resolved(), trial.limit, files, columns]
    return key_of(state)

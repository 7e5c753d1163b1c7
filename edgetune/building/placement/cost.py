"""Decode overhead of adapter placements, measured on this machine or predicted for a board.

A placement is the modules that an adapter changes, and its rank. Measurements are kept on disk, so that a resumed build
and every process of a build use the same figures.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from edgetune_devices import boards, fit
from edgetune_export import backends
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.architectures.base import LINEAR_MODULES
from edgetune_export.architectures.shape import SizedModule
from edgetune_export.backends.base import Source
from edgetune_runtime import engines
from edgetune_runtime.engines.base import Engine
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune import bases
from edgetune.bases import Base
from edgetune.common.digests import key_of
from edgetune.common.files import write_file
from edgetune.common.progress import Progress
from edgetune.methods.common.peft import ALL_LINEAR, is_target
from edgetune.methods.lora import LoraOptions
from edgetune.planning.adapters import with_options
from edgetune.planning.on_device import bundle_needs
from edgetune.planning.records import AdapterPlan
from edgetune.recipe.model import Recipe

ATTENTION, MLP = (
    tuple(module.name.removeprefix(block) for module in LINEAR_MODULES if module.name.startswith(block))
    for block in ("self_attn.", "mlp.")
)
MODULES: tuple[str | tuple[str, ...], ...] = (
    ("o_proj",),
    ("down_proj",),
    ("v_proj",),
    ("q_proj", "v_proj"),
    ATTENTION,
    MLP,
    ALL_LINEAR,
)
"""The sets of modules to choose from, as values of `target_modules`."""

# The context before the timed tokens, and the number of timed tokens; one more token warms up.
_BEFORE = tuple(range(1, 33))
_TIMED = 4
# A placement is measured in alternating rounds of base and adapter: for this long, within these numbers of rounds.
_SECONDS = 2.0
_ROUNDS = (3, 30)
# An interquartile range of the rounds above this means that other processes disturbed the measurement.
_MAX_SPREAD = 0.1


@dataclass(frozen=True)
class Placement:
    """Modules to adapt, as a value of `target_modules`, and the rank."""

    target_modules: str | tuple[str, ...]
    r: int

    @property
    def title(self) -> str:
        """The modules as text."""
        titles = {ATTENTION: "attention", MLP: "MLP"}
        names = self.target_modules
        return names if isinstance(names, str) else titles.get(names, ", ".join(names))

    @property
    def key(self) -> str:
        """The placement as a file name."""
        return f"{self.title.replace(', ', '+').lower()}-r{self.r}"


def placements(r: int) -> list[Placement]:
    """All placements to consider, each at a quarter, half and all of `r`."""
    ranks = sorted({max(1, r // 4), max(1, r // 2), r})
    return [Placement(modules, rank) for modules in MODULES for rank in ranks]


@dataclass(frozen=True)
class Costs:
    """The share of the base's decode speed lost with an adapter of each placement, at least 0, and where it is from.

    `busy` is the reason why measured costs are unreliable, None if the machine was quiet.
    """

    by_placement: Mapping[Placement, float]
    source: str
    busy: str | None = None


def costs(
    candidates: Sequence[Placement], plan: AdapterPlan, base: Base, recipe: Recipe, *, folder: Path, progress: Progress
) -> Costs:
    """The costs of the placements.

    For a recipe with a board they are predicted as in `edgetune devices fit`. Otherwise the engine of the recipe's
    first target runs random adapters and the plain base in turn; the figures are kept in `folder`.
    """
    if recipe.device is not None:
        predicted = {placement: _predicted(placement, plan, base.header, recipe) for placement in candidates}
        return Costs(predicted, f"predicted for {recipe.device}")
    bench = _Bench(base, recipe, plan, folder)
    missing = [placement for placement in candidates if placement.key not in bench.costs]
    if missing:
        progress.say(f"measuring the decode overhead of adapters with {bench.target}")
        with progress.step("placements", len(missing)) as step, bench.plain() as plain:
            for modules, group in groupby(missing, lambda placement: placement.target_modules):
                bench.measure(plain, modules, list(group))
                step.update("", step.done + sum(placement.target_modules == modules for placement in missing))
    busy = f"costs varied by {bench.spread:.0%}" if bench.spread > _MAX_SPREAD else None
    measured = {placement: bench.costs[placement.key] for placement in candidates}
    return Costs(measured, f"measured here with {bench.target}", busy)


def _predicted(placement: Placement, plan: AdapterPlan, header: GgufHeader, recipe: Recipe) -> float:
    assert recipe.device is not None and isinstance(plan.options, LoraOptions) and plan.trained is not None
    options = plan.options.placed(placement.target_modules, placement.r)
    placed = with_options(plan, options, plan.trained.base)
    speed = fit.fit(bundle_needs(recipe, {plan.name: placed}, header, None), boards.load(recipe.device)).speed
    return 1 - speed.adapter_tokens_per_s / speed.decode_tokens_per_s


class _Bench:
    """Measures with the engine of a recipe's first target, with temporary files in a folder.

    `costs` are those measured so far, including earlier runs, by placement key; `spread` is the largest interquartile
    range of a placement's rounds.
    """

    def __init__(self, base: Base, recipe: Recipe, plan: AdapterPlan, folder: Path) -> None:
        self.base, self.target, self.threads = base, recipe.targets[0], recipe.threads
        self.dtype = plan.dtypes[self.target]
        self._format_options = recipe.format_options
        assert plan.trained is not None
        self._modules = plan.trained.base.modules
        self._backend = backends.load(self.target)
        self._engine = engines.load(self.target)
        stored = recipe.model_dump(mode="json", include={*recipe.format_options})
        state = [base.fingerprint, self.target, self.threads, self.dtype, stored]
        self._file, self._folder = folder / f"costs-{key_of(state)[:12]}.json", folder / "bench"
        self.costs, self.spread = _read(self._file)

    @contextmanager
    def plain(self) -> Iterator[Engine]:
        """The engine on a base written without adapters; deletes all temporary files at the end."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        try:
            with closing(self._open(self._backend.write_base(self._source, self._folder / "plain", []))) as engine:
                yield engine
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def measure(self, plain: Engine, target_modules: str | tuple[str, ...], group: Sequence[Placement]) -> None:
        """Measure placements on the same modules, on a base written for these modules, and keep the figures."""
        modules = [module for module in self._modules if is_target(module.name, target_modules)]
        adapters = {placement.key: _random(modules, placement) for placement in group}
        folder = self._folder / "adapted"
        path = self._backend.write_base(self._source, folder, list(adapters.values()))
        with closing(self._open(path)) as engine:
            for key, adapter in adapters.items():
                out = folder / f"{key}.adapter"
                self._backend.write_adapter(
                    adapter, path, out, dtype=self.dtype, base_fingerprint=self.base.fingerprint
                )
                engine.load_adapter(key, out)
                engine.activate({key: 1.0})
                lost = _rounds(plain, engine)
                self.costs[key] = max(0.0, statistics.median(lost))
                lower, _, upper = statistics.quantiles(lost, n=4)
                self.spread = max(self.spread, upper - lower)
        shutil.rmtree(folder)
        write_file(self._file, json.dumps({"costs": self.costs, "spread": self.spread}))

    @cached_property
    def _source(self) -> Source:
        model = None if backends.format_of(self.target).links_base else bases.load_torch(self.base, torch.float32)
        return Source(self.base.path, self.base.fingerprint, model, self._folder / "work", self._format_options)

    def _open(self, path: Path) -> Engine:
        length = len(_BEFORE) + _TIMED + 1
        return self._engine(path, context_length=length, threads=self.threads)


def _read(file: Path) -> tuple[dict[str, float], float]:
    """The costs by placement key and the spread in a file; none if it is missing or truncated."""
    try:
        stored = json.loads(file.read_bytes())
        return {str(key): float(value) for key, value in stored["costs"].items()}, float(stored["spread"])
    except (FileNotFoundError, ValueError, LookupError, AttributeError, TypeError):
        return {}, 0.0


def _random(modules: Sequence[SizedModule], placement: Placement) -> LowRank:
    """A random adapter of the placement's size; its values do not affect speed."""
    random = np.random.default_rng(0)
    deltas = {}
    for module in modules:
        a = random.normal(0, 0.01, (placement.r, module.columns)).astype(np.float32)
        b = random.normal(0, 0.01, (module.rows, placement.r)).astype(np.float32)
        deltas[module.name] = Delta(a, b)
    return LowRank(placement.key, "lora", deltas)


def _rounds(plain: Engine, adapted: Engine) -> list[float]:
    """The share of the plain engine's speed that the adapted one loses, per round of both."""
    min_rounds, max_rounds = _ROUNDS
    begin = time.monotonic()
    lost: list[float] = []
    while len(lost) < min_rounds or (len(lost) < max_rounds and time.monotonic() - begin < _SECONDS):
        # Other processes slow down both engines of a round.
        lost.append(1 - _token_s(plain) / _token_s(adapted))
    return lost


def _token_s(engine: Engine) -> float:
    """Median seconds per decoded token, always at the same position in the context."""
    kept = engine.truncate(len(_BEFORE))
    if kept < len(_BEFORE):
        engine.decode(_BEFORE[kept:])
    seconds = []
    for _ in range(1 + _TIMED):
        begin = time.perf_counter()
        engine.decode(_BEFORE[:1])
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])

"""The facts about a bundle that its report and its model card show, from its manifest and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_devices import boards
from edgetune_devices.fit import Fit, fit
from edgetune_runtime.bundle import AdapterEntry, ConfidenceCurve, Manifest, bytes_of_model
from edgetune_runtime.engines import gguf
from edgetune_runtime.errors import UsageError
from edgetune_runtime.sizing.needs import needs_of_bundle

from edgetune.recipe import task_types
from edgetune.tasks.metrics import EITHER_RIGHT_OR_WRONG

MB = 10**6


@dataclass(frozen=True)
class Answer:
    """A row's prompt, the answer, and the expected answer, "" if there is none."""

    prompt: str
    text: str
    expected: str = ""


@dataclass(frozen=True)
class Score:
    """A score of an adapter on rows of `source`, as `edgetune evaluate` computes it.

    `points` are the scores of the rows, `best` and `worst` some of the answers; empty where only the score is known.
    """

    metric: str
    value: float
    rows: int
    source: str = ""
    points: Sequence[float] = ()
    best: Sequence[Answer] = ()
    worst: Sequence[Answer] = ()

    @property
    def right(self) -> int:
        """How many answers are the expected ones."""
        return sum(point >= 1 for point in self.points)

    @property
    def is_graded(self) -> bool:
        """Whether answers are more or less right, not right or wrong."""
        return self.metric in ("rouge_l", "chrf")


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter: its manifest entry, the ranks of its modules as text, its files' size in each format, its score.

    `points` are the validation passes: step, training loss, validation loss.
    """

    entry: AdapterEntry
    rank: str
    mb: Mapping[str, float]
    train_file: str
    points: Sequence[tuple[int, float, float]]
    score: Score | None

    @property
    def lacks_confidence(self) -> bool:
        """Whether its answers are right or wrong, and no curve says how likely."""
        return self.entry.metric in EITHER_RIGHT_OR_WRONG and not self.entry.confidence

    @property
    def sure(self) -> Mapping[str, ConfidenceCurve]:
        """The curves of its confidence by format and kind of answer, of those that have enough answers."""
        return {
            f"{format_}, {kind}": curve
            for format_, kinds in self.entry.confidence.items()
            for kind, curve in kinds.items()
            if curve.slope is not None
        }

    @property
    def golden(self) -> Answer | None:
        """The answer that the build stored, cut to some tokens."""
        stored = next(iter(self.entry.golden.values()), None)
        if stored is None:
            return None
        prompt = stored.prompt if isinstance(stored.prompt, str) else str(stored.prompt[-1]["content"])
        return Answer(prompt, stored.answer)

    @property
    def output(self) -> str:
        """The kind of its output constraint, or ''."""
        return next((kind for kind in self.entry.output or {} if kind != "spacing"), "")


@dataclass(frozen=True)
class Facts:
    """A bundle's manifest, the size of its base in each format and of all files, and its adapters."""

    manifest: Manifest
    base_mb: Mapping[str, float]
    total_mb: float
    adapters: Sequence[AdapterFacts]

    @property
    def parity(self) -> Sequence[tuple[str, str, Mapping[str, float]]]:
        """What was compared, the format, and the figures; the base first."""
        base = [("base", format_, figures) for format_, figures in self.manifest.base.parity.items()]
        return base + [
            (item.entry.name, format_, figures)
            for item in self.adapters
            for format_, figures in item.entry.parity.items()
        ]


def facts_of(bundle: Path, manifest: Manifest, scores: Mapping[str, Score] | None = None) -> Facts:
    """The facts of a bundle with files in `bundle`; `scores` by adapter, UsageError for one that is not in it."""
    scores = scores or {}
    for name in scores:
        manifest.adapter(name)
    recipes = manifest.recipe.get("adapters", {})
    return Facts(
        manifest=manifest,
        base_mb={name: _base_mb(bundle, manifest, name) for name in manifest.base.files},
        total_mb=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / MB,
        adapters=[
            _adapter(manifest, entry, recipes.get(name, {}), scores.get(name))
            for name, entry in manifest.adapters.items()
        ],
    )


def fits_of(bundle: Path, manifest: Manifest) -> list[Fit]:
    """The prediction for each board; empty without GGUF files and for encoders, which have no predictions."""
    if not task_types.load(manifest.task).offers("fit") or gguf.NAME not in manifest.base.files:
        return []
    needs = needs_of_bundle(bundle)
    return [fit(needs, boards.load(name)) for name in boards.names()]


def scores_of(files: Iterable[tuple[str, Path]]) -> dict[str, Score]:
    """The scores in files that `edgetune evaluate --json` wrote, by adapter; UsageError for any other file."""
    scores = {}
    for name, path in files:
        try:
            raw = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            scores[name] = Score(str(raw["metric"]), float(raw["score"]), int(raw["rows"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            message = f"{path} is not the output of edgetune evaluate --json: {error}"
            raise UsageError(message, "write one with: edgetune evaluate BUNDLE … --json > FILE") from error
    return scores


def _base_mb(bundle: Path, manifest: Manifest, format_: str) -> float:
    """The size of a base in MB: its file, or all files of its folder if it has its own."""
    file = bundle / manifest.base.files[format_]
    has_folder = file.parent.name != "base"
    files = [path for path in file.parent.rglob("*") if path.is_file()] if has_folder else [file]
    return sum(path.stat().st_size for path in files) / MB


def _adapter(manifest: Manifest, entry: AdapterEntry, recipe: Mapping[str, Any], score: Score | None) -> AdapterFacts:
    history = entry.training.get("history", [])
    return AdapterFacts(
        entry=entry,
        rank=_rank(sorted(entry.modules_by_rank)),
        mb={name: bytes_of_model(manifest.files, file) / MB for name, file in entry.files.items()},
        train_file=str(recipe.get("data", {}).get("train", "")),
        points=[(int(p["step"]), float(p["train_loss"]), float(p["val_loss"])) for p in history],
        score=score,
    )


def _rank(ranks: Sequence[int]) -> str:
    """One rank, or the lowest and the highest."""
    return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

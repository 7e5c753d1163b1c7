"""Measures quantizations of the base on rows of the tasks, and chooses the one that the recipe asks for."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from edgetune_export.adapters.shapes import Floats
from edgetune_export.base_file.importance import Importance
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.formats.atomic import TEMPORARY

from edgetune import bases
from edgetune.bases import BaseSource, ImportanceSource
from edgetune.common.digests import key_of
from edgetune.common.files import write_file
from edgetune.common.progress import Progress
from edgetune.planning.quantization import MAX_TOKENS, Candidate, MeasuredCandidate, best_of
from edgetune.planning.records import BuildPlan
from edgetune.shipping.parity_engines import GovernedEngine
from edgetune.tasks.task import Task

from .importance import requested_importance

_FILE = "quantizations.json"
# As many tokens are decoded for a speed.
_DECODED = 32


def choose_quantization(
    plan: BuildPlan, tasks: Sequence[Task], work: Path, progress: Progress, converter: Path | None
) -> str | None:
    """Measure the candidates of the plan, and return the one that its recipe asks for; None for the base as it is.

    What was measured stays in `work` and is not measured again. Raises the errors of `best_of`, and those of conversion
    and quantization.
    """
    spec = plan.recipe.quantization_spec
    assert spec is not None
    work.mkdir(parents=True, exist_ok=True)
    measured = _Measurement(plan, tasks, work, progress, times_decoding=spec.optimize == "speed").run(converter)
    for item in measured:
        progress.say(f"quantization {item}")
    chosen = best_of(measured, plan.recipe)
    progress.say(f"chose quantization {chosen}")
    return chosen.quantization


@dataclass(frozen=True)
class _Measurement:
    """Measures the candidates of a plan, and keeps the figures in a file of the folder `work`."""

    plan: BuildPlan
    tasks: Sequence[Task]
    work: Path
    progress: Progress
    times_decoding: bool

    def run(self, converter: Path | None) -> list[MeasuredCandidate]:
        """The figures of all candidates, in their order; without GGUF as a target, sizes are those of the plan."""
        source, candidates = self.plan.source, self.plan.base.candidates
        assert source is not None
        importance = requested_importance(self.plan.recipe, self.progress)
        key = self._key(source, importance)
        measured = self._stored(key)
        left = [item for item in candidates if item.quantization not in measured]
        if left:
            with TemporaryDirectory(prefix=TEMPORARY, dir=self.work) as folder:
                file = bases.before_quantization(source, Path(folder), self.progress, converter)
                matrix = None if importance is None else importance.collect(file)
                for item in self._measured(left, file, matrix, Path(folder)):
                    measured[item.quantization] = item
                    self._store(key, measured)
        if gguf.NAME in self.plan.recipe.targets:
            return [measured[item.quantization] for item in candidates]
        return [replace(measured[item.quantization], bytes=item.bytes) for item in candidates]

    def _key(self, source: BaseSource, importance: ImportanceSource | None) -> str:
        """Identifies everything that the figures depend on."""
        tasks = [(task.spec.system, len(task.train)) for task in self.tasks]
        limits = [MAX_TOKENS, self.plan.recipe.context_length]
        state = [bases.key_of_source(source), importance and importance.key, tasks, self.times_decoding, limits]
        rows = ((row.prompt_key, row.completion) for task in self.tasks for row in (*task.train, *task.choosing))
        return key_of(state, rows)

    def _measured(
        self, candidates: Sequence[Candidate], file: Path, matrix: Importance | None, folder: Path
    ) -> Iterator[MeasuredCandidate]:
        """Quantize `file`, the base before quantization, to one candidate after the other, and measure it."""
        rows = self._rows(file)
        longest = max(map(len, rows), default=1) + _DECODED
        length = min(longest, self.plan.recipe.context_length)
        with _engine(file, length) as engine:
            for row in rows:
                engine.truncate(0)
                np.save(_logits_file(folder, row), engine.decode_all(row))

        def expected(tokens: list[int]) -> Floats:
            # From the disk, as the logits of all rows may need more memory than there is.
            logits: Floats = np.load(_logits_file(folder, tokens), mmap_mode="r")
            return logits

        with self.progress.step("quantizations", len(candidates)) as step:
            for candidate in candidates:
                path = file
                if candidate.quantization is not None:
                    path = folder / "quantized.gguf"
                    quantize_gguf(file, path, candidate.quantization, again=True, importance=matrix)
                with _engine(path, length) as engine:
                    kl = compare(expected, engine, rows).kl
                    tokens_per_s = _tokens_per_s(engine, min(rows, key=len), length) if self.times_decoding else None
                step.update()
                # The prediction is a mean where types alternate between layers.
                yield MeasuredCandidate(candidate.quantization, path.stat().st_size, kl, tokens_per_s)

    def _rows(self, file: Path) -> list[list[int]]:
        """Tokens of validation rows, of training rows where there are none: as many of each task."""
        rows, max_tokens = list[list[int]](), self.plan.recipe.context_length
        with closing(GgufTokenizer(file)) as tokenizer:
            for task in self.tasks:
                train, validation, _ = replace(task, copies=()).tokenize(tokenizer, max_tokens)
                examples, left = validation or train, MAX_TOKENS // len(self.tasks)
                for example in random.Random(0).sample(examples, len(examples)):
                    if left <= 0:
                        break
                    rows.append(list(example.tokens))
                    left -= len(example.tokens)
        return rows

    def _stored(self, key: str) -> dict[str | None, MeasuredCandidate]:
        """What was measured with this key before."""
        try:
            stored = json.loads((self.work / _FILE).read_text(encoding="utf-8"))
            items = [MeasuredCandidate(**item) for item in stored["measured"]] if stored["key"] == key else []
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {item.quantization: item for item in items}

    def _store(self, key: str, measured: Mapping[str | None, MeasuredCandidate]) -> None:
        stored = {"key": key, "measured": [asdict(item) for item in measured.values()]}
        write_file(self.work / _FILE, json.dumps(stored, indent=2))


@contextmanager
def _engine(file: Path, context_length: int) -> Iterator[GovernedEngine]:
    with closing(engines.load(gguf.NAME)(file, context_length=context_length)) as engine:
        yield GovernedEngine(engine)


def _logits_file(folder: Path, tokens: Sequence[int]) -> Path:
    return folder / f"{key_of(list(tokens))}.npy"


def _tokens_per_s(engine: GovernedEngine, tokens: Sequence[int], context_length: int) -> float:
    """The median decode speed after these tokens, or as many of them as leave room."""
    engine.truncate(0)
    token, steps_s = int(engine.decode(tokens[: max(1, context_length - _DECODED)]).argmax()), []
    for _ in range(min(_DECODED, context_length - 1)):
        begin = time.perf_counter()
        engine.decode([token])
        steps_s.append(time.perf_counter() - begin)
    return 1 / statistics.median(steps_s)

"""Measure how well `classify` finds texts that fit no label, with CLINC150's questions of no intent.

    python benchmarks/out_of_scope.py --data data_full.json --work build/out-of-scope

data_full.json is CLINC150 (Larson et al. 2019, https://github.com/clinc/oos-eval): 150 intents with 100 training rows
each. A bundle per number of rows per intent is built with `out_of_scope: true`, which sees no text of CLINC150 that
has no intent. A line has the area under the ROC curve, of texts with an intent against those without, for the
probability of the label, for the similarity to training prompts, and for both as `classify` uses them.
"""

from __future__ import annotations

from benchmarks.harness.benchmark import ENGINES, Benchmark, Result, work_folder
from benchmarks.harness.machine import said_of_machine
from benchmarks.harness.ranking import auroc
from benchmarks.harness.tables import markdown

import json
import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from edgetune_runtime import Runtime
from edgetune_runtime.inference.measuring import logits_after
from edgetune_runtime.inference.similarity import read_prompts

import edgetune
from edgetune.common.spread import spread
from edgetune.recipe.model import Recipe
from edgetune.tasks.confidence import bins_of, calibration_error

ADAPTER = "intent"


class Asked(NamedTuple):
    """A test text: whether it has an intent, what `classify` says, and how sure it is that the text is in scope."""

    has_intent: bool
    is_right: bool
    is_out_of_scope: bool
    probability: float
    similarity: float
    log_odds: float
    confidence: float | None


def main() -> None:
    parser = BENCHMARK.parser(only=ENGINES, works=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="data_full.json of CLINC150")
    parser.add_argument("--base", default="smollm2-135m", help="the base (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 100], metavar="N", help="per intent (10 100)")
    parser.add_argument("--epochs", type=float, help="(default: as training: auto chooses)")
    parser.add_argument("--seeds", type=int, default=1, help="choices of the rows (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=500, help="of each kind (default: %(default)s)")
    options = BENCHMARK.options(parser, rows=[1], test_rows=4, epochs=0.1)
    data = json.loads(options.data.read_text(encoding="utf-8"))
    lines: list[Result] = []
    with work_folder(options) as work:
        for seed in range(options.seeds):
            for rows in options.rows:
                lines += measured(data, rows, seed, options, work)
    BENCHMARK.report(options, {"trainings": lines})


def measured(data: dict[str, Any], count: int, seed: int, options: Namespace, work: Path) -> Iterator[Result]:
    """Build a bundle of so many rows per intent, and ask each of its engines the test texts."""
    out = work / f"{count}-{seed}"
    if not out.exists():
        edgetune.build(recipe_of(rows_per_label(data["train"], count, seed), out, options), out)
    texts = [*spread(data["test"], options.test_rows), *spread(data["oos_test"], options.test_rows)]
    for engine in options.only:
        with Runtime.open(out, engine=engine, disk_mb=0) as runtime:
            answers = list(asked(runtime, out, texts))
        yield {"rows": count, "seed": seed, "engine": engine, **figures(answers)}


def rows_per_label(rows: Sequence[tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """So many random rows of each label."""
    by_label: dict[str, list[tuple[str, str]]] = {}
    for text, label in rows:
        by_label.setdefault(label, []).append((text, label))
    rng = random.Random(seed)
    return [row for own in by_label.values() for row in rng.sample(own, min(count, len(own)))]


def recipe_of(rows: Sequence[tuple[str, str]], out: Path, options: Namespace) -> Recipe:
    """The recipe of a classifier of these rows."""
    file = out.with_name(f"{out.name}.jsonl")
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    training = {"auto": True} | ({} if options.epochs is None else {"epochs": options.epochs})
    adapter = {
        "data": {"train": str(file.resolve()), "held_out": 0.1},
        "system": "Name the intent.",
        "metric": "label",
        "out_of_scope": True,
        "golden": False,
        "draft": False,
        "training": training,
    }
    values = {"name": "out-of-scope", "base": options.base, "quantization": "q4_0", "context_length": 256}
    return Recipe.from_dict({**values, "targets": list(options.only), "adapters": {ADAPTER: adapter}})


def asked(runtime: Runtime, bundle: Path, texts: Sequence[tuple[str, str]]) -> Iterator[Asked]:
    """Ask for the label of each text."""
    entry = runtime.manifest.adapter(ADAPTER)
    scope, prompts = entry.scope[runtime.engine], read_prompts(bundle / str(entry.similarity))
    for text, label in texts:
        answer = runtime.classify(text, adapter=ADAPTER)
        similarities = prompts.similarities(logits_after(runtime, [{"role": "user", "content": text}], ADAPTER))
        likeliest = max(answer.probabilities, key=answer.probabilities.__getitem__)
        probability = answer.probabilities[likeliest]
        yield Asked(
            label != "oos",
            answer.label == label,
            answer.is_out_of_scope,
            1 - probability if likeliest == scope.label else probability,
            max(similarities.nearest.values()),
            -answer.log_odds if answer.is_out_of_scope else answer.log_odds,
            answer.confidence,
        )


def figures(answers: Sequence[Asked]) -> Result:
    """What the parts of the score tell, and what the threshold of the build does."""
    known = [answer for answer in answers if answer.has_intent]
    others = [answer for answer in answers if not answer.has_intent]
    is_known = [answer.has_intent for answer in answers]
    refuses = [answer.is_out_of_scope for answer in answers]
    is_answered_right = [answer.is_right if answer.has_intent else answer.is_out_of_scope for answer in answers]
    rated = [(answer.confidence, right) for answer, right in zip(answers, is_answered_right, strict=True)]
    confidences, right = zip(*[(value, is_right) for value, is_right in rated if value is not None], strict=True)
    return {
        "texts": len(answers),
        "auroc_probability": auroc([answer.probability for answer in answers], is_known),
        "auroc_similarity": auroc([answer.similarity for answer in answers], is_known),
        "auroc": auroc([answer.log_odds for answer in answers], is_known),
        "right": sum(answer.is_right for answer in known) / len(known),
        "refused": sum(answer.is_out_of_scope for answer in known) / len(known),
        "found": sum(answer.is_out_of_scope for answer in others) / len(others),
        "mcc": -float(np.corrcoef(is_known, refuses)[0, 1]),
        "right_of_all": sum(is_answered_right) / len(answers),
        "without_confidence": len(answers) - len(confidences),
        "calibration_error": calibration_error(bins_of(confidences, right)),
        "auroc_confidence": auroc(confidences, right),
    }


def table(result: Result) -> str:
    columns = {
        "rows per intent": "{rows}",
        "choice": "{seed}",
        "engine": "{engine}",
        "AUROC": "{auroc:.3f}",
        "of the probability": "{auroc_probability:.3f}",
        "of the similarity": "{auroc_similarity:.3f}",
        "right of texts with an intent": "{right:.1%}",
        "refused of these": "{refused:.1%}",
        "found of the others": "{found:.1%}",
        "MCC": "{mcc:.3f}",
        "right of all": "{right_of_all:.1%}",
        "calibration error": "{calibration_error:.3f}",
        "AUROC of right answers by confidence": "{auroc_confidence:.3f}",
    }
    return f"{said_of_machine(result)}\n\n{markdown(result['trainings'], columns)}"


BENCHMARK = Benchmark(__file__, __doc__, table)

if __name__ == "__main__":
    main()

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from edgetune_runtime import Runtime
from runtime.inference.test_structured import HOT

SCHEMAS = sorted((Path(__file__).parents[2] / "benchmarks/schemas").glob("*.json"))
WHOLE = {"gguf": 4, "onnx": 1}
"""How many answers that ended are checked for each schema; both engines have the same constraint."""


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def opened(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path]) -> Iterator[Runtime]:
    with Runtime.open(prompted_of("llama"), engine=request.param, disk_mb=0, context_length=512) as runtime:
        yield runtime


def test_there_are_ten_schemas() -> None:
    assert len(SCHEMAS) == 10


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_every_answer_that_ends_fits_a_real_schema(path: Path, opened: Runtime) -> None:
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    judge.check_schema(schema)
    whole = 0
    for seed in range(12):
        answer = opened.generate(f"number {seed}", schema=schema, seed=seed, **{**HOT, "max_tokens": 1500})
        assert answer.stop_reason in {"end", "length"}
        if answer.stop_reason == "end":
            judge.validate(json.loads(answer.text))
            whole += 1
        if whole == WHOLE[opened.engine]:
            break
    assert whole == WHOLE[opened.engine]

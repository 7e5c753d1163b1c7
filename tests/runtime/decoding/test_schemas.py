"""Schemas as applications have them: every answer fits its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from edgetune_runtime.decoding.grammars import Grammars
from edgetune_runtime.decoding.output import output_of
from edgetune_runtime.engines.base import Tokenizer
from runtime.decoding.answers import random_answer

SCHEMAS = sorted((Path(__file__).parents[3] / "benchmarks/schemas").glob("*.json"))


def test_there_are_ten_schemas() -> None:
    assert len(SCHEMAS) == 10


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_random_answers_fit_a_real_schema(path: Path, tiny: tuple[Tokenizer, Grammars]) -> None:
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    judge.check_schema(schema)
    tokenizer, grammars = tiny
    random = np.random.default_rng(0)
    for number in range(10):
        answer = random_answer(grammars.constraint(output_of(schema=schema)), tokenizer, random, force=number % 2 == 0)
        judge.validate(json.loads(answer))

"""Metrics of drafts, from a bundle whose adapter has a draft table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_export.drafts import Row, table_of
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest, sha256_of
from edgetune_runtime.decoding.drafts import write_table
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.bundles import change_manifest
from runtime.server.conftest import Start
from runtime.server.test_health import figures

KNOWN, OTHER = "play", "turn on the warm light"


@pytest.fixture
def drafting(prompted_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle whose adapter `one` has a table of its answer to KNOWN."""
    bundle = Path(shutil.copytree(prompted_of("llama"), tmp_path / "home"))
    with Runtime.open(bundle, disk_mb=0) as runtime:
        call = loaded_bundle(runtime).call(KNOWN, "one")
        runtime.generate(KNOWN, adapter="one", max_tokens=40)
        row = Row(list(call.pool.first.tokens), len(call.job.tokens))
    path = bundle / "adapters/one/draft.bin"
    write_table(path, table_of([row] * 3, lambda _: False, read_manifest(bundle).base.tokenizer_sha256))
    name = path.relative_to(bundle).as_posix()

    def add(raw: dict[str, Any]) -> None:
        raw["adapters"]["one"]["draft"] = name
        raw["files"][name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}

    change_manifest(bundle, add)
    return bundle


def test_the_acceptance_rate_of_drafts_can_be_computed(drafting: Path, start: Start) -> None:
    server = start(drafting)
    timings = []
    for prompt, temperature in ((KNOWN, 0), (OTHER, 0), (KNOWN, 1.5)):
        body = {"model": "one", "messages": [{"role": "user", "content": prompt}], "max_tokens": 40, "seed": 1}
        reply = server.client.post("/v1/chat/completions", json={**body, "temperature": temperature})
        timings.append(reply.json()["timings"])
    right, *_, wrong = timings
    assert 20 < right["accepted"] <= right["drafted"]
    assert wrong["accepted"] < wrong["drafted"]
    found = figures(server)
    assert found["edgetune_draft_tokens_total adapter=one"] == sum(each["drafted"] for each in timings)
    assert found["edgetune_draft_tokens_accepted_total adapter=one"] == sum(each["accepted"] for each in timings)


def test_an_answer_without_drafts_counts_none(start: Start) -> None:
    server = start()
    body = {"model": "command", "messages": [{"role": "user", "content": KNOWN}], "max_tokens": 8}
    assert server.client.post("/v1/chat/completions", json=body).json()["timings"]["drafted"] == 0
    assert figures(server)["edgetune_draft_tokens_total adapter=command"] == 0

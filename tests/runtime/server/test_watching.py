from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime.bundle import sha256_of
from runtime.bundles import change_manifest
from runtime.server.conftest import Running, Start
from runtime.server.test_health import CHAT
from runtime.stores import switch_to
from waiting import wait_for


def test_a_server_takes_over_the_version_that_its_path_is_switched_to(
    bundle: Path, fewer: Path, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = tmp_path / "device"
    server = start(switch_to(prefix, "a" * 16, bundle))
    assert ask(server, "tone") == 200
    switch_to(prefix, "b" * 16, fewer)
    wait_for(lambda: server.client.get("/healthz").json()["bundle"] == sha256_of(fewer / "manifest.json"))
    assert ask(server, "tone") == 404
    assert ask(server, "command") == 200
    change_manifest(fewer, lambda raw: raw["base"].update(quantization="q4_0"))
    switch_to(prefix, "c" * 16, fewer)
    wait_for(lambda: "has another base than before; open it again, or restart the server" in caplog.text)
    assert ask(server, "command") == 200
    assert server.client.get("/healthz").json()["bundle"] != sha256_of(fewer / "manifest.json")
    assert caplog.text.count("has another base than before") == 1


def ask(server: Running, model: str) -> int:
    return server.client.post("/v1/chat/completions", json=CHAT | {"model": model}).status_code

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import httpx
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from runtime.bundles import change_manifest
from runtime.server.test_serve_command import CHAT, serving
from runtime.stores import switch_to
from waiting import wait_for


def test_a_server_takes_over_the_version_that_its_path_is_switched_to(bundle: Path, tmp_path: Path) -> None:
    following, prefix = Path(shutil.copytree(bundle, tmp_path / "next")), tmp_path / "device"
    remove_from_bundle(following, "tone")
    with serving(switch_to(prefix, "a" * 16, bundle), "--contexts", 1) as (process, url):
        assert ask(url, "tone") == 200
        switch_to(prefix, "b" * 16, following)
        wait_for(lambda: ask(url, "tone") == 404)
        assert httpx.get(f"{url}/healthz").json()["bundle"] == sha256_of(following / "manifest.json")
        assert ask(url, "command") == 200
        change_manifest(following, lambda raw: raw["base"].update(quantization="q4_0"))
        switch_to(prefix, "c" * 16, following)
        assert process.stderr is not None
        warning = process.stderr.readline()
        assert ask(url, "command") == 200
        assert httpx.get(f"{url}/healthz").json()["bundle"] != sha256_of(following / "manifest.json")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == ""
    assert "has another base than before; open it again, or restart the server" in warning


def ask(url: str, model: str) -> int:
    return httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"model": model}, timeout=30).status_code

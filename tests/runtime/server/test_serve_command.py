from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from edgetune_runtime.cli import main
from runtime.bundles import change_manifest
from waiting import wait_for

RUN = [sys.executable, "-m", "edgetune_runtime", "serve"]
CHAT = {"model": "command", "messages": [{"role": "user", "content": "play"}], "max_tokens": 4}
KEY = "0123456789abcdef"


@contextmanager
def serving(*arguments: object, run: Sequence[str] = RUN) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`edgetune-run serve` with these arguments, and its URL once it is ready."""
    command = [*run, *map(str, arguments), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["pid"] == process.pid
            yield process, told["url"]
        finally:
            process.kill()


def test_the_server_prints_one_line_when_ready_and_exits_with_0_on_an_interrupt(bundle: Path) -> None:
    with serving(bundle, "--contexts", 1) as (process, url):
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30).status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_requests_are_logged_when_it_is_asked_for(bundle: Path) -> None:
    with serving(bundle, "--contexts", 1, "--log-requests") as (process, url):
        httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30)
        httpx.get(f"{url}/no%0Aline?key=secret")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    first, second = err.splitlines()
    assert re.fullmatch(r"edgetune-run: INFO: POST /v1/chat/completions 200 \d+ ms", first)
    assert re.fullmatch(r"edgetune-run: INFO: GET /no%0Aline 404 \d+ ms", second)


def test_a_host_that_others_can_reach_needs_a_key_or_a_second_word_and_origins_may_have_any_scheme(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(bundle), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "give --api-key-file FILE, or --no-api-key" in capsys.readouterr().err
    (tmp_path / "keys").write_text(f"{KEY}\n")
    (tmp_path / "keys").chmod(stat.S_IRUSR)
    origins = ("--allow-origin", "app://Obsidian.md", "--allow-origin", "https://Example.org:443")
    for arguments, status in ((("--api-key-file", tmp_path / "keys"), 401), (("--no-api-key",), 200)):
        with serving(bundle, "--host", "0.0.0.0", *origins, *arguments) as (_, url):
            assert url.startswith("http://127.0.0.1:")
            assert httpx.get(f"{url}/v1/models").status_code == status
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
            # As browsers send them.
            for origin in ("app://obsidian.md", "https://example.org"):
                reply = httpx.get(f"{url}/v1/models", headers={"Origin": origin})
                assert reply.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    ("says", "options", "warms"), [(True, (), True), (True, ("--no-warm",), False), (False, (), False)]
)
def test_states_are_computed_at_the_start_if_the_bundle_or_an_option_says_so(
    says: bool, options: tuple[str, ...], warms: bool, prompted_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(prompted_of("llama"), tmp_path / "home"))
    change_manifest(bundle, lambda raw: raw.update(warms=says))
    with serving(bundle, "--cache-folder", tmp_path / "states", *options) as (_, url):
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code != 503)
        assert bool(list(tmp_path.glob("states/*.kv"))) is warms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key-file", "missing"], "cannot read the keys in missing"),
        (["--api-key-file", "short"], "short has no key, or one of fewer than 16 characters; make one: openssl"),
        (["--api-key-file", "foreign"], "key 2 of foreign is not ASCII; make one: openssl rand -hex 32"),
        (["--host", "no.such.host.invalid"], "host 'no.such.host.invalid' is unknown"),
        (["--port", "70000"], "port is 70000; give 0 to 65535"),
        (["--allow-host", "board.lan:8080"], "host 'board.lan:8080' is not a name; give one without scheme and port"),
        (["--allow-host", "http://board.lan"], "host 'http://board.lan' is not a name"),
        (["--allow-host", ""], "host '' is not a name"),
        (["--allow-origin", "example.org"], "origin 'example.org' is not a scheme and host"),
        (["--allow-origin", "https://münchen.de"], "such as https://example.org or https://xn--mnchen-3ya.de"),
        (["--allow-origin", "http://"], "origin 'http://' is not a scheme and host"),
        (["--max-answers", "0"], "--max-answers 0"),
        (["--max-request-s", "nan", "--max-grace-s", "nan"], "too small: --max-request-s nan, --max-grace-s nan"),
        (["--engine", "onnx"], "onnx"),
    ],
)
def test_invalid_serve_arguments_are_one_line_errors(
    arguments: list[str],
    message: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("secret\n")
    Path("foreign").write_text(f"{KEY}\n{KEY}é\n", encoding="utf-8")
    assert main(["serve", str(bundle), "--port", "0", *arguments]) in (2, 3, 5)
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_port_in_use_is_reported_before_the_bundle_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path / "no bundle"), "--port", str(port)]) == 2
    assert f"port {port}: {os.strerror(98)}" in capsys.readouterr().err


def without(*libraries: str) -> list[str]:
    """The command of `edgetune-run` where these libraries are not installed."""
    probe = f"import sys; sys.modules.update(dict.fromkeys({libraries})); "
    return [sys.executable, "-c", f"{probe}from edgetune_runtime.cli import main; sys.exit(main(sys.argv[1:]))"]


NEEDS_LIBRARY = 'need llguidance, which is not installed; run: pip install "edgetune-runtime[structured]"'


@pytest.fixture
def constrained(home: Path) -> Path:
    """A bundle one of whose adapters has a constraint."""
    change_manifest(home, lambda raw: raw["adapters"]["command"].update(output={"choices": ["on", "off"]}))
    return home


def test_only_requests_to_adapters_with_constraints_need_their_library(constrained: Path) -> None:
    with serving(constrained, "--contexts", 1, "--warm", run=[*without("llguidance"), "serve"]) as (process, url):
        for model, status in (("tone", 200), ("command", 500)):
            response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "model": model}, timeout=30)
            assert response.status_code == status
        assert NEEDS_LIBRARY in response.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=30)[1]
    start, prompt, refused = err.splitlines()
    assert "requests to adapters whose answers are constrained will fail: output constraints " + NEEDS_LIBRARY in start
    assert "the prompt of command is not warm: output constraints " + NEEDS_LIBRARY in prompt
    assert NEEDS_LIBRARY in refused


def test_an_adapter_with_constraints_takes_no_commands_without_their_library(constrained: Path) -> None:
    options = ["--uri", "tcp://127.0.0.1:0", "--adapter", "command"]
    command = [*without("llguidance"), "wyoming", str(constrained), *options]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (failed.returncode, failed.stdout) == (5, "")
    assert NEEDS_LIBRARY in failed.stderr


def test_help_needs_no_extra() -> None:
    command = [*without("starlette", "uvicorn"), "serve"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--api-key-file" in told
    failed = subprocess.run([*command, "bundle"], capture_output=True, text=True, check=False)
    assert failed.returncode == 5
    assert 'run: pip install "edgetune-runtime[server]"' in failed.stderr

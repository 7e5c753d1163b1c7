"""The unit of a kit under a real systemd: as root with all that is forbidden to it, and as a user's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from systemd.machine import SHARED, USER, Machine

INSTALL = ("sh", f"{SHARED}/kit/install.sh")
PROMPT = "turn on the light in the hall"
# Asks the server as a client of the same machine does.
ASK = """\
import json, sys, urllib.request
body = json.dumps({"model": "one", "max_tokens": 8, "messages": [{"role": "user", "content": sys.argv[2]}]}).encode()
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions", body, headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
UNTIL_READY = """\
import sys, time, urllib.request
for _ in range(120):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/readyz")
        break
    except OSError:
        time.sleep(1)
else:
    sys.exit("it does not answer")
"""


def answer_of(machine: Machine, port: int) -> str:
    found = json.loads(machine.run("python3", "-c", ASK, str(port), PROMPT))
    return str(found["choices"][0]["message"]["content"])


def install(machine: Machine, *words: str, user: str | None = None, kit: str = "kit") -> str:
    """Install a kit with a unit; what the installer says."""
    script = f"{SHARED}/{kit}/install.sh"
    return machine.run("sh", "-c", '"$0" "$@" 2>&1', "sh", script, "--service", *words, user=user)


def shown(machine: Machine, *words: str, user: str | None = None) -> dict[str, str]:
    """The properties of the unit."""
    scope = ["--user"] if user else []
    text = machine.run("systemctl", *scope, "show", "edgetune-home", f"--property={','.join(words)}", user=user)
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.fixture(scope="module")
def expected(bundle: Path) -> str:
    with Runtime.open(bundle, engine="onnx", threads=1, disk_mb=0) as runtime:
        return runtime.generate(PROMPT, adapter="one", max_tokens=8).text


def test_a_unit_of_the_system_answers_restarts_and_goes(machine: Machine, expected: str) -> None:
    assert "unit edgetune-home answers, 1 adapters as built" in install(machine, "--port", "8080")
    unit = shown(machine, "ActiveState", "MemoryMax", "DynamicUser", "MainPID", "UnitFileState")
    assert (unit["ActiveState"], unit["DynamicUser"], unit["UnitFileState"]) == ("active", "yes", "enabled")
    assert unit["MemoryMax"].isdigit()
    assert machine.run("stat", "--format=%u", f"/proc/{unit['MainPID']}") != "0"
    assert answer_of(machine, 8080) == expected
    machine.run("systemctl", "kill", "--signal=KILL", "edgetune-home")
    machine.run("python3", "-c", UNTIL_READY, "8080")
    assert shown(machine, "MainPID")["MainPID"] != unit["MainPID"]
    assert answer_of(machine, 8080) == expected
    assert shown(machine, "ActiveState")["ActiveState"] == "active"
    folders = ("find", "/var/cache", "/var/lib", "-name", "edgetune-home")
    assert machine.run(*folders)
    machine.run(*INSTALL, "uninstall")
    assert shown(machine, "LoadState")["LoadState"] == "not-found"
    assert not machine.run(*folders)


def start_session(machine: Machine) -> None:
    """Start the service manager of the user."""
    machine.run("loginctl", "enable-linger", USER)
    machine.run("systemctl", "start", f"user@{machine.run('id', '-u', USER)}.service")


def kill(machine: Machine, port: int, user: str | None) -> None:
    """End the server as a crash does, and wait until systemd has started it again."""
    before = shown(machine, "MainPID", user=user)["MainPID"]
    machine.run("systemctl", *(["--user"] if user else []), "kill", "--signal=KILL", "edgetune-home", user=user)
    for _ in range(60):
        if shown(machine, "MainPID", user=user)["MainPID"] not in {before, "0"}:
            break
        time.sleep(0.5)
    machine.run("python3", "-c", UNTIL_READY, str(port))


def test_a_version_of_the_same_base_is_taken_over_without_a_restart(machine: Machine, expected: str) -> None:
    install(machine, "--port", "8085")
    running = shown(machine, "MainPID")
    assert "unit edgetune-home has taken over the version" in install(machine, "--port", "8085", kit="next")
    assert shown(machine, "MainPID") == running
    assert answer_of(machine, 8085) != expected
    machine.run("/opt/edgetune/home/current/venv/bin/python", f"{SHARED}/next/board.pyz", "rollback")
    assert shown(machine, "MainPID") == running
    assert answer_of(machine, 8085) == expected
    assert "starting unit edgetune-home" in install(machine, "--port", "8085", kit="other")
    assert shown(machine, "MainPID") != running
    machine.run(*INSTALL, "uninstall")


@pytest.mark.parametrize("user", [None, USER])
def test_the_timer_of_a_kit_updates_it_and_goes_with_it(machine: Machine, user: str | None) -> None:
    start_session(machine)
    scope, port = ["--user"] if user else [], "8086"
    machine.run("systemd-run", "--unit=repo", "python3", "-m", "http.server", "8090", f"--directory={SHARED}/repo")
    source = ("--updates", "http://127.0.0.1:8090", "--root", f"{SHARED}/root.json")
    install(machine, "--port", port, *source, user=user)
    before = answer_of(machine, int(port))
    assert machine.run("systemctl", *scope, "is-active", "edgetune-home-update.timer", user=user) == "active"
    assert machine.run("systemctl", *scope, "is-enabled", "edgetune-home-update.timer", user=user) == "enabled"
    machine.run("systemctl", *scope, "start", "edgetune-home-update.service", user=user)
    assert answer_of(machine, int(port)) != before
    machine.run(*INSTALL, "uninstall", user=user)
    units = machine.run("systemctl", *scope, "list-unit-files", "edgetune*", "--no-legend", user=user, check=False)
    assert units == ""
    machine.run("systemctl", "stop", "repo")


@pytest.mark.parametrize("user", [None, USER])
def test_a_version_that_crashes_until_it_was_started_too_often_is_gone_back_from(
    machine: Machine, user: str | None
) -> None:
    start_session(machine)
    prefix = f"/home/{USER}/.local/share/edgetune/home" if user else "/opt/edgetune/home"
    install(machine, "--port", "8084", user=user)
    first = machine.run("readlink", f"{prefix}/current")
    assert "1 adapters as built" in install(machine, "--port", "8084", user=user, kit="other")
    second = machine.run("readlink", f"{prefix}/current")
    seen = []
    for _ in range(3):
        kill(machine, 8084, user)
        seen.append(machine.run("readlink", f"{prefix}/current"))
    assert seen == [second, second, first]
    # Also the unit is that of the first version again.
    running = shown(machine, "MainPID", user=user)["MainPID"]
    assert "--cache-mb" not in machine.run("cat", f"/proc/{running}/cmdline")
    status = json.loads(machine.run(f"{prefix}/bin/edgetune-run", "update", "--status", "--json", user=user))
    assert list(status["refused"].values()) == ["it was started 2 times without a clean exit, and not acknowledged"]
    # Good answers keep it.
    assert "1 adapters as built" in install(machine, "--port", "8084", user=user, kit="other")
    for _ in range(3):
        assert answer_of(machine, 8084)
    for _ in range(4):
        kill(machine, 8084, user)
    assert machine.run("readlink", f"{prefix}/current") == second
    machine.run("sh", f"{SHARED}/kit/install.sh", "uninstall", user=user)


def test_a_unit_that_others_can_reach_asks_for_its_key(machine: Machine) -> None:
    assert "1 adapters as built" in install(machine, "--port", "8081", "--host", "0.0.0.0")
    refused = machine.run("python3", "-c", ASK, "8081", PROMPT, check=False)
    key = machine.run("cat", "/opt/edgetune/home/keys")
    allowed = ASK.replace('json"}', f'json", "Authorization": "Bearer {key}"}}')
    assert refused == ""
    assert "choices" in machine.run("python3", "-c", allowed, "8081", PROMPT)
    machine.run(*INSTALL, "uninstall")


def test_a_unit_of_a_user_answers(machine: Machine, expected: str) -> None:
    start_session(machine)
    assert "enable-linger" not in install(machine, "--port", "8082", user=USER)
    assert shown(machine, "ActiveState", user=USER)["ActiveState"] == "active"
    assert answer_of(machine, 8082) == expected
    machine.run(*INSTALL, "uninstall", user=USER)
    assert shown(machine, "LoadState", user=USER)["LoadState"] == "not-found"


def test_a_unit_of_the_system_itself_is_not_replaced(machine: Machine) -> None:
    kit = f"{SHARED}/kit/install.sh"
    refused = machine.run("sh", "-c", f"sh {kit} --service systemd-logind 2>&1", check=False)
    assert "unit systemd-logind exists and is not of /opt/edgetune/home" in refused
    assert shown(machine, "LoadState")["LoadState"] == "not-found"


def test_a_port_of_another_program_is_refused(machine: Machine) -> None:
    machine.run("systemd-run", "--unit=other", "python3", "-m", "http.server", "8083")
    refused = machine.run("sh", "-c", f"sh {SHARED}/kit/install.sh --service --port 8083 2>&1", check=False)
    assert "another program listens on port 8083 of 127.0.0.1" in refused
    assert shown(machine, "LoadState")["LoadState"] == "not-found"
    assert machine.run("sh", "-c", "ls /opt/edgetune/home/versions 2>/dev/null || true") == ""
    machine.run("systemctl", "stop", "other")

"""`adapter="auto"` with a router that knows a word of each task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import IncompatibleError, NotFoundError, Runtime, UsageError, VerificationError
from edgetune_runtime.bundle import AUTO, CLASSIFY, GENERATE, read_manifest
from edgetune_runtime.cli.main import main
from runtime.bundles import add_router, change_manifest

WORDS = {GENERATE: {"command": "lamp", "whole": "music"}, CLASSIFY: {"tone": "feel"}}
LAMP, MUSIC, NONE = "turn on the lamp", "play some music", "who is there"


def routed(bundle: Path, below: str = "base") -> Path:
    """The bundle with a router."""
    add_router(bundle, WORDS, below)
    return bundle


@pytest.fixture
def home(home: Path) -> Path:
    return routed(home)


def test_the_router_chooses_the_adapter_of_each_prompt(home: Path) -> None:
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime:
        for prompt, name in ((LAMP, "command"), (MUSIC, "whole"), (NONE, None)):
            answer = runtime.generate(prompt, adapter=AUTO, max_tokens=8)
            assert answer.route is not None
            assert (answer.route.adapter, answer.route.is_known) == (name, name is not None)
            assert (answer.route.confidence >= 0.5) == answer.route.is_known
            assert answer.text == runtime.generate(prompt, adapter=name, max_tokens=8).text
            by_choice = runtime.generate(prompt, adapter=runtime.route(prompt), max_tokens=8)
            assert (by_choice.text, by_choice.route) == (answer.text, answer.route)
        assert runtime.generate(LAMP, adapter="command", max_tokens=1).route is None


def test_the_last_message_of_the_user_decides(home: Path) -> None:
    messages = [
        {"role": "system", "content": MUSIC},
        {"role": "user", "content": MUSIC},
        {"role": "assistant", "content": MUSIC},
        {"role": "user", "content": LAMP},
        {"role": "assistant", "content": MUSIC},
    ]
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime:
        assert runtime.route(messages).adapter == "command"
        assert runtime.route(messages[2:3]).adapter is None


@pytest.mark.parametrize("below", ["command", "error"])
def test_a_prompt_of_no_task_gets_what_the_bundle_says(below: str, bundle: Path, tmp_path: Path) -> None:
    home = routed(Path(shutil.copytree(bundle, tmp_path / "home")), below)
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime:
        if below == "error":
            with pytest.raises(UsageError, match="none of the tasks"):
                runtime.generate(NONE, adapter=AUTO)
        else:
            route = runtime.generate(NONE, adapter=AUTO, max_tokens=1).route
            assert route is not None
            assert (route.adapter, route.is_known) == ("command", False)


def test_classify_chooses_among_the_adapters_with_labels(home: Path) -> None:
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime:
        found = runtime.classify("how do you feel", adapter=AUTO)
        assert found.route is not None and found.route.adapter == "tone"
        assert replace(found, route=None) == runtime.classify("how do you feel", adapter="tone")
        with pytest.raises(UsageError, match="of none of the tasks, and the base has no labels; name an adapter"):
            runtime.classify(LAMP, adapter=AUTO)
        for labels in ("abc", [1, 2], 5, iter(["warm"])):
            with pytest.raises(UsageError, match=r"labels is .*; give a list of texts"):
                runtime.classify(LAMP, labels, adapter="tone")  # type: ignore[arg-type]


def test_a_session_decides_for_each_message(home: Path, tmp_path: Path) -> None:
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime, runtime.session(AUTO) as session:
        answers = [session.send(prompt, max_tokens=4) for prompt in (LAMP, MUSIC, NONE)]
        assert [answer.route and answer.route.adapter for answer in answers] == ["command", "whole", None]
        expected = runtime.generate(session.history[:-1], max_tokens=4)
        assert expected.text == answers[-1].text
        with pytest.raises(IncompatibleError, match="another adapter for each message"):
            session.use(AUTO, carry="reuse")
        session.save(tmp_path / "saved")
        with runtime.load_session(tmp_path / "saved") as resumed:
            assert resumed.adapter == AUTO
            again = resumed.send(LAMP, max_tokens=4)
        assert again.text == session.send(LAMP, max_tokens=4).text


def test_a_bundle_without_a_router_says_how_to_get_one(runtime: Runtime) -> None:
    for call in (lambda: runtime.generate(LAMP, adapter=AUTO), lambda: runtime.session(AUTO)):
        with pytest.raises(NotFoundError, match=r"no router .* build it with `route: true`"):
            call()
    with pytest.raises(NotFoundError, match="no router"):
        runtime.classify(LAMP, adapter=AUTO)


def test_a_raw_prompt_is_not_routed(home: Path) -> None:
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime, pytest.raises(UsageError, match="raw prompt"):
        runtime.generate(LAMP, adapter=AUTO, raw=True)


def test_a_changed_file_is_found_at_the_first_prompt(home: Path) -> None:
    (home / "adapters" / "router.bin").write_bytes(b"something else")
    with Runtime.open(home, contexts=1, disk_mb=0) as runtime:
        assert runtime.generate(LAMP, adapter="command", max_tokens=1).tokens == 1
        with pytest.raises(VerificationError, match=r"router\.bin"):
            runtime.generate(LAMP, adapter=AUTO)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda router: router.update(below="nobody"), "below: 'nobody'"),
        (lambda router: router.update(file="../router.bin"), "outside the bundle"),
        (lambda router: router["calls"].update(sing=router["calls"]["generate"]), "the call 'sing'"),
        (lambda router: router["calls"]["generate"].update(threshold=1.5), "the threshold 1.5"),
        (lambda router: router["calls"]["generate"].update(adapters=["lost"]), "the adapter 'lost'"),
        (lambda router: router["calls"]["generate"].update(adapters=[]), "no adapters"),
        (lambda router: router["calls"]["generate"].pop("threshold"), "threshold"),
    ],
)
def test_a_manifest_with_a_wrong_router_is_refused(
    change: Callable[[dict[str, Any]], object], reason: str, home: Path
) -> None:
    change_manifest(home, lambda raw: change(raw["router"]))
    with pytest.raises(VerificationError, match=reason):
        read_manifest(home)


def test_the_command_line_shows_the_choice(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opening = ["--no-preflight", "--no-verify", "--json"]
    assert main(["generate", str(home), "--adapter", "auto", "--prompt", LAMP, "--max-tokens", "2", *opening]) == 0
    assert json.loads(capsys.readouterr().out)["route"]["adapter"] == "command"
    assert main(["classify", str(home), "--adapter", "auto", "--prompt", "do you feel", *opening]) == 0
    assert json.loads(capsys.readouterr().out)["route"]["adapter"] == "tone"
    assert main(["info", str(home)]) == 0
    assert "generate chooses among command, whole" in capsys.readouterr().out


def test_a_router_goes_with_an_adapter_that_it_chooses(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = read_manifest(home).router.file
    with Runtime.open(home, disk_mb=0) as runtime:
        runtime.remove_adapter("tone")
        with pytest.raises(NotFoundError, match="has no router"):
            runtime.generate("turn on the light", adapter="auto")
    assert main(["adapters", "remove", str(home), "tone"]) == 0
    assert "the router, which chose it, is removed too" in capsys.readouterr().out
    assert read_manifest(home).router is None
    assert not (home / file).exists()

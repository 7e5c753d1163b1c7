from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.server.settings import Access, ServerLimits
from ports import http_server
from recipes import adapter_of, write_recipe
from runtime.bundles import write_bundle
from runtime.server.conftest import started

from edgetune.cli.main import main
from edgetune.curation.teaching import teacher as teachers
from edgetune.curation.teaching.teacher import Teacher, TeacherError
from edgetune.tasks.data import read_rows

SCHEMA = {
    "type": "object",
    "properties": {"do": {"enum": ["on", "off"]}},
    "required": ["do"],
    "additionalProperties": False,
}
ORDERS = [
    {"prompt": f"turn {state} the {thing}", "completion": {"do": state}}
    for state in ("on", "off")
    for thing in ("lamp", "fan", "radio", "oven")
]
Reply = Callable[[Mapping[str, Any]], tuple[int, Mapping[str, str], bytes]]


def said(text: str) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def teacher() -> Iterator[Callable[[Reply], str]]:
    """`teacher(reply)`: the address of a server whose answers `reply` makes of the requests' bodies."""
    with ExitStack() as servers:

        def make(reply: Reply) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    request = {**body, "key": self.headers.get("Authorization"), "path": self.path}
                    status, headers, content = reply(request)
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            return servers.enter_context(http_server(Handler)) + "/v1"

        yield make


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    adapters = {"home": adapter_of(output={"schema": SCHEMA}, system="Home command to JSON.")}
    return str(write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": ORDERS}))


def command(recipe: str, url: str, out: Path, *more: str, model: str = "m") -> int:
    options = ["--teacher", url, "--model", model, "--rows", "4", "--out", str(out), "--per-minute", "100000", *more]
    return main(["augment", recipe, *options])


def test_this_projects_own_server_makes_rows_that_fit_the_schema(
    recipe: str, tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle", tiny_gguf("llama"), {}, context_length=512)
    with started(bundle, Access(), ServerLimits(grace_s=5), disk_mb=0) as server:
        url, out = f"{server.url}/v1", tmp_path / "new.jsonl"
        assert command(recipe, url, out, "--requests", "60", "--yes", model="bundle") == 0
    capsys.readouterr()
    made = read_rows(str(tmp_path / "new.jsonl"))
    assert made
    assert {row.completion for row in made} <= {'{"do": "on"}', '{"do": "off"}'}


def test_nothing_is_sent_without_yes(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    url = teacher(lambda body: (asked.append(body), said("x"))[1])
    assert command(recipe, url, tmp_path / "new.jsonl") == 0
    out = capsys.readouterr().out
    assert f"first of at most 24 requests to {url}, each with rows of home:" in out
    assert "turn off the " in out
    assert not asked
    assert not (tmp_path / "new.jsonl").exists()


def test_rows_are_kept_that_fit_and_whose_answers_agree(
    recipe: str,
    teacher: Callable[[Reply], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        bodies.append(body)
        number = body["seed"]
        if "response_format" not in body:
            return said("turn ON the lamp!" if number == 1 else f'- "request {number}"')
        if number == 2:
            return said("no JSON")
        return said(json.dumps({"do": "off" if number == 3 and body["temperature"] else "on"}))

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, out = teacher(reply), tmp_path / "new.jsonl"
    assert command(recipe, url, out, "--yes") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": f"request {number}", "completion": '{"do": "on"}'} for number in (4, 5, 6, 7)
    ]
    err = capsys.readouterr().err
    for reason in (
        "prompts that are there already, or are none",
        "answers that do not fit the task",
        "answers that disagree",
    ):
        assert f"left out 1 {reason}" in err
    assert {body["key"] for body in bodies} == {"Bearer secret"}
    assert "secret" not in err
    asked = len(bodies)
    assert command(recipe, url, out, "--yes") == 0
    assert len(bodies) == asked, "all rows are there"
    assert command(recipe, url, out, "--yes", "--rows", "6") == 0
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, {}, b'{"error": {"message": "bad key"}}')], "refuses: HTTP 401: bad key; check --teacher"),
        ([(200, {}, b"<html>")], "answers '<html>'; give the address of OpenAI's chat API"),
        ([(302, {"Location": "http://127.0.0.1:1/"}, b"")], "refuses: HTTP 302"),
        ([(503, {"Retry-After": "0"}, b"")] * 5, "does not answer after 5 tries: HTTP 503"),
    ],
)
def test_a_teacher_that_fails_is_named(
    replies: list[tuple[int, Mapping[str, str], bytes]],
    message: str,
    recipe: str,
    teacher: Callable[[Reply], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = teacher(lambda _: replies.pop(0))
    assert command(recipe, url, tmp_path / "new.jsonl", "--yes") == 8
    assert message in capsys.readouterr().err
    assert not replies


def test_a_busy_teacher_is_asked_again_and_a_limit_of_requests_kept(teacher: Callable[[Reply], str]) -> None:
    replies = [(429, {"Retry-After": "0"}, b""), said("hello")]
    asking = Teacher(teacher(lambda _: replies.pop(0)), "m", per_minute=100_000, most_requests=2)
    assert asking.ask(asking.request([], temperature=0, seed=0)) == "hello"
    with pytest.raises(TeacherError, match="2 requests are sent; allow more with --requests"):
        asking.ask({})


def test_a_teacher_that_is_down_is_named(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "_LONGEST_WAIT_S", 0.0)
    asking = Teacher("http://127.0.0.1:1/v1", "m", per_minute=100_000)
    with pytest.raises(TeacherError, match=r"at http://127.0.0.1:1/v1 does not answer after 5 tries: .*refused"):
        asking.ask({})
    with pytest.raises(UsageError, match="'ftp://x' is not an address"):
        Teacher("ftp://x", "m")


def test_rows_with_tools_or_several_turns_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]} for n in range(9)]
    recipe = str(write_recipe(tmp_path, "missing.gguf", data={"rows.jsonl": rows}))
    assert command(recipe, "http://127.0.0.1:1/v1", tmp_path / "new.jsonl") == 2
    assert "has several turns or no prompt" in capsys.readouterr().err

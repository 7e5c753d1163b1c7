from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import OutOfSpaceError, UsageError
from ports import http_server
from recipes import adapter_of, write_recipe
from runtime.bundles import write_bundle
from runtime.server.conftest import started

from edgetune.cli.main import main
from edgetune.curation.teaching import teacher as teachers
from edgetune.curation.teaching.questions import Questions
from edgetune.curation.teaching.row_file import adding_to
from edgetune.curation.teaching.teacher import Teacher, TeacherError
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.tasks.data import read_rows, rows_of
from edgetune.tasks.task import read_task

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


def said(text: str, end: str = "stop") -> tuple[int, Mapping[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": end}]}).encode()


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
    usual = {"--rows": "4", "--per-minute": "100000"}
    options = [word for pair in usual.items() if pair[0] not in more for word in pair]
    return main(["augment", recipe, "--teacher", url, "--model", model, "--out", str(out), *options, *more])


def test_this_projects_own_server_makes_rows_that_fit_the_schema(
    recipe: str, tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle", tiny_gguf("llama"), {}, context_length=512)
    with started(bundle) as server:
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
    first, *requests = out.splitlines()
    assert first == f"first two of at most 24 requests to {url}, each with rows of home:"
    wording, answering = map(json.loads, requests)
    assert "\n- turn o" in wording["messages"][0]["content"]
    assert wording["max_tokens"] == answering["max_tokens"] == 2000
    assert answering["response_format"]["json_schema"]["schema"] == SCHEMA
    assert len(answering["messages"]) == 1 + 2 * 6 + 1, "all rows but those for validation"
    assert not asked
    assert not (tmp_path / "new.jsonl").exists()


def test_rows_are_kept_whose_prompts_have_the_texts_of_their_answers(
    teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = {"type": "object", "properties": {"room": {"type": "string", "x-from-prompt": True}}, "required": ["room"]}
    rows = [{"prompt": f"light in room {n}", "completion": {"room": f"room {n}"}} for n in range(20)]
    adapters = {"home": adapter_of(output={"schema": form}, system="Home command to JSON.")}
    recipe = str(write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}))
    told: list[object] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        if "response_format" not in body:
            return said(f"lamp of room {body['seed']} on")
        told.append(body["response_format"]["json_schema"]["schema"]["properties"]["room"])
        return said('{"room": "room 1"}')

    assert command(recipe, teacher(reply), tmp_path / "new.jsonl", "--rows", "1", "--yes") == 0
    assert [row.prompt for row in read_rows(str(tmp_path / "new.jsonl"))] == ["lamp of room 1 on"]
    assert told[0] == {"description": "a text of the prompt, exactly as it is written there", "type": "string"}
    capsys.readouterr()
    command(recipe, teacher(reply), tmp_path / "more.jsonl", "--rows", "2", "--yes")
    assert "left out 3 answers that do not fit the task" in capsys.readouterr().err


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
        if number == 4:
            return 400, {}, b'{"error": {"message": "too long"}}'
        return said(json.dumps({"do": "off" if number == 3 and body["temperature"] else "on"}))

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, out = teacher(reply), tmp_path / "new.jsonl"
    assert command(recipe, url, out, "--yes") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": f"request {number}", "completion": {"do": "on"}} for number in (5, 6, 7, 8)
    ]
    err = capsys.readouterr().err
    for reason in (
        "prompts that are there already, or cannot be used",
        "answers that do not fit the task",
        "answers that disagree",
        "requests that the teacher refuses",
    ):
        assert f"left out 1 {reason}" in err
    assert {body["key"] for body in bodies} == {"Bearer secret"}
    assert "secret" not in err
    asked = len(bodies)
    assert command(recipe, url, out, "--yes") == 0
    assert len(bodies) == asked, "all rows are there"
    assert command(recipe, url, out, "--yes", "--rows", "6") == 0
    assert len(out.read_text().splitlines()) == 6
    for name in ("rows.jsonl", "recipe.yaml", "new.csv"):
        before = (tmp_path / "rows.jsonl").read_bytes()
        assert command(recipe, url, tmp_path / name, "--yes") == 2
        assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_prompts_are_asked_for_in_other_words_and_for_other_values_of_the_schema() -> None:
    schema = {"properties": {"do": {"enum": ["on", "off"]}, "thing": {"enum": ["lamp", "heater"]}}}
    rows = [
        {"prompt": f"turn it {state}, the lamp", "completion": {"do": state, "thing": "lamp"}}
        for state in ("on", "off")
    ]
    spec = AdapterSpec.model_validate({"data": {"train": "rows.jsonl"}, "system": "Home command to JSON."})
    read = rows_of("rows", [(f"row {number}", row) for number, row in enumerate(rows)])
    questions = Questions(read, spec, schema, (), seed=0)
    asked = [questions.for_prompt(number)[0]["content"] for number in range(40)]
    assert all("The task: Home command to JSON." in text for text in asked)
    fillings = [text.partition("whose right answer is: ")[2] for text in asked]
    assert any('"thing": "heater"' in text for text in fillings), "which no row has"
    paraphrases = [text for text in asked if "Write this request in other words that mean the same: turn it o" in text]
    assert len(paraphrases) >= 10 and sum(map(bool, fillings)) >= 10


def test_a_teacher_that_says_nothing_of_use_is_not_asked_on(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[Mapping[str, Any]] = []
    url = teacher(lambda body: (bodies.append(body), said(f"Sorry, I cannot help with {body['seed']}"))[1])
    out = tmp_path / "new.jsonl"
    out.write_text(f"{json.dumps(ORDERS[0])}\n")
    assert command(recipe, url, out, "--yes", "--rows", "300") == 8
    assert len(bodies) == 60
    err = capsys.readouterr().err
    assert "none of the last 20 prompts became a row: 20 answers that do not fit the task; the last: 'Sorry" in err
    assert [row.completion for row in read_rows(str(out))] == ['{"do": "on"}']


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, {}, b'{"error": {"message": "bad key"}}')], "refuses: HTTP 401: bad key; check --teacher"),
        ([(200, {}, b"<html>")], "answers '<html>'; give the address of OpenAI's chat API"),
        ([(302, {"Location": "http://127.0.0.1:1/"}, b"")], "refuses: HTTP 302"),
        ([(503, {"Retry-After": "0"}, b"")] * 5, "does not answer after 5 tries: HTTP 503"),
        ([(429, {"Retry-After": "0"}, b"")] * 5, "; lower --per-minute (now 100000), or wait until it answers"),
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
    heard: list[str] = []
    url = teacher(lambda _: replies.pop(0))
    asking = Teacher(url, "m", per_minute=100_000, most_requests=2, say=heard.append)
    assert asking.ask(asking.request([], temperature=0, seed=0)).text == "hello"
    (said_once,) = heard
    assert said_once.startswith("the teacher does not answer: HTTP 429: ") and said_once.endswith("(try 1 of 5)")
    with pytest.raises(TeacherError, match="2 requests are sent; allow more with --requests"):
        asking.ask({})


def test_one_that_answered_before_is_asked_again_after_what_is_no_answer(teacher: Callable[[Reply], str]) -> None:
    replies = [said("hello"), (200, {}, b"<html>502"), said("again")]
    heard: list[str] = []
    url = teacher(lambda _: replies.pop(0))
    asking = Teacher(url, "m", per_minute=100_000, say=heard.append)
    assert [asking.ask(asking.request([], temperature=0, seed=0)).text for _ in range(2)] == ["hello", "again"]
    assert heard == ["the teacher does not answer: it answers '<html>502' (try 1 of 5)"]


def test_one_that_knows_no_schema_and_writes_code_blocks_makes_rows(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path
) -> None:
    asked: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        asked.append(body)
        if "response_format" in body:
            return 400, {}, b'{"error": {"message": "response_format json_schema is unsupported"}}'
        is_answer = len(body["messages"]) > 1 or '"do"' not in str(body["messages"])
        return said('```json\n{"do": "on"}\n```' if is_answer else f"request {body['seed']}")

    out = tmp_path / "new.jsonl"
    assert command(recipe, teacher(reply), out, "--yes") == 0
    assert {row.completion for row in read_rows(str(out))} == {'{"do": "on"}'}
    assert sum("response_format" in body for body in asked) == 1


def test_the_limit_of_tokens_has_the_name_that_the_teacher_takes(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        bodies.append(body)
        if "max_tokens" in body:
            return 400, {}, b'{"error": {"message": "Unsupported parameter: \'max_tokens\'", "param": "max_tokens"}}'
        if "response_format" not in body:
            return said("", "length") if body["seed"] == 1 else said(f"request {body['seed']}")
        return said('{"do": "on"}', "length" if body["seed"] == 2 else "stop")

    url, out = teacher(reply), tmp_path / "new.jsonl"
    assert command(recipe, url, out, "--yes", "--max-tokens", "500") == 0
    assert len(out.read_text().splitlines()) == 4
    assert [body.get("max_tokens") for body in bodies] == [500] + [None] * (len(bodies) - 1)
    assert {body["max_completion_tokens"] for body in bodies[1:]} == {500}
    assert "left out 2 answers that are cut off (--max-tokens allows more)" in capsys.readouterr().err


def test_a_teacher_that_thinks_is_asked_without_what_it_refuses(teacher: Callable[[Reply], str]) -> None:
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        bodies.append(body)
        refused = next((key for key in ("temperature", "seed") if key in body), None)
        if refused is None:
            return said("hello")
        message = f"Unsupported value: '{refused}' does not support 0 with this model."
        return 400, {}, json.dumps({"error": {"message": message}}).encode()

    asking = Teacher(teacher(reply), "m", per_minute=100_000)
    for _ in range(2):
        assert asking.ask(asking.request([], temperature=0, seed=0)).text == "hello"
    sampling = [{"temperature", "seed"} & body.keys() for body in bodies]
    assert sampling == [{"temperature", "seed"}, {"seed"}, set(), set()]


def test_a_teacher_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "_LONGEST_WAIT_S", 0.0)
    asking = Teacher("http://127.0.0.1:1/v1", "m", per_minute=100_000)
    with pytest.raises(TeacherError, match="does not answer after 5 tries: Connection refused; start it"):
        asking.ask({})
    with pytest.raises(UsageError, match="'ftp://x' is not an address"):
        Teacher("ftp://x", "m")


def test_a_slow_teacher_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "_LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr(teachers, "_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asking = Teacher(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", per_minute=100_000)
        begin = time.monotonic()
        with pytest.raises(TeacherError, match="does not answer after 5 tries: timed out"):
            asking.ask({})
        assert time.monotonic() - begin < 5


def asking_for_requests(body: Mapping[str, Any]) -> bool:
    return "Answer with the request alone." in body["messages"][-1]["content"]


PARTS = [{"question": f"number {n}?", "room": f"room {n % 3}", "state": "on" if n % 2 else "off"} for n in range(12)]
TURNS = [
    [{"role": "system", "content": f"You are {who}."}, {"role": "user", "content": f"who {n}"}]
    for n, who in enumerate(["Ann", "Bob"] * 6)
]
FORMS = [
    ([{"text": f"say {n}", "label": "ab"[n % 2]} for n in range(12)], {}, "a", {"text": "new", "label": "a"}),
    # What is not learned has no form that matters.
    (
        [{"text": "note", "weight": 0}, *({"text": f"say {n}", "label": "ab"[n % 2]} for n in range(12))],
        {},
        "a",
        {"text": "new", "label": "a"},
    ),
    (
        [{"q": f"say {n}", "a": f"word {n}"} for n in range(12)],
        {"columns": {"prompt": "q", "completion": "a"}},
        "yes",
        {"q": "new", "a": "yes"},
    ),
    (
        [{"prompt": f"say {n}", "completion": {"word": f"word {n}"}} for n in range(12)],
        {},
        '{"word": "yes"}',
        {"prompt": "new", "completion": {"word": "yes"}},
    ),
    (
        PARTS,
        {"columns": {"prompt": "question", "completion": ["room", "state"]}},
        '{"room": "room 1", "state": "on"}',
        {"question": "new", "room": "room 1", "state": "on"},
    ),
    (
        [
            {"talk": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": f"it {n}"}]}
            for n in range(9)
        ],
        {"columns": {"messages": "talk"}},
        "yes",
        {"talk": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "yes"}]},
    ),
]


@pytest.mark.parametrize(("rows", "data", "answer", "made"), FORMS)
def test_new_rows_have_the_form_of_the_training_rows(
    rows: list[dict[str, Any]],
    data: dict[str, Any],
    answer: str,
    made: dict[str, Any],
    teacher: Callable[[Reply], str],
    tmp_path: Path,
) -> None:
    adapters = {"home": {"data": {"train": "rows.jsonl", **data}}}
    recipe = str(write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}))
    before = read_task("home", Recipe.from_file(Path(recipe)))
    url = teacher(lambda body: said(f"new {body['seed']}" if asking_for_requests(body) else answer))
    out = tmp_path / "new.jsonl"
    assert command(recipe, url, out, "--yes", "--rows", "2") == 0
    first = json.loads(out.read_text().splitlines()[0])
    assert json.dumps(first).replace("new 1", "new") == json.dumps(made)
    assert command(recipe, url, out, "--yes", "--rows", "3") == 0, "the rows are read again"
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(out.read_text())
    after = read_task("home", Recipe.from_file(Path(recipe)))
    assert (after.metric, after.labels) == (before.metric, before.labels)
    assert len(after.train) + len(after.validation) == len([row for row in rows if row.get("weight") != 0]) + 3


def test_test_rows_beside_the_training_rows_are_not_made_and_not_written_to(
    teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Test rows may lack answers.
    tests = [{"prompt": "lamp on"}, {"prompt": "new 1", "completion": {"do": "on"}}]
    data = {"home-train.jsonl": ORDERS, "home-test.jsonl": tests}
    recipe = str(write_recipe(tmp_path, "missing.gguf", {"home": adapter_of(train="home-train.jsonl")}, data=data))
    numbers = iter(range(1, 9))
    url = teacher(lambda body: said(f"new {next(numbers)}" if asking_for_requests(body) else '{"do": "on"}'))
    assert command(recipe, url, tmp_path / "new.jsonl", "--yes", "--rows", "2") == 0
    made = [json.loads(line)["prompt"] for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert made == ["new 2", "new 3"]
    assert command(recipe, url, tmp_path / "home-test.jsonl", "--yes") == 2
    assert "home-test.jsonl is a file that this command reads" in capsys.readouterr().err


def test_new_conversations_have_the_system_prompt_of_a_row(teacher: Callable[[Reply], str], tmp_path: Path) -> None:
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        bodies.append(body)
        return said(f"new {body['seed']}" if asking_for_requests(body) else "an answer")

    rows = [{"messages": [*turns, {"role": "assistant", "content": f"it is {n}"}]} for n, turns in enumerate(TURNS)]
    recipe = str(write_recipe(tmp_path, "missing.gguf", data={"rows.jsonl": rows}))
    out = tmp_path / "new.jsonl"
    assert command(recipe, teacher(reply), out, "--yes", "--rows", "8") == 0
    systems = [json.loads(line)["messages"][0]["content"] for line in out.read_text().splitlines()]
    assert set(systems) == {"You are Ann.", "You are Bob."}
    for system, wording, answering in zip(systems, bodies[::3], bodies[1::3], strict=True):
        assert f"The task: {system}" in wording["messages"][0]["content"]
        assert answering["messages"][0]["content"].startswith(system)


def test_the_teacher_is_told_all_labels_and_asked_for_the_rarest(
    teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"play {n}", "label": "music"} for n in range(40)]
    adapter = {
        "data": {"train": "rows.jsonl"},
        "labels": ["music", "timer"],
        "out_of_scope": {"label": "other"},
    }
    recipe = write_recipe(tmp_path, "missing.gguf", {"home": adapter}, data={"rows.jsonl": rows})
    task = read_task("home", Recipe.from_file(recipe))
    made = {row.prompt for row in task.train if row.completion == "other"}
    assert made
    bodies: list[Mapping[str, Any]] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        bodies.append(body)
        return said(f"new {body['seed']}" if asking_for_requests(body) else "timer")

    assert command(str(recipe), teacher(reply), tmp_path / "new.jsonl", "--yes", "--rows", "40") == 0
    for body in bodies:
        texts = [message["content"] for message in body["messages"]]
        assert '["music", "timer", "other"]' in texts[0]
        assert made.isdisjoint(line.removeprefix("- ") for text in texts for line in text.splitlines())
    wishes = [body["messages"][0]["content"].rpartition("answer is: ")[2].splitlines()[:1] for body in bodies[::3]]
    assert wishes.count(["timer"]) >= 15
    assert ["other"] not in wishes


def test_long_lists_of_labels_are_cut() -> None:
    labels = [f"label number {n}" for n in range(1000)]
    entries = [(f"row {n}", {"text": f"text {n}", "label": label}) for n, label in enumerate(labels)]
    spec = AdapterSpec.model_validate({"data": {"train": "rows.jsonl"}})
    content = Questions(rows_of("rows", entries), spec, None, labels, seed=0).for_prompt(1)[0]["content"]
    assert '"label number 0", "label number 1"' in content
    assert re.search(r'"\] and 7\d\d more\n', content) and len(content) < 5000


def test_choices_are_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = {"home": adapter_of(output={"choices": ["on", "off", "dim"]})}
    rows = [{"prompt": f"turn it on {n}", "completion": "on"} for n in range(9)]
    recipe = str(write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}))
    assert command(recipe, "http://127.0.0.1:1/v1", tmp_path / "new.jsonl") == 0
    wording, answering = map(json.loads, capsys.readouterr().out.splitlines()[1:])
    assert '["on", "off", "dim"]' in wording["messages"][0]["content"]
    assert '["on", "off", "dim"]' in answering["messages"][0]["content"]


def test_a_key_is_stripped_and_never_shown(
    recipe: str,
    teacher: Callable[[Reply], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: list[str] = []
    replies = [(401, {}, b'{"error": {"message": "no such key: sk-secret-1"}}'), (200, {}, b"<p>Bearer sk-secret-1")]
    url = teacher(lambda body: (keys.append(body["key"]), replies.pop(0))[1])
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret-1\n")
    for said_instead in ("refuses: HTTP 401: no such key: …", "answers '<p>Bearer …'"):
        assert command(recipe, url, tmp_path / "new.jsonl", "--yes") == 8
        err = capsys.readouterr().err
        assert said_instead in err and "sk-secret-1" not in err
    assert keys == ["Bearer sk-secret-1"] * 2
    for wrong in ("sk-sec\nret", "sk-secr\u00e9t"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        assert command(recipe, url, tmp_path / "new.jsonl", "--yes") == 2
        err = capsys.readouterr().err
        assert "the key has characters that are not printable ASCII; copy it again" in err and "sk-sec" not in err


def test_a_file_without_a_last_line_end_is_continued_on_a_new_line(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path
) -> None:
    out = tmp_path / "new.jsonl"
    out.write_text(json.dumps(ORDERS[0]))
    url = teacher(lambda body: said('{"do": "on"}' if "response_format" in body else f"request {body['seed']}"))
    assert command(recipe, url, out, "--yes", "--rows", "2") == 0
    assert [row.completion for row in read_rows(str(out))] == ['{"do": "on"}'] * 2


def test_a_line_that_is_no_row_is_named_with_a_remedy(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.jsonl"
    written = f'{json.dumps(ORDERS[0])}\n{{"prompt": "turn\n'
    out.write_text(written)
    assert command(recipe, "http://127.0.0.1:1/v1", out, "--yes") == 2
    err = capsys.readouterr().err
    assert f"{out}:2: not JSON" in err and "; complete or delete that line, or give another --out" in err
    assert out.read_text() == written


@pytest.mark.parametrize("small_disk", ["16k"], indirect=True)
def test_a_run_goes_on_after_a_full_disk_and_after_a_kill(
    recipe: str, teacher: Callable[[Reply], str], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = teacher(lambda body: said('{"do": "on"}' if "response_format" in body else f"{body['seed']:0200}"))
    out, other = small_disk / "new.jsonl", small_disk / "other"
    other.write_bytes(b"x" * 12288)
    assert command(recipe, url, out, "--yes", "--rows", "20") == OutOfSpaceError.exit_code
    assert f"edgetune: no space left to write {out}; free some space and run" in capsys.readouterr().err
    text = out.read_text()
    assert text.endswith('"}}\n')
    other.unlink()
    out.write_text(text + '{"prompt": "turn')
    assert command(recipe, url, out, "--yes", "--rows", "20") == 0
    assert out.read_text().startswith(text) and len(read_rows(str(out))) == 20


def test_one_process_at_a_time_adds_rows_to_a_file(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.jsonl"
    with adding_to(out):
        assert command(recipe, "http://127.0.0.1:1/v1", out, "--yes") == 2
    assert f"another process is using {out}; wait until it has ended, or give another" in capsys.readouterr().err


def test_a_run_without_a_row_fails_and_one_with_some_says_how_many(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        useful = body["seed"] == 1 and answers
        return said('{"do": "on"}' if useful and "response_format" in body else f"Sorry {body['seed']}")

    url, out, answers = teacher(reply), tmp_path / "new.jsonl", False
    assert command(recipe, url, out, "--yes", "--requests", "9") == 8
    message = "none of the last 3 prompts became a row: 3 answers that do not fit the task; the last: 'Sorry 3' and"
    err = capsys.readouterr().err
    assert message in err and "or allow more with --requests" in err
    answers = True
    assert command(recipe, url, out, "--yes", "--requests", "9") == 0
    assert "1 of 4 rows are made with 9 requests; allow more with --requests" in capsys.readouterr().err


def test_a_request_that_is_sent_again_ends_no_run_with_an_error(
    teacher: Callable[[Reply], str], recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[int] = []

    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        sent.append(body["seed"])
        if len(sent) == 5:
            return 429, {"Retry-After": "0"}, b"{}"
        return said(f"new {body['seed']}" if asking_for_requests(body) else '{"do": "on"}')

    out = tmp_path / "new.jsonl"
    assert command(recipe, teacher(reply), out, "--yes", "--requests", "6") == 0
    assert "1 of 4 rows are made with 6 requests; allow more with --requests" in capsys.readouterr().err
    assert len(read_rows(str(out))) == 1


def test_thoughts_and_introductions_are_no_prompts_and_half_characters_no_rows(
    recipe: str, teacher: Callable[[Reply], str], tmp_path: Path
) -> None:
    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        number, half = body["seed"], "\ud800" if body["seed"] in (1, 3) else ""
        if number == 2 and "response_format" not in body:
            return said("<think>a lamp that is")
        if "response_format" in body:
            return said(json.dumps({"do": "on"}) + (half if number == 3 else ""))
        return said(f"<think>a lamp\nor two</think>Sure! Here is one:\n\nrequest {number}{half if number == 1 else ''}")

    url, out = teacher(reply), tmp_path / "new.jsonl"
    assert command(recipe, url, out, "--yes", "--rows", "2") == 0
    assert [row.prompt for row in read_rows(str(out))] == ["request 4", "request 5"]


@pytest.mark.parametrize(
    ("own", "said_of", "expected"),
    [
        ("turn on the lamp", '- "light the {}"', "light the {}"),
        ("turn on the lamp", "„Licht {}“", "Licht {}"),
        ("turn on the lamp", "1. « allume {} »", "allume {}"),
        ("turn on the lamp", "**「電気{}」**", "電気{}"),
        ("turn on the lamp", "24. {} 1. {}", "24. {} 1. {}"),
        ("turn on the lamp", "**light** {} *now*", "**light** {} *now*"),
        ("turn on the lamp", 'Translate "{}" into "French"', 'Translate "{}" into "French"'),
        ("turn on the lamp", '"{}" and "off"', '"{}" and "off"'),
        ("turn on the lamp", "Here it is:\nlamp {}\n\nIt is short.", "lamp {}"),
        ("turn on the lamp", "请求如下\uff1a\n把灯{}打开", "把灯{}打开"),
        ("Dear team,\nthe lamp", "Here it is:\n\nHello,\n\nlight {}\n- now", "Hello,\n\nlight {}\n- now"),
        ("Dear team,\nthe lamp", '"Hello,\nlight {}"', "Hello,\nlight {}"),
        ("Sum up:\nthe lamp", "Sum up:\nlight {}", "Sum up:\nlight {}"),
    ],
)
def test_new_prompts_are_whole(
    own: str, said_of: str, expected: str, teacher: Callable[[Reply], str], tmp_path: Path
) -> None:
    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        return said(
            json.dumps({"do": "on"}) if "response_format" in body else said_of.replace("{}", f"r{body['seed']}")
        )

    rows = [{"prompt": f"{own} {number}", "completion": {"do": "on"}} for number in range(9)]
    adapters = {"home": adapter_of(output={"schema": SCHEMA})}
    path, out = write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}), tmp_path / "new.jsonl"
    assert command(str(path), teacher(reply), out, "--yes", "--rows", "1") == 0
    assert [row.prompt for row in read_rows(str(out))] == [expected.replace("{}", "r1")]


def test_new_prompts_of_several_lines_that_are_cut_off_are_left_out(
    teacher: Callable[[Reply], str], tmp_path: Path
) -> None:
    def reply(body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        if "response_format" in body:
            return said('{"do": "on"}')
        return said(f"Hello,\nlight {body['seed']}", "length" if body["seed"] < 3 else "stop")

    rows = [{"prompt": f"Dear team,\nthe lamp {number}", "completion": {"do": "on"}} for number in range(9)]
    adapters = {"home": adapter_of(output={"schema": SCHEMA})}
    path, out = write_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}), tmp_path / "new.jsonl"
    assert command(str(path), teacher(reply), out, "--yes", "--rows", "1") == 0
    assert [row.prompt for row in read_rows(str(out))] == ["Hello,\nlight 3"]


def test_rows_with_tools_or_several_turns_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]} for n in range(9)]
    recipe = str(write_recipe(tmp_path, "missing.gguf", data={"rows.jsonl": rows}))
    assert command(recipe, "http://127.0.0.1:1/v1", tmp_path / "new.jsonl") == 2
    assert "has several turns or no prompt" in capsys.readouterr().err

from __future__ import annotations

import pytest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.chat_client import check_address, without_thought
from edgetune_runtime.inference.deferring import DeferError, DeferTo, ask
from ports import replying

REPLY = b'{"choices": [{"message": {"content": "on"}}]}'


def asked(to: DeferTo) -> str:
    return ask(to, [{"role": "user", "content": "turn it on"}], None, None, lambda: None)[0]


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/v1", "http://:80/v1", "ftp://host", "host"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address of a model; give one such as"):
        check_address(url)
    with pytest.raises(UsageError, match="is not an address of a model"):
        DeferTo(url, "big")


def test_a_key_is_sent_without_the_white_space_around_it() -> None:
    with replying((200, REPLY)) as (url, got):
        assert asked(DeferTo(f"{url}/v1", "big", key="sk-secret\n")) == "on"
    assert [request.headers["Authorization"] for request in got] == ["Bearer sk-secret"]


@pytest.mark.parametrize("key", ["sk-secret\nx", "sk-secret\u00e9", "sk-secret\x00x"])
def test_a_key_that_no_request_can_carry_is_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="the key has characters that are not printable ASCII") as error:
        DeferTo("http://127.0.0.1:1/v1", "big", key=key)
    assert "sk-secret" not in str(error.value)


def test_an_address_where_nothing_listens_is_one_clear_line() -> None:
    with pytest.raises(DeferError, match="failed: Connection refused;"):
        asked(DeferTo("http://127.0.0.1:1/v1", "big"))


def test_a_refusal_that_repeats_the_key_is_shown_without_it() -> None:
    with (
        replying((401, b'{"error": {"message": "the key sk-secret is wrong"}}')) as (url, _),
        pytest.raises(DeferError, match="failed: HTTP 401: the key … is wrong"),
    ):
        asked(DeferTo(f"{url}/v1", "big", key="sk-secret\n"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a lamp</think>\n\non", "\n\non"),
        ("a lamp</think>\non", "\non"),
        ('<think>a</think>{"a": 1}', '{"a": 1}'),
        ("<think>a lamp", ""),
        ('{"html": "a</think>b"}', '{"html": "a</think>b"}'),
        ("Use </think> to close it", "Use </think> to close it"),
    ],
)
def test_only_what_comes_before_an_answer_is_a_thought(text: str, answer: str) -> None:
    assert without_thought(text) == answer


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 1e12, 0])
def test_a_time_limit_of_more_than_an_hour_or_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(UsageError, match=r"timeout_s is .*; give seconds above 0, and at most 3600"):
        DeferTo("http://127.0.0.1:1/v1", "big", timeout_s=timeout_s)

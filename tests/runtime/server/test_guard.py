from __future__ import annotations

import socket

import pytest
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.server.settings import Access, ServerLimits
from runtime.server.conftest import Running, Start

KEY, OTHER = "a key of the test 123456", "another key of the test 7"
CHAT = {"model": "command", "messages": [{"role": "user", "content": "play"}], "max_tokens": 2}
ORIGIN = "https://app.example"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080", "192.168.1.7", socket.gethostname()])
def test_addresses_and_names_of_this_machine_are_hosts(host: str, server: Running) -> None:
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:8080", "localhost.attacker.example", ""])
def test_another_name_is_refused_as_it_may_be_rebound_to_this_machine(host: str, server: Running) -> None:
    response = server.client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 421
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "--allow-host" in response.json()["error"]["message"]


def test_a_name_can_be_allowed(start: Start) -> None:
    server = start(access=Access(hosts=("Board.example",)))
    assert server.client.get("/v1/models", headers={"Host": "board.example:80"}).status_code == 200


def test_a_machine_whose_name_has_a_domain_also_has_the_name_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Pi.home.arpa")
    for host in ("pi.home.arpa", "pi", "pi.local:8080"):
        assert Access().allows_host(host)
    assert not Access().allows_host("home.arpa")


def test_pages_of_other_origins_are_refused_and_get_no_cors_headers(server: Running) -> None:
    for path, method in (("/v1/chat/completions", "POST"), ("/api/tags", "GET"), ("/v1/models", "OPTIONS")):
        response = server.client.request(method, path, headers={"Origin": ORIGIN})
        assert response.status_code == 403
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert server.client.get("/api/tags", headers={"Origin": "null"}).status_code == 403


def test_the_servers_own_pages_may_use_it(server: Running) -> None:
    response = server.client.post("/v1/chat/completions", json=CHAT, headers={"Origin": server.url})
    assert response.status_code == 200


def test_an_allowed_origin_gets_cors_headers_and_may_send_a_key(start: Start) -> None:
    server = start(access=Access(keys=(KEY,), origins=(ORIGIN,)))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = server.client.options("/v1/chat/completions", headers={"Origin": ORIGIN, **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    for key, status in ((KEY, 200), (OTHER, 401)):
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        response = server.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["vary"] == "Origin"
    assert server.client.get("/v1/models", headers={"Origin": "https://app.example.attacker"}).status_code == 403


def test_an_allowed_origin_can_read_errors_and_the_servers_own_headers(start: Start) -> None:
    server = start(access=Access(origins=(ORIGIN,)), limits=ServerLimits(body_bytes=10_000))
    wrong: list[tuple[int, str, dict[str, object]]] = [
        (400, "/v1/chat/completions", {"top_p": 3}),
        (404, "/v1/chat/completions", {"model": "nowhere"}),
        (404, "/v1/nowhere", {}),
        (413, "/api/chat", {"more": "a" * 10_000}),
        (500, "/v1/chat/completions", {}),
    ]
    for status, path, more in wrong:
        if status == 500:
            loaded_bundle(server.runtime).call = None  # type: ignore[assignment, method-assign]  # breaks it
        response = server.client.post(path, json=CHAT | more, headers={"Origin": ORIGIN})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-expose-headers"] == "X-Edgetune-Confidence, X-Edgetune-Unsure"


def test_each_of_several_keys_is_accepted(start: Start) -> None:
    server = start(access=Access(keys=(KEY, OTHER)))
    for header in (f"Bearer {OTHER}", f"bearer  {OTHER}", f"Bearer {KEY}"):
        assert server.client.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_a_missing_or_wrong_key_is_refused_in_the_shape_of_each_api(start: Start) -> None:
    server = start(access=Access(keys=(KEY,)))
    for header in (None, "", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        replies = {
            path: server.client.get(path, headers=headers)
            for path in ("/v1/models", "/api/tags", "/metrics", "/nowhere")
        }
        for reply in replies.values():
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer"), header
        assert replies["/api/tags"].json()["error"].startswith("the API key is missing or wrong")
        error = replies["/v1/models"].json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        for path in ("/healthz", "/readyz", "/"):
            assert server.client.get(path, headers=headers).status_code == 200

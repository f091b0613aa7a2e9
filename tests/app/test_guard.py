"""Who may speak to the page's server: host, origin, token, kind and size of a body; the headers of every answer."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

from support.app_server import Client, refused

from sgg_fast.app.guard import MAX_JSON, Guard, read_body
from sgg_fast.app.server import make_app
from sgg_fast.app.studio import Studio


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/model"])
def test_a_foreign_host_or_origin_gets_nothing(client, path):
    assert refused(client.send("GET", path, Host="evil.example")) == 421
    assert refused(client.send("GET", path, Host=f"127.0.0.1.evil.example:{client.port}")) == 421
    assert refused(client.send("GET", path, Origin="http://evil.example")) == 403
    assert refused(client.send("GET", path, Origin="null")) == 403
    assert refused(client.send("GET", path, Origin=f"http://127.0.0.1:{client.port + 1}")) == 403
    assert client.send("GET", path, Host=f"localhost:{client.port}")[0] == 200
    assert client.send("GET", path, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_the_api_needs_the_token(client):
    reads = [("GET", "/api/model", None), ("GET", "/api/drawings/0", None), ("DELETE", "/api/drawings/0", None)]
    writes = [("POST", f"/api/{name}", {}) for name in ("graph", "file", "drawings")]
    for token in ("", "wrong", client.token + "x"):
        stranger = Client(client.host, client.port, token)
        assert [refused(stranger.send(*request)) for request in reads + writes] == [401] * 6


def test_a_body_without_end_is_cut_off(client):
    sent = []
    endless = (sent.append(0) or bytes(1 << 16) for _ in range(4_000))
    with contextlib.suppress(ConnectionError):
        assert refused(client.send("POST", "/api/graph", endless, Content_Type="application/json")) == 413
    assert len(sent) < 400
    assert client.send("GET", "/api/model")[0] == 200


def test_headers_of_every_answer_close_the_page(client):
    import http.client

    for path in ("/", "/main.js", "/api/model", "/nothing"):
        connection = http.client.HTTPConnection(client.host, client.port)
        connection.request("GET", path)
        answer = connection.getresponse()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["server"] is None
        connection.close()


def test_behind_a_proxy_the_public_name_is_known_and_no_token_asked():
    guard, name = make_app(Studio("toy"), None, "0.0.0.0", "me-space.hf.space"), "me-space.hf.space"
    assert guard.refusal("GET", "/api/model", {"host": name, "origin": f"https://{name}"})[0] == 0
    assert guard.refusal("GET", "/api/model", {"host": "other.hf.space"})[0] == 421
    assert b"https://huggingface.co" in dict(guard.headers)[b"content-security-policy"]


@pytest.mark.parametrize(
    ("host", "known"),
    [("10.0.0.7:7860", True), ("[2001:db8::7]:7860", True), ("10.0.0.7", True), ("evil.example:7860", False),
     ("10.0.0.7.evil.example", False), ("", False), ("localhost:x", False)],
)  # fmt: skip
def test_every_address_is_the_servers_where_it_listens_at_all_of_them(host, known):
    """An address is no name that DNS could lead here."""
    guards = [Guard(None, "token", listening) for listening in ("0.0.0.0", "127.0.0.1")]
    assert [guard.refusal("GET", "/", {"host": host})[0] for guard in guards] == [0 if known else 421, 421]


async def asked(guard: Guard, scope: dict, *messages: dict) -> list[dict]:
    """What the guard sends for a request of these messages."""
    arriving, sent = iter(messages), []

    async def receive() -> dict:
        return next(arriving)

    async def send(message: dict) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    return sent


def test_the_application_gets_the_whole_body_once_and_no_web_socket():
    seen = []

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.append((scope["type"], [await receive(), await receive()]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"public")]})

    guard, gone = Guard(app, None), {"type": "http.disconnect"}
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json; charset=utf-8")]
    scope = {"type": "http", "method": "POST", "path": "/api/graph", "headers": headers}
    parts = [{"type": "http.request", "body": part, "more_body": part == b"{"} for part in (b"{", b"}")]
    (start,) = asyncio.run(asked(guard, scope, *parts, gone))
    assert seen == [("http", [{"type": "http.request", "body": b"{}", "more_body": False}, gone])]
    assert dict(start["headers"])[b"cache-control"] == b"no-store" and len(start["headers"]) == len(guard.headers)
    assert asyncio.run(asked(guard, {**scope, "type": "websocket"})) == [] and len(seen) == 1
    too_long = [{"type": "http.request", "body": bytes(MAX_JSON + 1)}]
    start, body = asyncio.run(asked(guard, scope, *too_long))
    assert (start["status"], len(seen)) == (413, 1) and json.loads(body["body"])["error"] == "the body is over 64 KiB"
    assert (b"x-content-type-options", b"nosniff") in start["headers"]


@pytest.mark.parametrize(
    ("sizes", "found", "fits", "read"),
    [([3, 5], 8, True, 2), ([8], 8, True, 1), ([9], 0, False, 1), ([5, 5, 5], 0, False, 3), ([20] * 9, 0, False, 2)],
)
def test_a_body_is_read_to_its_bound_and_a_longer_one_to_four_times_that(sizes, found, fits, read):
    taken = []

    async def receive() -> dict:
        taken.append(sizes[len(taken)])
        return {"type": "http.request", "body": bytes(taken[-1]), "more_body": len(taken) < len(sizes)}

    body, whole = asyncio.run(read_body(receive, 8))
    assert (len(body), whole, len(taken)) == (found, fits, read)


def test_a_sender_that_leaves_ends_its_body():
    async def receive() -> dict:
        return {"type": "http.disconnect"}

    assert asyncio.run(read_body(receive, 8)) == (b"", True)

"""Checks every request to the page's server: an ASGI layer in front of all routes.

A request passes if its Host is expected, its origin is the page's own, it has the token and its body is within the
bound. Bodies are counted as they arrive, because a chunked body has no length.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON = 64 * 1024
"""Bytes of a JSON body."""
MAX_FILE = 8 * 1024 * 1024
"""Bytes of a dropped file."""
FILES = "/api/file"
"""The one address that takes a body other than JSON."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Answers 4xx to requests that must not pass; `app` gets the others, each with its whole body.

    token: value of `Authorization: Bearer` below /api/; None admits every request. host: the address it listens at.
    public: the host name under which a proxy serves the page ("" for none); Hugging Face may then frame it.
    """

    def __init__(self, app: ASGIApp, token: str | None, host: str = "127.0.0.1", public: str = "") -> None:
        self.app, self.token = app, token
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower(), public.lower()} - {""}
        ancestors = "https://huggingface.co" if public else "'none'"
        self.headers = [(k.encode(), v.format(ancestors=ancestors).encode()) for k, v in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a WebSocket gets no answer

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in self.headers}
                message["headers"] = [h for h in message["headers"] if h[0] not in own] + self.headers
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, reason = self.refusal(scope["method"], scope["path"], headers)
        body = b""
        if not status and scope["method"] == "POST":
            most = MAX_FILE if scope["path"] == FILES else MAX_JSON
            body, fits = await read_body(receive, most)
            if not fits:
                status, reason = 413, f"the body is over {most // 1024} KiB"
        if status:
            await answer(with_headers, status, reason)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, with_headers)

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        """(status, reason) of a request that must not pass; (0, "") of one that may."""
        if not self._known(headers.get("host", "")):
            return 421, "this server does not answer to that host name; open the address it printed"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower():
            return 403, "a page from elsewhere may not speak to this server"
        if not path.startswith("/api/"):
            return 0, ""
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.token is not None and not hmac.compare_digest(given.encode(), self.token.encode()):
            return 401, "the token is missing or old; open the address that the server printed"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = "application/octet-stream" if path == FILES else "application/json"
        if method == "POST" and kind != wanted:
            return 415, f"send {wanted}"
        return 0, ""

    def _known(self, header: str) -> bool:
        """Whether a Host header names this machine. By DNS another site's name can lead here, which must not pass."""
        name, _, port = header.lower().rpartition(":")
        name = (name if name and port.isdigit() else header.lower()).strip("[]")
        return name in self.hosts or ("0.0.0.0" in self.hosts and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(receive: Receive, most: int) -> tuple[bytes, bool]:
    """(body, whether it has at most `most` bytes).

    A longer body is read to four times the bound and dropped, so that its sender still reads the answer.
    """
    parts, total = [], 0
    while total <= 4 * most:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        part = message.get("body", b"")
        total += len(part)
        parts.append(part) if total <= most else parts.clear()
        if not message.get("more_body", False):
            break
    return b"".join(parts), total <= most


async def answer(send: Send, status: int, reason: str) -> None:
    """An error in JSON."""
    body = json.dumps({"error": reason}).encode()
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""The page's server as users start it, in a process of its own, and plain HTTP to it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support import ROOT

TOKEN = "a-token-of-the-tests"
SHEEP = {"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}


@dataclasses.dataclass
class Client:
    """Requests to one server; `token` may be ""."""

    host: str
    port: int
    token: str = TOKEN

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}/#token={self.token}"

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """(status, body). A dict is sent as JSON, bytes and iterables of bytes as they are (the latter chunked)."""
        given = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if isinstance(body, dict):
            body, given["Content-Type"] = json.dumps(body).encode(), "application/json"
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body=body, headers=given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        return json.loads(self.send(method, path, body, **headers)[1])

    def draw(self, graph: dict = SHEEP, page: str = "", maps: bool = False, **settings: Any) -> dict:
        """A drawing asked for, as the server answers."""
        asked = {"graph": graph, "settings": settings, "page": page, "maps": maps}
        status, body = self.send("POST", "/api/drawings", asked)
        assert status == 202, body
        return json.loads(body)

    def end(self, id: str, seconds: float = 600) -> dict:
        """How a drawing stands once it is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            at = self.json("GET", f"/api/drawings/{id}?wait=20")
            if at["state"] not in ("waiting", "drawing"):
                return at
        raise AssertionError(f"not over after {seconds} s: {at}")


class Process(Client):
    """`python -m sgg_fast.app` in a process of its own."""

    def __init__(self, port: int = 0, token: str | None = TOKEN, cwd: Path = ROOT) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment.pop("SGG_APP_TOKEN", None)
        if token is not None:
            environment["SGG_APP_TOKEN"] = token
        command = [sys.executable, "-m", "sgg_fast.app", "--model", "toy", "--port", str(port)]
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        parts = urlsplit(line.removeprefix("sgg-app: open ").strip())
        super().__init__(parts.hostname or "", parts.port or 0, parts.fragment.removeprefix("token="))

    def ready(self, seconds: float = 600) -> Process:
        """Once the model is there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server has ended"
            if self.json("GET", "/api/model")["state"] == "ready":
                return self
            time.sleep(0.3)
        raise AssertionError("the model is not there yet")

    def memory(self) -> int:
        """Bytes that are resident."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def process(**options: Any) -> Iterator[Process]:
    """A server that ends with the block."""
    server = Process(**options)
    try:
        yield server
    finally:
        server.kill()


def refused(answer: tuple[int, bytes]) -> int:
    """The status of a 4xx, which says why."""
    status, body = answer
    assert 400 <= status < 500 and json.loads(body)["error"]
    return status

"""The routes of the page's server: files, model, graphs and drawings.

    GET    /                        the page (static files; everything below /api/ needs the token)
    GET    /api/model               {"state": "loading" | "ready" | "failed", words, defaults, ...}
    POST   /api/graph               {"text": "..."} or {"json": "..."} -> {"graph", "text", "notices"} or {"error"}
    POST   /api/file?name=a.png     a file's bytes -> {"graphs": [{"graph", "text", "settings"}], "notices"}
    POST   /api/drawings            {"graph", "settings", "page", "maps"} -> 202 {"id", "state", ...}
    GET    /api/drawings/ID         its state; ?wait=S waits up to S seconds for its end, ?seen=K for newer previews
    GET    /api/drawings/ID/N.png   picture N of a finished one, its record inside
    DELETE /api/drawings/ID         stop

A page polls during a drawing and holds no connection open, because a browser has six for one server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sgg_fast.app.guard import Guard
from sgg_fast.app.studio import MAX_PICTURES, SETTINGS, BusyError, Drawing, Studio

STATIC = Path(__file__).parent / "static"
MAX_SIDE = 1024
"""Largest resolution of a drawing, in pixels."""
LONGEST_WAIT = 30.0
"""Upper bound of ?wait=, in seconds."""
_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "num_images": (int,), "steps": (int,), "guidance": (int, float),
    "relation_guidance": (int, float), "scheduler": (str,), "size": (int,),
}  # fmt: skip


class RefusalError(Exception):
    """A request with a fault: (status, reason)."""


class Json(Response):
    """Compact JSON without NaN, which JSON does not have."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def make_app(studio: Studio, token: str | None, host: str = "127.0.0.1", public: str = "") -> Guard:
    """The ASGI application around a studio, which it starts and closes."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        studio.start()
        yield
        studio.close()

    routes = Routes(studio)
    table = [
        Route("/api/model", routes.model),
        Route("/api/graph", routes.graph, methods=["POST"]),
        Route("/api/file", routes.file, methods=["POST"]),
        Route("/api/drawings", routes.draw, methods=["POST"]),
        Route("/api/drawings/{id:str}", routes.follow, methods=["GET"]),
        Route("/api/drawings/{id:str}", routes.stop, methods=["DELETE"]),
        Route("/api/drawings/{id:str}/{number:int}.png", routes.picture, methods=["GET"]),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    errors: Any = {RefusalError: refused}
    return Guard(Starlette(routes=table, lifespan=lifespan, exception_handlers=errors), token, host, public)


async def refused(request: Request, error: Exception) -> Response:
    status, reason = error.args
    return Json({"error": reason}, status_code=status)


class Routes:
    """Handlers of a studio. Work that loads torch or reads a file runs in a thread, beside the event loop."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    async def model(self, request: Request) -> Response:
        return Json(self.studio.about())

    async def graph(self, request: Request) -> Response:
        """The graph of a text, or the reader's error; both are answers with status 200."""
        asked = body_of(await request.body(), {"text", "json"})
        if len(asked) != 1 or not all(isinstance(value, str) for value in asked.values()):
            raise RefusalError(422, 'send {"text": "..."} or {"json": "..."}')
        ((kind, text),) = asked.items()

        return await self._read("text_graph", kind, text)

    async def file(self, request: Request) -> Response:
        return await self._read("file_graphs", await request.body(), request.query_params.get("name", "file"))

    async def _read(self, reader: str, *given: Any) -> Response:
        """The answer of a function of `reading`, or its error."""

        def read() -> dict[str, Any]:
            self.studio.readable.wait()
            from sgg_fast.app import reading
            from sgg_fast.graph import SceneGraphError

            try:
                return getattr(reading, reader)(*given)
            except SceneGraphError as error:
                return {"error": str(error)}

        return Json(await run_in_threadpool(read))

    async def draw(self, request: Request) -> Response:
        asked = body_of(await request.body(), {"graph", "settings", "page", "maps"})
        page, maps = asked.get("page", ""), asked.get("maps", False)
        if not isinstance(page, str) or len(page) > 64 or not isinstance(maps, bool):
            raise RefusalError(422, "page must be a short string, maps true or false")
        settings = settings_of(asked.get("settings", {}))

        def submit() -> Drawing:
            self.studio.drawable.wait()
            from sgg_fast.app.reading import item_of
            from sgg_fast.drawing import Options

            return self.studio.submit(page, item_of(asked.get("graph")), Options(**settings), maps)

        try:
            drawing = await run_in_threadpool(submit)
        except BusyError as error:
            raise RefusalError(429, str(error)) from error
        except ValueError as error:
            raise RefusalError(422, str(error)) from error
        return Json(self.studio.progress(drawing, 0), status_code=202)

    async def follow(self, request: Request) -> Response:
        drawing = self._find(request)
        wait = number_of(request.query_params.get("wait", "0"), 0, LONGEST_WAIT)
        until = time.monotonic() + wait
        while not drawing.is_over and time.monotonic() < until:
            await asyncio.sleep(0.05)  # a blocked thread for each request would use them up
        seen = number_of(request.query_params.get("seen", "0"), 0, math.inf)
        return Json(self.studio.progress(drawing, int(min(seen, 1e6))))

    async def stop(self, request: Request) -> Response:
        drawing = self._find(request)
        self.studio.stop(drawing)
        return Json(self.studio.progress(drawing, 0))

    async def picture(self, request: Request) -> Response:
        drawing, number = self._find(request), request.path_params["number"]
        if number >= len(drawing.pictures):
            raise RefusalError(404, "no such picture")
        return Response(drawing.pictures[number], media_type="image/png")

    def _find(self, request: Request) -> Drawing:
        drawing = self.studio.find(request.path_params["id"])
        if drawing is None:
            raise RefusalError(404, "no such drawing; only the latest are kept")
        return drawing


def body_of(body: bytes, keys: set[str]) -> dict[str, Any]:
    """The JSON object of a request. Raises `RefusalError` for other keys."""
    try:
        asked = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, f"not usable JSON: {str(error)[:100]}") from error
    if not isinstance(asked, dict) or (strays := asked.keys() - keys):
        unknown = f", not {', '.join(sorted(strays))[:100]}" if isinstance(asked, dict) else ""
        raise RefusalError(422, f"send a JSON object with {', '.join(sorted(keys))}{unknown}")
    return asked


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def settings_of(given: Any) -> dict[str, Any]:
    """Settings by the names of `drawing.Options`, which checks ranges; types and the page's bounds are checked here."""
    if not isinstance(given, dict) or given.keys() - set(SETTINGS):
        raise RefusalError(422, f"settings must be an object with some of {', '.join(SETTINGS)}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            raise RefusalError(422, f"settings.{name} must be a {'word' if name == 'scheduler' else 'number'}")
    if given.get("num_images", 1) > MAX_PICTURES:
        raise RefusalError(422, f"at most {MAX_PICTURES} pictures at a time")
    if given.get("size", 8) > MAX_SIDE:
        raise RefusalError(422, f"at most {MAX_SIDE} pixels a side; infer.py draws larger ones")
    return dict(given)


def number_of(text: str, low: float, high: float) -> float:
    """A number of a query, clamped to its bounds."""
    try:
        value = float(text)
    except ValueError as error:
        raise RefusalError(422, f"not a number: {text[:20]}") from error
    return low if math.isnan(value) else max(low, min(value, high))

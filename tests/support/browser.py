"""A tab of a real Chromium on the page, driven by the gestures of people: mouse, keys, drops."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Locator, Request, expect

from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.graph import SceneGraph

PATIENCE = 300_000
"""Milliseconds that a drawing may take on a busy machine."""

_DROP = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.querySelector("#canvas").dispatchEvent(
      new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


class Tab:
    """A page that was opened. faults: patterns of console errors that the test provokes."""

    def __init__(self, context: BrowserContext, address: str, faults: tuple[str, ...] = ()) -> None:
        self.context, self.page, self.faults = context, context.new_page(), faults
        self.origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))
        self.errors: list[str] = []
        self.requests: list[Request] = []
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.goto(address)

    def problems(self) -> list[str]:
        """Requests to elsewhere, and errors that were not provoked."""
        foreign = [r.url for r in self.requests if not r.url.startswith((f"{self.origin}/", f"blob:{self.origin}/"))]
        return foreign + [e for e in self.errors if not any(re.search(fault, e) for fault in self.faults)]

    # What is there

    def id(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    @property
    def canvas(self) -> Locator:
        return self.id("canvas")

    @property
    def json(self) -> dict:
        return json.loads(self.id("json").input_value())

    @property
    def graph(self) -> SceneGraph:
        return parse_scene_graphs(self.json)[0]

    @property
    def focused(self) -> str:
        """The accessible name of what has the focus, or its id or tag."""
        return self.page.evaluate(
            "() => { const e = document.activeElement; return e.getAttribute('aria-label') ?? (e.id || e.tagName); }"
        )

    def node(self, label: str) -> Locator:
        """The object of that label."""
        return self.page.locator(f'.node[aria-label^="{label}, object"]')

    def edge(self, said: str) -> Locator:
        """The relation that says "sheep standing on grass"."""
        return self.page.locator(f'.edge[aria-label^="{said}, relation"]')

    def centre(self, item: Locator) -> tuple[float, float]:
        box = item.locator("rect").bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def spot(self, x: float, y: float) -> tuple[float, float]:
        """A point of the canvas, in shares of its width and height."""
        box = self.canvas.bounding_box()
        assert box is not None
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    # What people do

    def blank(self, steps: int = 4) -> Tab:
        """Nothing on the canvas, drawings of so many steps, the model's words known."""
        expect(self.id("model")).to_have_attribute("data-state", "ready", timeout=PATIENCE)
        self.id("steps").fill(str(steps))
        self.node("sheep").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Delete")
        expect(self.id("hint")).to_be_visible()
        return self

    def add(self, name: str, x: float, y: float) -> Locator:
        """An object by a double click at that point of the canvas."""
        self.page.mouse.dblclick(*self.spot(x, y))
        expect(self.id("combo-input")).to_be_focused()
        self.page.keyboard.type(name)
        self.page.keyboard.press("Enter")
        found = self.page.locator(".node:focus")
        expect(found).to_have_count(1)
        return found

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        self.page.mouse.move(*end)
        self.page.mouse.up()

    def pull(self, item: Locator, end: tuple[float, float]) -> None:
        """Drag from an object's port."""
        item.hover()
        box = item.locator(".port circle").last.bounding_box()
        assert box is not None
        self.drag((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), end)

    def connect(self, subject: Locator, obj: Locator, predicate: str) -> None:
        self.pull(subject, self.centre(obj))
        self.answer(predicate)

    def answer(self, text: str) -> None:
        """Into the field that floats over the canvas."""
        expect(self.id("combo-input")).to_be_focused()
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def draw(self) -> dict:
        """By Ctrl+Enter; the graph and settings that were posted, once the picture is there."""
        with self.page.expect_request(lambda r: r.url.endswith("/api/drawings") and r.method == "POST") as posted:
            self.page.keyboard.press("Control+Enter")
        expect(self.id("status")).to_contain_text("Drawn in", timeout=PATIENCE)
        return posted.value.post_data_json

    def download(self, button: str) -> bytes:
        self.id("download").click()
        with self.page.expect_download() as found:
            self.id(button).click()
        return Path(found.value.path()).read_bytes()

    def drop(self, name: str, data: bytes, kind: str = "") -> None:
        """A file from the desktop; Playwright has no gesture for it, so the browser's own events are sent."""
        self.page.evaluate(_DROP, [name, kind, base64.b64encode(data).decode()])

    def axe(self, source: str) -> list[Any]:
        """Violations that axe-core finds, a line each."""
        self.page.evaluate(source)
        found = self.page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
        return [
            f"{v['id']}: {node['target']} {node['failureSummary']}" for v in found["violations"] for node in v["nodes"]
        ]

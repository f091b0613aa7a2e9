"""Fixtures of the page: its server, within the tests' process and as users start it, and a real Chromium."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from support.app_server import TOKEN, Client, Process, process

if TYPE_CHECKING:
    from support.browser import Tab


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A server in a thread of this process, its model loaded."""
    from sgg_fast.app.__main__ import listen, make_server
    from sgg_fast.app.server import make_app
    from sgg_fast.app.studio import Studio

    studio, listener = Studio("toy"), listen("127.0.0.1", 0)
    server = make_server(make_app(studio, TOKEN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert studio.ready.wait(120) and not studio.failure, studio.failure
    yield Client("127.0.0.1", listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def server() -> Iterator[Process]:
    """`python -m sgg_fast.app`, its model loaded."""
    with process() as started:
        yield started.ready()


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's Chromium by Playwright. A missing one is a failure: who gives --browser wants these tests to run."""
    from playwright.sync_api import expect, sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "no Chromium: apt-get install -y --no-install-recommends chromium"
    expect.set_options(timeout=60_000)  # states are awaited; a busy machine takes long
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tabs(chromium, server) -> Iterator:
    """Opens pages of the server; at the end no one has spoken to another address or written an error to the console."""
    from support.browser import Tab

    opened: list[Tab] = []

    def open_tab(*, address: str = "", faults: tuple[str, ...] = (), context=None, **options) -> Tab:
        own = context or chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        tab = Tab(own, address or server.address, faults)
        opened.append(tab)
        return tab

    yield open_tab
    problems = [problem for tab in opened for problem in tab.problems()]
    for context in {tab.context for tab in opened}:
        context.close()
    assert problems == []


@pytest.fixture
def tab(tabs) -> Tab:
    """One page, its canvas empty and its drawings four steps long."""
    return tabs().blank()

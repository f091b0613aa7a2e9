"""The page keeps to itself, shows names as text, survives its server, and can be used by everyone."""

from __future__ import annotations

import re
from importlib import resources

import pytest

pytest.importorskip("playwright", reason="browser: playwright is not installed: pip install -e '.[browser]'")

from playwright.sync_api import expect
from support.app_server import process
from support.browser import PATIENCE

pytestmark = pytest.mark.browser
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js")


def test_an_inline_script_does_not_run(tabs):
    tab = tabs(faults=("Content Security Policy", "404"))
    for html in ("<script>window.ran = 1</script>", "<img src=x onerror='window.ran = 1'>"):
        tab.page.evaluate(
            """(html) => {
              const range = document.createRange();
              document.body.append(range.createContextualFragment(html));
            }""",
            html,
        )
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("() => window.ran") is None
    assert any("Content Security Policy" in error for error in tab.errors), "the policy is what stopped it"


def test_a_name_is_text_everywhere(tab):
    name = "<img src=x onerror=window.ran=1>"
    tab.add(name, 0.4, 0.4)
    tab.add("</script><b>grass", 0.6, 0.7)
    tab.connect(tab.page.locator(".node").first, tab.page.locator(".node").last, "<i>on")
    assert tab.json["objects"] == [name, "</script><b>grass"]
    expect(tab.id("text")).to_have_value(re.compile("<img"))
    tab.id("steps").fill("1")
    tab.draw()
    tab.page.locator(".node").first.hover()
    assert tab.page.locator("main b, main i, img[src=x]").count() == 0
    assert tab.page.evaluate("() => window.ran") is None
    assert name in tab.download("save-json").decode()
    assert "<img" not in tab.download("save-svg").decode()


def test_a_dead_server_is_reported_and_the_graph_outlives_it(tabs):
    with process() as server:
        port = server.ready().port
        tab = tabs(address=server.address, faults=(r"ERR_(CONNECTION|EMPTY_RESPONSE|ABORTED)", "401"))
        expect(tab.id("model")).to_have_attribute("data-state", "ready")
        tab.id("text").fill("boat on sea")
        expect(tab.node("boat")).to_be_visible()
        tab.id("text").blur()
        kept = tab.json
        server.kill()
        expect(tab.id("banner")).to_contain_text("The server has stopped", timeout=5_000)
        tab.add("sun", 0.7, 0.2)
        kept = {**kept, "objects": [*kept["objects"], "sun"]}
        assert tab.json == kept, "the canvas works on without it"
    with process(port=port) as server:
        server.ready()
        tab.page.reload()
        expect(tab.id("banner")).to_be_hidden()
        assert tab.json == kept
        expect(tab.id("model")).to_have_attribute("data-state", "ready", timeout=PATIENCE)
    with process(port=port, token="another") as server:
        expect(tab.id("banner")).to_contain_text("address that the server printed", timeout=60_000)
        tab.page.evaluate("(address) => { location.href = address; }", server.address)
        expect(tab.id("banner")).to_be_hidden(timeout=60_000)
        assert tab.json == kept


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_axe_finds_no_violation(tabs, width, scheme):
    tab = tabs(viewport={"width": width, "height": 844}, color_scheme=scheme)
    source = AXE.read_text(encoding="utf-8")
    expect(tab.id("model")).to_have_attribute("data-state", "ready")
    assert tab.axe(source) == []
    tab.id("steps").fill("2")
    tab.draw()
    tab.id("seed").fill("0")
    tab.node("sheep").click()
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.type("zeb")
    assert tab.axe(source) == [], "a field with suggestions is open"
    tab.page.keyboard.press("Enter")
    tab.draw()
    expect(tab.id("picture-compare")).to_be_visible()
    tab.page.get_by_text("More settings").click()
    tab.page.get_by_text("JSON", exact=True).click()
    tab.id("json").fill("{")
    expect(tab.id("json-error")).to_be_visible()
    assert tab.axe(source) == []
    tab.id("examples").click()
    assert tab.axe(source) == []
    tab.page.keyboard.press("Escape")
    tab.id("help").click()
    assert tab.axe(source) == []


def test_a_narrow_page_has_nothing_beside_it(tabs):
    tab = tabs(viewport={"width": 390, "height": 844})
    expect(tab.id("model")).to_have_attribute("data-state", "ready")
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") == 390
    tab.node("sheep").click()
    expect(tab.id("inspector")).to_be_visible()
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") == 390
    for name in ("draw", "stop", "add", "fit", "help"):
        expect(tab.id(name)).to_be_in_viewport()


def test_the_theme_is_chosen_and_stays(tab):
    shade = "() => getComputedStyle(document.body).backgroundColor"
    light = tab.page.evaluate(shade)
    tab.id("theme").click()
    tab.id("theme").click()
    assert tab.page.evaluate(shade) != light
    tab.page.reload()
    assert tab.page.evaluate(shade) != light

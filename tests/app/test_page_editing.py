"""The canvas by real gestures in Chromium: what is drawn with hand or keys is the graph that the readers would read."""

from __future__ import annotations

import json
import re
import time

import pytest

pytest.importorskip("playwright", reason="browser: playwright is not installed: pip install -e '.[browser]'")

from playwright.sync_api import expect
from support.browser import PATIENCE, Tab

from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.graph import SceneGraph, SceneGraphError

pytestmark = pytest.mark.browser
MEADOW = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


def meadow(tab: Tab) -> None:
    sheep, grass = tab.add("sheep", 0.3, 0.3), tab.add("grass", 0.4, 0.7)
    tab.connect(tab.node("sheep"), tab.node("grass"), "standing on")
    assert sheep and grass and tab.graph == MEADOW


def test_add_connect_and_rename_post_the_graph_meant(tab):
    meadow(tab)
    tab.node("sheep").dblclick()
    tab.answer("horse")
    posted = tab.draw()
    (graph,) = parse_scene_graphs(posted["graph"])
    assert graph == SceneGraph(("horse", "grass"), ((0, "standing on", 1),))
    assert posted["settings"]["steps"] == 4


def test_dragging_from_a_port_into_the_empty_adds_a_connected_object(tab):
    tab.add("person", 0.3, 0.5)
    tab.pull(tab.node("person"), tab.spot(0.6, 0.3))
    tab.answer("kite")
    tab.answer("holding")
    assert tab.graph == SceneGraph(("person", "kite"), ((0, "holding", 1),))
    expect(tab.edge("person holding kite")).to_be_focused()
    tab.page.keyboard.press("Control+z")
    assert tab.json["objects"] == ["person"], "both came in one step"


def test_undo_and_redo_go_through_the_same_graphs(tab):
    page, key = tab.page, tab.page.keyboard.press
    before = []

    def step(action) -> None:
        before.append(tab.id("json").input_value())
        action()

    step(lambda: tab.add("sheep", 0.3, 0.3))
    step(lambda: tab.add("grass", 0.4, 0.7))
    step(lambda: tab.connect(tab.node("sheep"), tab.node("grass"), "standing on"))
    step(lambda: tab.node("sheep").click() or key("Control+d"))
    step(lambda: tab.drag(tab.centre(tab.node("grass")), tab.spot(0.6, 0.8)))
    step(lambda: tab.node("sheep#1").click() or key("Enter") or page.keyboard.type("dog") or key("Enter"))
    step(lambda: key("Delete"))
    last, last_places = tab.id("json").input_value(), tab.page.locator(".node").all_inner_texts()
    for wanted in reversed(before):
        key("Control+z")
        assert tab.id("json").input_value() == wanted
    for wanted in [*before[1:], last]:
        key("Control+y")
        assert tab.id("json").input_value() == wanted
    assert tab.page.locator(".node").all_inner_texts() == last_places


def test_a_drag_ends_under_the_pointer_at_any_zoom(tab):
    tab.add("sheep", 0.3, 0.3)
    tab.id("zoom-in").click()
    expect(tab.id("zoom")).to_have_text("110 %")
    end = tab.spot(0.62, 0.71)
    tab.drag(tab.centre(tab.node("sheep")), end)
    x, y = tab.centre(tab.node("sheep"))
    assert abs(x - end[0]) <= 2 and abs(y - end[1]) <= 2
    assert tab.json["objects"] == ["sheep"]


def test_everything_by_keyboard_alone(tabs):
    tab = tabs()
    key, write = tab.page.keyboard.press, tab.page.keyboard.type
    expect(tab.id("model")).to_have_attribute("data-state", "ready")
    key("Tab")
    for _ in range(40):
        if "option" in tab.page.evaluate("() => document.activeElement.getAttribute('role') ?? ''"):
            break
        key("Tab")
    key("Control+a")
    key("Delete")
    assert tab.json["objects"] == [] and tab.focused.startswith("Canvas")
    key("n")
    write("sheep")
    key("Enter")
    assert tab.focused == "sheep, object, 0 relations"
    key("c")
    write("gras")
    key("ArrowDown")
    key("Enter")
    write("stand")
    key("ArrowDown")
    key("Enter")
    assert tab.focused == "sheep standing on grass, relation" and tab.graph == MEADOW
    key("Control+Enter")
    expect(tab.id("step")).to_contain_text("Step", timeout=PATIENCE)
    key("Escape")
    expect(tab.id("status")).to_have_text("Stopped.", timeout=PATIENCE)
    assert tab.focused == "sheep standing on grass, relation", "drawing and stopping leave the focus where it was"
    key("Delete")
    assert tab.json == {"objects": ["sheep", "grass"], "relationships": []}
    key("Delete")
    assert tab.json["objects"] == ["sheep"] and tab.focused.startswith("sheep, object")
    key("Control+z")
    assert tab.json["objects"] == ["sheep", "grass"] and tab.focused.startswith("sheep")


def test_arrows_walk_and_shift_moves(tab):
    meadow(tab)
    key = tab.page.keyboard.press
    tab.node("sheep").click()
    for name in ("sheep standing on grass, relation", "grass, object, 1 relation"):
        key("ArrowDown")
        assert tab.focused == name
    x, y = tab.centre(tab.node("grass"))
    key("Shift+ArrowRight")
    assert tab.centre(tab.node("grass")) == pytest.approx((x + 20, y), abs=1)
    key("Space")
    expect(tab.node("grass")).to_have_attribute("aria-selected", "false")


def test_suggestions_put_the_beginning_first_and_flag_what_was_never_seen(tab):
    tab.page.mouse.dblclick(*tab.spot(0.4, 0.4))
    tab.page.keyboard.type("she")
    options = tab.id("combo-list").get_by_role("option")
    expect(options.first).to_have_text("sheep")
    assert options.all_inner_texts() == ["sheep", "black sheep", "white sheep"]
    expect(tab.id("combo-note")).to_be_empty()
    tab.page.keyboard.type("lob")
    expect(tab.id("combo-note")).to_contain_text("not among the model's words")
    tab.page.keyboard.press("Enter")
    assert tab.graph == SceneGraph(("shelob",))
    expect(tab.node("shelob")).to_have_class(re.compile("unseen"))
    assert "never saw in training" in (tab.node("shelob").get_attribute("aria-label") or "")
    expect(tab.add("sheep", 0.6, 0.6)).not_to_have_class(re.compile("unseen"))


def test_copy_paste_marquee_and_delete_take_relations_along(tab):
    meadow(tab)
    key = tab.page.keyboard.press
    tab.drag(tab.spot(0.1, 0.15), tab.spot(0.7, 0.9))
    expect(tab.page.locator('.node[aria-selected="true"]')).to_have_count(2)
    key("Control+c")
    key("Control+v")
    assert tab.graph == SceneGraph(("sheep", "grass") * 2, ((0, "standing on", 1), (2, "standing on", 3)))
    expect(tab.page.locator('.node[aria-selected="true"]')).to_have_count(2)
    key("Delete")
    assert tab.graph == MEADOW
    tab.node("sheep").click()
    tab.node("grass").click(modifiers=["Shift"])
    expect(tab.page.locator('.node[aria-selected="true"]')).to_have_count(2)


def test_words_and_json_follow_each_other_and_errors_are_the_readers(tab):
    meadow(tab)
    expect(tab.id("text")).to_have_value("sheep (standing on) grass")
    place = tab.centre(tab.node("grass"))
    tab.id("text").fill("dog standing on grass; sky above grass")
    expect(tab.node("sky")).to_be_visible()
    assert tab.graph == SceneGraph(("dog", "grass", "sky"), ((0, "standing on", 1), (2, "above", 1)))
    assert tab.centre(tab.node("grass")) == pytest.approx(place, abs=1), "what was there stays where it was"
    tab.id("text").fill("dog standing on")
    expect(tab.id("text-error")).to_have_text("text: 'dog standing on': an object is missing beside 'standing on'")
    tab.page.get_by_text("JSON", exact=True).click()
    broken = {"objects": ["cow", "grass"], "relationships": [[0, "on", 7]]}
    tab.id("json").fill(json.dumps(broken))
    with pytest.raises(SceneGraphError) as caught:
        parse_scene_graphs(broken, "JSON")
    expect(tab.id("json-error")).to_have_text(str(caught.value))
    tab.id("json").fill('{"objects": ["cow"], ')
    expect(tab.id("json-error")).to_contain_text("not JSON")
    tab.id("json").fill('{"objects": ["cow"]}')
    expect(tab.id("text")).to_have_value("cow")
    expect(tab.id("json-error")).to_be_hidden()
    expect(tab.id("text-error")).to_be_hidden()


def test_a_name_that_the_readers_refuse_is_marked_where_it_is(tab):
    tab.add("__in_image__", 0.4, 0.4)
    expect(tab.id("graph-error")).to_have_text(
        "JSON: objects[0]: '__in_image__' is added by the model itself; leave it out"
    )
    expect(tab.node("__in_image__")).to_have_class(re.compile("bad"))
    tab.page.keyboard.press("Control+z")
    expect(tab.id("graph-error")).to_be_hidden()


def test_attributes_go_in_front_and_a_relation_turns_round(tab):
    meadow(tab)
    tab.node("sheep").click()
    tab.id("attributes").get_by_role("button", name="white").click()
    assert tab.json["objects"][0] == "white sheep"
    expect(tab.id("attributes").get_by_role("button", name="white")).to_have_attribute("aria-pressed", "true")
    tab.id("attributes").get_by_role("button", name="white").click()
    assert tab.graph == MEADOW
    tab.edge("sheep standing on grass").click()
    tab.id("reverse").click()
    assert tab.json["relationships"] == [[1, "standing on", 0]]


def test_arrange_fit_pan_and_zoom_leave_the_graph_alone(tab):
    meadow(tab)
    before = tab.json
    tab.page.mouse.move(*tab.spot(0.5, 0.5))
    tab.page.keyboard.down("Control")
    tab.page.mouse.wheel(0, -240)
    tab.page.keyboard.up("Control")
    expect(tab.id("zoom")).not_to_have_text("100 %")
    x, y = tab.centre(tab.node("sheep"))
    tab.page.keyboard.down("Space")
    tab.drag(tab.spot(0.8, 0.2), tab.spot(0.7, 0.3))
    tab.page.keyboard.up("Space")
    assert tab.centre(tab.node("sheep")) != pytest.approx((x, y), abs=5)
    tab.id("arrange").click()
    sheep, grass = tab.centre(tab.node("sheep")), tab.centre(tab.node("grass"))
    assert sheep[1] < grass[1] - 40, "what stands on something stands above it"
    assert tab.json == before


def test_touch_adds_moves_and_pinches(tabs):
    tab = tabs(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    expect(tab.id("model")).to_have_attribute("data-state", "ready")
    session = tab.context.new_cdp_session(tab.page)

    def touch(kind: str, *points: tuple[float, float], **when: float) -> None:
        touches = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches, **when})

    x, y = tab.centre(tab.node("grass"))
    touch("touchStart", (x, y))
    for share in (0.5, 1.0):
        touch("touchMove", (x + 40 * share, y + 60 * share))
    touch("touchEnd")
    assert tab.centre(tab.node("grass")) == pytest.approx((x + 40, y + 60), abs=2)
    tab.page.touchscreen.tap(*tab.spot(0.06, 0.5))
    expect(tab.id("inspector")).to_be_hidden()
    a, b = tab.spot(0.3, 0.85), tab.spot(0.6, 0.85)
    touch("touchStart", a, b)
    touch("touchMove", a, (b[0] + 60, b[1]))
    touch("touchEnd")
    assert tab.id("zoom").text_content() != "100 %"
    under = "([x, y]) => document.elementFromPoint(x, y).id"
    spots = [tab.spot(x, y) for y in (0.3, 0.5, 0.7) for x in (0.1, 0.5, 0.9)]
    empty = next(spot for spot in spots if tab.page.evaluate(under, list(spot)) == "background")
    began = time.time()
    for after in (0, 0.2):  # seconds between the taps by the events' own clock, however busy the machine is
        touch("touchStart", empty, timestamp=began + after)
        touch("touchEnd", timestamp=began + after + 0.05)
    tab.answer("sun")
    assert "sun" in tab.json["objects"]

"""Drawing from the page in Chromium: progress, previews, stop, many requests and pages, before and after, attention."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("playwright", reason="browser: playwright is not installed: pip install -e '.[browser]'")

from playwright.sync_api import expect
from support.app_server import SHEEP
from support.browser import PATIENCE, Tab
from support.painted import by_infer, record_of

pytestmark = pytest.mark.browser


def words(tab: Tab, text: str) -> None:
    """A graph typed into the line of words."""
    tab.id("text").fill(text)
    expect(tab.page.locator(".node").first).to_be_visible()
    tab.id("text").blur()


def shown(tab: Tab) -> bytes:
    """The PNG of the picture in sight."""
    return tab.download("save-png")


def source(tab: Tab, image: str = "picture-now") -> str:
    """The address of an image of the page, which is new for each picture."""
    return tab.id(image).get_attribute("src") or ""


def test_a_picture_is_infers_to_the_byte_and_carries_what_was_asked(tab, tmp_path):
    words(tab, "sheep standing on grass")
    tab.id("seed").fill("5")
    tab.id("steps").fill("12")
    tab.canvas.focus()
    tab.page.keyboard.press("Control+Enter")
    expect(tab.id("step")).to_contain_text("Step", timeout=PATIENCE)
    expect(tab.id("picture-preview")).to_be_visible(timeout=PATIENCE)
    expect(tab.id("status")).to_contain_text("Drawn in", timeout=PATIENCE)
    data = shown(tab)
    record = record_of(data)
    assert record["graph"] == SHEEP == tab.json
    assert (record["seed"], record["steps"], record["model"]) == (5, 12, "toy")
    assert [data] == by_infer(tmp_path, SHEEP, seed=5, steps=12)


def test_stop_ends_within_two_steps_and_the_page_draws_again(tab, server):
    words(tab, "sheep standing on grass")
    tab.id("steps").fill("300")
    tab.page.keyboard.press("Control+Enter")
    expect(tab.id("step")).to_contain_text("Step", timeout=PATIENCE)
    with tab.page.expect_response(lambda answer: answer.request.method == "DELETE") as stopped:
        tab.id("stop").click()
    at_stop = stopped.value.json()
    expect(tab.id("status")).to_have_text("Stopped.", timeout=PATIENCE)
    at = server.end(at_stop["id"])
    assert at["state"] == "stopped" and at["step"] - at_stop["step"] <= 2
    tab.id("steps").fill("2")
    tab.draw()
    expect(tab.page.locator("#history button")).to_have_count(1)


def test_of_thirty_rapid_draws_the_newest_wins(tab):
    words(tab, "sheep standing on grass")
    tab.id("steps").fill("3")
    for seed in range(30):
        tab.id("seed").evaluate("(field, seed) => { field.value = seed; }", seed)
        tab.page.keyboard.press("Control+Enter")
    expect(tab.id("picture-now")).to_have_attribute("alt", "Picture of: sheep standing on grass (seed 29)",
                                                    timeout=PATIENCE)  # fmt: skip
    expect(tab.id("stop")).to_have_attribute("aria-disabled", "true")
    assert record_of(shown(tab))["seed"] == 29


def test_seven_pages_of_one_browser_all_get_their_picture(tabs, chromium):
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    pages = [tabs(context=context) for _ in range(7)]
    for seed, tab in enumerate(pages):
        expect(tab.id("model")).to_have_attribute("data-state", "ready", timeout=PATIENCE)
        tab.id("steps").fill("6")
        tab.id("seed").fill(str(seed))
    for tab in pages:
        tab.page.keyboard.press("Control+Enter")
    for seed, tab in enumerate(pages):
        expect(tab.id("status")).to_contain_text("Drawn in", timeout=PATIENCE)
        assert record_of(shown(tab))["seed"] == seed


def test_one_change_shows_as_one_change_before_and_after(tab):
    words(tab, "sheep standing on grass")
    tab.draw()
    before, first = shown(tab), source(tab)
    expect(tab.id("picture-compare")).to_be_hidden()
    tab.node("sheep").dblclick()
    tab.answer("horse")
    tab.draw()
    after = shown(tab)
    assert record_of(after)["seed"] == record_of(before)["seed"] and after != before
    expect(tab.id("picture-compare")).to_be_visible()
    assert source(tab, "picture-before") == first
    expect(tab.id("picture-changes")).to_have_text("sheep → horse")
    clip = "(e) => getComputedStyle(e).clipPath"
    assert tab.id("picture-before").evaluate(clip).startswith("inset(0px 100%")
    at_start = tab.page.locator(".frame").screenshot()
    tab.id("picture-slider").focus()
    tab.page.keyboard.press("End")
    assert tab.id("picture-before").evaluate(clip) in ("inset(0px)", "inset(0px 0% 0px 0px)")
    assert tab.page.locator(".frame").screenshot() != at_start, "the earlier picture covers the later one"
    box = tab.page.locator(".frame").bounding_box()
    assert box is not None
    tab.drag((box["x"] + 10, box["y"] + 50), (box["x"] + box["width"] / 2, box["y"] + 50))
    expect(tab.id("picture-slider")).to_have_value("50")
    tab.page.locator("#history button").last.click()
    assert tab.json == SHEEP and source(tab) == first, "an entry brings its graph and picture back"


def test_pointing_at_an_item_shows_where_it_had_the_attention(tab):
    words(tab, "sheep standing on grass; sky above grass")
    tab.draw()
    expect(tab.id("picture-heat")).to_be_hidden()
    painted = "(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
    heats = []
    for item in (tab.node("sheep"), tab.node("sky"), tab.edge("sheep standing on grass")):
        item.hover()
        expect(tab.id("picture-heat")).to_be_visible()
        heats.append(tuple(tab.id("picture-heat").evaluate(painted)))
    expect(tab.id("picture-caption")).to_contain_text("sheep standing on grass")
    assert len(set(heats)) == 3 and all(len(set(heat)) > 8 for heat in heats)
    tab.page.mouse.move(*tab.spot(0.05, 0.9))
    expect(tab.id("picture-heat")).to_be_hidden()
    tab.node("sheep").click()
    tab.page.keyboard.press("a")
    tab.page.mouse.move(*tab.spot(0.05, 0.9))
    expect(tab.id("picture-heat")).to_be_visible()


def test_a_picture_dropped_brings_graph_and_settings_back(tab, tmp_path):
    graph = {"objects": ["person", "red hat"], "relationships": [[0, "wearing", 1]]}
    settings = {"seed": 11, "steps": 3, "guidance": 3.5, "relation_guidance": 1.0, "scheduler": "euler"}
    (picture,) = by_infer(tmp_path, graph, **settings)
    tab.drop("was.png", picture, "image/png")
    expect(tab.node("red hat")).to_be_visible()
    assert tab.json == graph
    for name, value in settings.items():
        found = tab.id(name).input_value()
        assert found == value if name == "scheduler" else float(found) == value
    tab.draw()
    assert shown(tab) == picture, "the same picture again"


def test_other_files_that_infer_reads_are_read(tab):
    vg = {"image_id": 1, "objects": [{"object_id": 5, "names": ["sheep"], "attributes": ["white"]},
                                     {"object_id": 6, "names": ["grass"]}],
          "relationships": [{"subject_id": 5, "predicate": "ON", "object_id": 6}]}  # fmt: skip
    tab.drop("vg.json", json.dumps([vg, {**vg, "image_id": 2}]).encode())
    tab.id("choices").get_by_role("button").first.click()
    assert tab.json == {"objects": ["white sheep", "grass"], "relationships": [[0, "on", 1]]}
    tab.drop("lines.txt", b"boat on sea\n")
    expect(tab.node("boat")).to_be_visible()
    tab.drop("note.json", b"[1, 2")
    expect(tab.id("status")).to_contain_text("note.json: not JSON")
    tab.drop("photo.png", b"\x89PNG\r\n\x1a\n nothing")
    expect(tab.id("status")).to_contain_text("no scene graph in this picture")
    with tab.page.expect_file_chooser() as chooser:
        tab.id("open").click()
    chooser.value.set_files({"name": "a.json", "mimeType": "application/json", "buffer": json.dumps(SHEEP).encode()})
    expect(tab.node("sheep")).to_be_visible()


def test_several_pictures_and_downloads(tab):
    words(tab, "sheep standing on grass")
    tab.id("num_images").fill("3")
    tab.id("steps").fill("2")
    tab.draw()
    expect(tab.page.locator("#pictures button")).to_have_count(3)
    tab.page.locator("#pictures button").nth(2).click()
    assert record_of(tab.download("save-png"))["seed"] == 2
    assert json.loads(tab.download("save-json")) == SHEEP
    drawing = tab.download("save-svg").decode()
    assert drawing.startswith("<svg") and "standing on" in drawing and "class=" not in drawing


@pytest.mark.parametrize(("name", "value", "label"), [("steps", "0", "Steps:"), ("size", "100", "Pixels a side:")])
def test_a_setting_out_of_bounds_is_named_and_in_focus(tab, name, value, label):
    words(tab, "sheep standing on grass")
    tab.page.get_by_text("More settings").click()
    tab.id(name).fill(value)
    tab.page.get_by_text("More settings").click()
    tab.id("draw").click()
    expect(tab.id("status")).to_contain_text(label)
    expect(tab.id(name)).to_be_focused()


def test_examples_are_there_to_begin_with(tab):
    tab.id("examples").click()
    tab.id("examples-menu").get_by_role("button", name="Rider in a red hat").click()
    assert tab.json["objects"] == ["sky", "grass", "horse", "person", "red hat"]
    expect(tab.page.locator(".unseen")).to_have_count(0)


def test_no_name_of_the_first_example_covers_another(tabs):
    tab = tabs()
    boxes = [rect.bounding_box() for rect in tab.page.locator(".node > rect, .edge > rect").all()]
    assert len(boxes) == 5
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert min(across, down) <= 1, f"{a} and {b}"

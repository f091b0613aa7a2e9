"""The queue behind the page: drawings that are replaced, stopped or fail, previews, and what is kept of them."""

from __future__ import annotations

import base64
import io
import threading
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

import torch
from PIL import Image
from support.app_server import SHEEP, refused
from support.painted import record_of

from sgg_fast.app.studio import KEPT, MAX_WAITING, BusyError, Drawing, Studio, jpeg, packed_maps
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.inputs import Item
from sgg_fast.drawing import Options

MEADOW = {"objects": ["sheep", "grass", "sky"], "relationships": [[0, "standing on", 1], [2, "above", 1]]}


def test_the_newest_of_a_page_wins_and_pages_let_each_other_be(client):
    first = client.draw(page="a", steps=500)
    other = client.draw(page="b", steps=2)
    second = client.draw(page="a", steps=400)
    newest = client.draw(page="a", steps=2)
    ends = [client.end(drawing["id"])["state"] for drawing in (first, second, newest, other)]
    assert ends == ["replaced", "replaced", "done", "done"]


def test_stop_ends_within_two_steps(client):
    id = client.draw(steps=900)["id"]
    while not (at := client.json("GET", f"/api/drawings/{id}"))["step"]:
        assert at["state"] in ("waiting", "drawing")
    at_stop = client.json("DELETE", f"/api/drawings/{id}")
    at = client.end(id)
    assert at["state"] == "stopped" and at["step"] - at_stop["step"] <= 2
    assert client.end(client.draw(steps=1)["id"])["state"] == "done"


def test_previews_come_and_the_line_has_an_end(client):
    running = client.draw(steps=600)
    waiting = [client.draw(steps=1) for _ in range(MAX_WAITING)]
    assert refused(client.send("POST", "/api/drawings", {"graph": SHEEP, "settings": {"steps": 1}})) == 429
    assert client.json("GET", f"/api/drawings/{waiting[2]['id']}")["ahead"] == 2
    while "preview" not in (at := client.json("GET", f"/api/drawings/{running['id']}")):
        assert at["state"] == "drawing"
    assert "preview" not in client.json("GET", f"/api/drawings/{running['id']}?seen={at['step'] + 500}")
    for drawing in [*waiting, running]:
        client.json("DELETE", f"/api/drawings/{drawing['id']}")
    assert client.end(running["id"])["state"] == "stopped"


def test_ten_clients_at_once_all_get_their_own(client):
    found = {}

    def one(seed: int) -> None:
        at = client.end(client.draw(page=f"page {seed}", seed=seed, steps=1)["id"])
        found[seed] = record_of(client.send("GET", f"/api/drawings/{at['id']}/0.png")[1])["seed"]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: seed for seed in range(10)}


def test_a_drawing_of_nan_fails_in_one_line_and_the_next_one_is_drawn():
    """An early preview may hold NaN and is left out; a last picture with NaN is the drawing's error."""
    studio, item = Studio("toy"), Item(parse_scene_graphs(MEADOW)[0], "g")
    studio.start()
    assert studio.ready.wait(120) and not studio.failure
    bias = studio.model.pipeline.vae.decoder.conv_out.bias
    whole, ends = bias.detach().clone(), []
    for value in (torch.nan, 0.0):
        with torch.no_grad():
            bias.copy_(whole + value)
        drawing = studio.submit("", item, Options(steps=2), False)
        while not drawing.is_over:
            time.sleep(0.02)
        ends.append((drawing.state, drawing.error, len(drawing.pictures)))
    studio.close()
    assert ends[0][::2] == ("failed", 0) and ends[1] == ("done", "", 1)
    assert ends[0][1].startswith("a picture ends in numbers that are not finite, and is not saved: decoder.conv_out")


def asked(studio: Studio, page: str = "") -> Drawing:
    """A drawing of one step, submitted."""
    return studio.submit(page, Item(parse_scene_graphs(SHEEP)[0], "g"), Options(steps=1), False)


def test_a_model_that_cannot_be_loaded_is_the_answer_to_every_request():
    studio = Studio("./nothing")
    assert studio.about() == {"state": "loading", "error": ""}
    studio.start()
    assert studio.ready.wait(60) and studio.readable.is_set() and studio.drawable.is_set()
    assert studio.about()["state"] == "failed" and "./nothing: no pipeline there" in studio.about()["error"]
    with pytest.raises(BusyError, match="no pipeline there"):
        asked(studio)


def test_the_line_before_the_model_is_there():
    """Nothing is drawn here: the studio is not started."""
    studio = Studio("toy")
    first, other, newest = asked(studio, "a"), asked(studio, "b"), asked(studio, "a")
    assert (first.state, other.state, newest.state) == ("replaced", "waiting", "waiting")
    assert [studio.progress(drawing, 0)["ahead"] for drawing in (other, newest)] == [0, 1]
    studio.stop(other)
    assert (other.state, other.is_over, studio.progress(newest, 0)["ahead"]) == ("stopped", True, 0)
    studio.stop(other)
    assert other.state == "stopped", "an end is final"
    for _ in range(MAX_WAITING - 1):
        asked(studio)
    with pytest.raises(BusyError, match=f"{MAX_WAITING} drawings wait already"):
        asked(studio, "c")
    assert asked(studio, "a").state == "waiting" and newest.state == "replaced", "it takes the place of its page's own"


def test_the_latest_ends_are_kept():
    studio = Studio("toy")
    over = [asked(studio) for _ in range(KEPT + 2)]
    for drawing in over:
        studio.stop(drawing)
    newest = asked(studio)
    assert [studio.find(drawing.id) for drawing in over] == [None, None, *over[2:]]
    assert studio.find(newest.id) is newest and studio.find("0") is None


def test_a_preview_is_a_small_jpeg():
    image = Image.open(io.BytesIO(base64.b64decode(jpeg(Image.new("RGB", (1024, 512), (200, 30, 30))))))
    assert (image.format, image.size) == ("JPEG", (512, 256))
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 8


def test_maps_are_bytes_of_each_items_own_range_and_its_share():
    maps = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    maps[1, 4] = 0.25  # an even map has no range
    packed = packed_maps(maps, [4, 1])
    assert (packed["height"], packed["width"]) == (3, 4)
    for picture in range(2):
        for place, token in enumerate((4, 1)):
            own = maps[picture, token].numpy()
            heat = np.frombuffer(base64.b64decode(packed["heat"][picture][place]), np.uint8).reshape(3, 4)
            span = own.max() - own.min()
            expected = (own - own.min()) / span * 255 if span else np.zeros((3, 4))
            assert np.abs(heat - expected).max() <= 0.51
            assert packed["share"][picture][place] == pytest.approx(own.mean(), abs=1e-4)


def test_words_and_defaults_are_the_models(client):
    about = client.json("GET", "/api/model")
    assert (about["state"], about["model"], about["explains"]) == ("ready", "toy", True)
    assert about["defaults"]["size"] == 64 and about["defaults"]["scheduler"] == about["schedulers"][0]
    assert "sheep" in about["words"]["objects"] and "standing on" in about["words"]["predicates"]
    at = client.end(client.draw(SHEEP, steps=1, maps=True)["id"])
    assert at["records"][0]["guidance"] == about["defaults"]["guidance"] and len(at["maps"]["heat"][0]) == 3

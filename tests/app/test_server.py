"""The routes of the page's server by plain HTTP: what they refuse, and that their pictures are infer.py's."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

from support.app_server import SHEEP, process, refused
from support.painted import by_infer, record_of

from sgg_fast.app.server import RefusalError, number_of

MEADOW = {"objects": ["sheep", "grass", "sky"], "relationships": [[0, "standing on", 1], [2, "above", 1]]}


def test_bodies_are_counted_and_must_be_json(client):
    big = {"text": "sheep; " * 12_000}
    assert refused(client.send("POST", "/api/graph", big)) == 413
    kind = {"Content_Type": "application/json"}
    chunks = (b'{"text": "' + b"a" * 5_000 if i == 0 else b"a" * 5_000 for i in range(40))
    assert refused(client.send("POST", "/api/graph", chunks, **kind)) == 413
    text = b'{"text": "sheep on grass"}'
    for other in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert refused(client.send("POST", "/api/graph", text, Content_Type=other)) == 415
    assert refused(client.send("POST", "/api/graph", b"[" * 60_000, **kind)) == 400
    assert refused(client.send("POST", "/api/graph", b'{"text": NaN}', **kind)) == 400
    assert refused(client.send("POST", "/api/graph", b"\xff\xfe", **kind)) == 400
    assert refused(client.send("POST", "/api/graph", b'["text"]', **kind)) == 422
    file = {"Content_Type": "application/octet-stream"}
    assert refused(client.send("POST", "/api/file?name=a.json", bytes(8 * 1024 * 1024 + 1), **file)) == 413
    assert client.send("POST", "/api/graph", iter([text[:9], text[9:]]), **kind)[0] == 200, "chunks within the bound"


@pytest.mark.parametrize(
    "path",
    ["/../../../etc/passwd", "/..%2f..%2f..%2fetc/passwd", "//etc/passwd", "/%2e%2e/server.py", "/static/../server.py",
     "/server.py", "/api/drawings/..%2f..%2fetc%2fpasswd", "/api/drawings/0/0.png"],
)  # fmt: skip
def test_no_path_of_the_machine_is_read(client, path):
    status, body = client.send("GET", path)
    assert status == 404 and b"root:" not in body and b"import" not in body
    name = {"Content_Type": "application/octet-stream"}
    answer = client.json("POST", "/api/file?name=/etc/passwd", b"[]", **name)
    assert answer == {"error": "passwd: the list of graphs is empty"}, "a name is a name, not a path"


@pytest.mark.parametrize(
    "change",
    [{"settings": {"steps": 0}}, {"settings": {"steps": "9"}}, {"settings": {"seed": -1}}, {"settings": {"seed": True}},
     {"settings": {"guidance": 0}}, {"settings": {"scheduler": "none"}}, {"settings": {"size": 60}},
     {"settings": {"size": 2048}}, {"settings": {"num_images": 9}}, {"settings": {"out": "/tmp/x"}}, {"settings": []},
     {"graph": {"objects": []}}, {"graph": None}, {"page": 7}, {"maps": 1}, {"more": 1}],
)  # fmt: skip
def test_a_request_that_cannot_be_followed_says_why(client, change):
    assert refused(client.send("POST", "/api/drawings", {"graph": SHEEP, "settings": {}, **change})) == 422


def test_pictures_are_infers_to_the_byte_whatever_was_drawn_before(client, tmp_path):
    other = {"seed": 3, "steps": 3, "scheduler": "euler-a", "guidance": 3.0, "relation_guidance": 1.0}
    for settings in ({"seed": 1, "steps": 3}, other, {"seed": 1, "steps": 3}):
        at = client.end(client.draw(MEADOW, maps=True, **settings)["id"])
        assert at["state"] == "done" and at["step"] >= 3
        status, data = client.send("GET", f"/api/drawings/{at['id']}/0.png")
        assert (status, [data]) == (200, by_infer(tmp_path, MEADOW, **settings))
        assert at["records"] == [record_of(data)] and at["records"][0]["graph"] == MEADOW
        heat = at["maps"]["heat"]
        assert len(heat) == 1 and len(heat[0]) == 5 and len(set(heat[0])) == 5


def test_several_pictures_are_those_of_one_command(client, tmp_path):
    at = client.end(client.draw(SHEEP, num_images=2, seed=4, steps=2)["id"])
    pictures = [client.send("GET", f"/api/drawings/{at['id']}/{i}.png")[1] for i in range(2)]
    assert pictures == by_infer(tmp_path, SHEEP, num_images=2, seed=4, steps=2)
    assert client.send("GET", f"/api/drawings/{at['id']}/2.png")[0] == 404


@pytest.mark.slow
def test_memory_is_flat_over_200_drawings():
    with process() as server:
        server.ready()
        sizes = []
        for seed in range(200):
            at = server.end(server.draw(MEADOW, page="one", maps=True, seed=seed, steps=1)["id"])
            assert at["state"] == "done"
            sizes.append(server.memory())
        growth = max(sizes[150:]) - max(sizes[40:60])
        print(f"resident after 50 drawings {max(sizes[40:60]) >> 20} MiB, after 200 {max(sizes[150:]) >> 20} MiB")
        assert growth < 24 << 20


def test_a_number_of_a_query_is_clamped():
    assert [number_of(text, 0, 30) for text in ("12.5", "-1", "1e9", "inf", "nan")] == [12.5, 0, 30, 30, 0]
    with pytest.raises(RefusalError) as caught:
        number_of("soon" * 50, 0, 30)
    assert caught.value.args[0] == 422 and len(caught.value.args[1]) < 60


def test_the_model_is_told_and_a_drawing_that_is_not_there_is_not(client):
    assert client.json("GET", "/api/model")["state"] == "ready"
    assert refused(client.send("GET", "/api/drawings/0")) == 404
    id = client.draw(steps=700)["id"]
    assert client.json("GET", f"/api/drawings/{id}?wait=0.1")["state"] in ("waiting", "drawing")
    assert client.json("DELETE", f"/api/drawings/{id}")["id"] == id
    assert client.end(id)["state"] == "stopped"

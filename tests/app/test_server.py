"""The page's server by plain HTTP: who may speak to it, what it reads, and that its pictures are infer.py's."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

import torch
from support import ROOT
from support.app_server import SHEEP, Client, process
from support.painted import by_infer, record_of

from sgg_fast.app.server import make_app
from sgg_fast.app.studio import MAX_WAITING, Studio
from sgg_fast.data.formats import parse_scene_graphs
from sgg_fast.data.inputs import Item
from sgg_fast.drawing import Options
from sgg_fast.drawing.vocabulary import vocabulary
from sgg_fast.graph import SceneGraphError

MEADOW = {"objects": ["sheep", "grass", "sky"], "relationships": [[0, "standing on", 1], [2, "above", 1]]}


def refused(answer: tuple[int, bytes]) -> int:
    """The status of a 4xx, which says why."""
    status, body = answer
    assert 400 <= status < 500 and json.loads(body)["error"]
    return status


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/model"])
def test_a_foreign_host_or_origin_gets_nothing(client, path):
    assert refused(client.send("GET", path, Host="evil.example")) == 421
    assert refused(client.send("GET", path, Host=f"127.0.0.1.evil.example:{client.port}")) == 421
    assert refused(client.send("GET", path, Origin="http://evil.example")) == 403
    assert refused(client.send("GET", path, Origin="null")) == 403
    assert refused(client.send("GET", path, Origin=f"http://127.0.0.1:{client.port + 1}")) == 403
    assert client.send("GET", path, Host=f"localhost:{client.port}")[0] == 200
    assert client.send("GET", path, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_the_api_needs_the_token(client):
    reads = [("GET", "/api/model", None), ("GET", "/api/drawings/0", None), ("DELETE", "/api/drawings/0", None)]
    writes = [("POST", f"/api/{name}", {}) for name in ("graph", "file", "drawings")]
    for token in ("", "wrong", client.token + "x"):
        stranger = Client(client.host, client.port, token)
        assert [refused(stranger.send(*request)) for request in reads + writes] == [401] * 6


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


def test_a_body_without_end_is_cut_off(client):
    sent = []
    endless = (sent.append(0) or bytes(1 << 16) for _ in range(4_000))
    with contextlib.suppress(ConnectionError):
        assert refused(client.send("POST", "/api/graph", endless, Content_Type="application/json")) == 413
    assert len(sent) < 400
    assert client.send("GET", "/api/model")[0] == 200


def test_deep_nesting_is_an_error_of_its_reader(client):
    deep = {"json": "[" * 30_000 + "]" * 30_000}
    assert "nested too deeply" in client.json("POST", "/api/graph", deep)["error"]


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


def test_headers_of_every_answer_close_the_page(client):
    import http.client

    for path in ("/", "/main.js", "/api/model", "/nothing"):
        connection = http.client.HTTPConnection(client.host, client.port)
        connection.request("GET", path)
        answer = connection.getresponse()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["server"] is None
        connection.close()


@pytest.mark.parametrize(
    "text", ['{"objects": [], "relationships": []}', '{"objects": ["a"], "relationships": [[0, "on", 0, 1]]}',
             '{"objects": ["a"], "relationships": [[0, "on", 9]]}', '{"objects": ["__image__"]}', '{"objects": [7]}']
)  # fmt: skip
def test_errors_are_the_readers_words(client, text):
    with pytest.raises(SceneGraphError) as caught:
        parse_scene_graphs(json.loads(text), "JSON")
    assert client.json("POST", "/api/graph", {"json": text}) == {"error": str(caught.value)}


def test_words_and_json_are_read(client):
    found = client.json("POST", "/api/graph", {"text": "a sheep standing on grass; sky above grass"})
    assert found == {"graph": MEADOW, "text": "sheep (standing on) grass; sky (above) grass", "notices": []}
    assert client.json("POST", "/api/graph", {"json": json.dumps(found["graph"])}) == found
    twice = {**SHEEP, "relationships": [*SHEEP["relationships"], *SHEEP["relationships"], [1, "on", 1]]}
    found = client.json("POST", "/api/graph", {"json": json.dumps(twice)})
    assert found["graph"] == SHEEP
    assert found["notices"] == ["JSON: relationships[1]: left out: an exact duplicate",
                                "JSON: relationships[2]: left out: object 1 is related to itself"]  # fmt: skip


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


def test_what_a_model_was_trained_on_is_sorted_into_kinds():
    names = ["__image__", "__in_image__", "hat", "red hat", "sheep", "standing on", "left of", "wearing", "fire truck"]
    assert vocabulary(names) == {
        "objects": ["fire truck", "hat", "red hat", "sheep"],
        "predicates": ["left of", "standing on", "wearing"],
        "attributes": ["red"],
    }


def test_behind_a_proxy_the_public_name_is_known_and_no_token_asked():
    guard, name = make_app(Studio("toy"), None, "0.0.0.0", "me-space.hf.space"), "me-space.hf.space"
    assert guard.refusal("GET", "/api/model", {"host": name, "origin": f"https://{name}"})[0] == 0
    assert guard.refusal("GET", "/api/model", {"host": "other.hf.space"})[0] == 421
    assert b"https://huggingface.co" in dict(guard.headers)[b"content-security-policy"]


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sgg_fast.app", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_port_in_use_and_a_model_that_is_not_there_are_one_line(client):
    done = run("--port", str(client.port))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give another --port" in done.stderr
    done = run("--port", "0", "--model", "./nothing")
    assert done.returncode == 2 and "./nothing: no pipeline there" in done.stderr.splitlines()[-1]


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

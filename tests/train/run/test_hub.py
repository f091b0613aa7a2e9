"""--push-to-hub against a server on this machine that answers as the hub does and keeps what it gets."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import ROOT
from support.tiny_runs import flags, train

from sgg_fast.config import ConfigError
from sgg_fast.nn import loading
from sgg_fast.train.run.hub import _without_paths, check_hub, push


class Hub(BaseHTTPRequestHandler):
    """The hub's calls of one upload; every file is small enough to travel in the commit."""

    def log_message(self, *args):
        pass

    def _answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.calls.append(self.path)
        if self.server.refuses and "auth-check" in self.path:
            return self._answer({"error": "You don't have the rights"}, 403)
        return self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path)
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            return self._answer({"error": "You don't have the rights"}, 403)
        if self.path == "/api/repos/create":
            return self._answer({"url": f"http://{self.headers['Host']}/me/model"})
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        return self._answer({"errors": [], "warnings": []})  # validate-yaml


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.tokens, server.files, server.refuses = [], set(), {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, out, *more, token="hf_secret"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(out / "hf")}
    environment |= {"HF_TOKEN": token} if token else {}
    words = [sys.executable, "train.py", "--out", str(out), "--push-to-hub", "me/model", *more]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_result_is_uploaded_whole_with_its_card(hub, trained_run, tmp_path):
    """The run is complete already, so the command uploads, as it does after an upload that failed."""
    out = tmp_path / "run"
    shutil.copytree(trained_run, out)
    done = run(hub, out, "--stage", "finetune", *flags(sample_every=2))
    assert done.returncode == 0, done.stderr
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/model" in done.stdout
    folder = out / "finetune" / "pipeline"
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files == there and hub.tokens == {"Bearer hf_secret"} and "/api/repos/create" in hub.calls
    card = hub.files["README.md"].decode()
    for part in ("| data | toy |", "| finetune steps | 4 |", "| loss at chance | ", "![](samples.png)", "Not measured"):
        assert part in card
    last = (out / "finetune" / "samples" / "step-0000004.png").read_bytes()
    assert hub.files["samples.png"] == last


@pytest.mark.parametrize(
    ("token", "more", "reason"),
    [
        ("", [], "there is no token: type `hf auth login`, or set HF_TOKEN"),
        ("hf_x", ["--push-to-hub", "a/b/c"], "not a repository (OWNER/NAME)"),
        ("hf_x", ["--stage", "pretrain"], "pre-training leaves no pipeline: push from --stage finetune"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_anything_runs(hub, tmp_path, token, more, reason):
    done = run(hub, tmp_path, "--stage", "finetune", *more, token=token)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: --push-to-hub ") and reason in done.stderr
    assert not hub.calls and not (tmp_path / "finetune").exists()


def test_a_repository_of_others_is_refused_before_anything_runs(hub, tmp_path):
    hub.refuses = True
    done = run(hub, tmp_path, "--stage", "finetune")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--push-to-hub me/model: " in done.stderr
    assert "403" in done.stderr and "auth-check" in hub.calls[-1] and not (tmp_path / "finetune").exists()


def test_the_base_of_a_lora_is_named_without_its_folder(tmp_path):
    result = train(tmp_path / "run", "finetune", lora=2, finetune_steps=1)
    index = json.loads((result / "model_index.json").read_text())
    index["base"] = {"model": str(tmp_path / "models" / "sd"), "clip": "openai/clip-vit-base-patch32"}
    (result / "model_index.json").write_text(json.dumps(index))
    copy = _without_paths(result, tmp_path / "aside")
    found = json.loads((copy / "model_index.json").read_text())
    assert found["base"] == {"model": "sd", "clip": "openai/clip-vit-base-patch32"}
    loading.check(copy)
    card = (copy / "README.md").read_text()
    assert "- lora" in card and "--base BASE" in card and str(tmp_path) not in card


def test_a_folder_is_uploaded_by_this_process_too(hub, tmp_path, monkeypatch):
    """The calls of train.py, and what they say where the hub refuses."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", address := f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X"}')
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    check_hub("me/model", "finetune")
    assert push(tmp_path, "me/model") == f"{address}/me/model"
    assert hub.files == {"model_index.json": b'{"_class_name": "X"}', "unet/config.json": b"{}"}
    assert hub.tokens == {"Bearer hf_own"}
    hub.refuses = True
    with pytest.raises(ConfigError, match=r"^--push-to-hub me/model: HfHubHTTPError: .*403") as caught:
        check_hub("me/model", "finetune")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"{tmp_path} is whole, and the same command uploads it"):
        push(tmp_path, "me/model")

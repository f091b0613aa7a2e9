"""`python -m sgg_fast.app`: its address, what it says while it starts, and what it cannot start with."""

from __future__ import annotations

import builtins
import functools
import os
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("starlette", reason="the page's server: starlette is not installed: pip install -e '.[app]'")

from support import ROOT

from sgg_fast.app import __main__ as app
from sgg_fast.app.studio import Studio


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sgg_fast.app", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_port_in_use_and_a_model_that_is_not_there_are_one_line(client):
    done = run("--port", str(client.port))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give another --port" in done.stderr
    done = run("--port", "0", "--model", "./nothing")
    assert done.returncode == 2 and "./nothing: no pipeline there" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "public", "expected"),
    [
        ("127.0.0.1", "", "http://127.0.0.1:80/#token=t"),
        ("0.0.0.0", "", "http://127.0.0.1:80/#token=t"),
        ("::", "", "http://127.0.0.1:80/#token=t"),
        ("::1", "", "http://[::1]:80/#token=t"),
        ("my-host", "", "http://my-host:80/#token=t"),
        ("0.0.0.0", "me.hf.space", "https://me.hf.space/"),
    ],
)
def test_the_address_can_be_opened_and_keeps_the_token_behind_a_hash(host, public, expected):
    assert app.address(host, 80, "t", public) == expected


def test_a_socket_listens_before_anything_is_loaded():
    with app.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(OSError, match="in use"):
            app.listen("127.0.0.1", port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_opens_loads_and_closes_at_a_signal(monkeypatch, request, capsys, number):
    """Ctrl-C or SIGTERM once the model is there: the signal closes the page and does nothing else."""
    monkeypatch.setenv("SGG_APP_TOKEN", "the-token")
    ready, report, passed_on = [], app.report, []

    def outer(number: int, _: object) -> None:
        passed_on.append(number)

    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, outer)))

    def reported(studio: Studio, server: object) -> None:
        report(studio, server)
        ready.append(studio.about()["state"])
        os.kill(os.getpid(), number)

    monkeypatch.setattr(app, "report", reported)
    assert app.main(["--model", "toy", "--port", "0"]) == 0 and ready == ["ready"]
    assert passed_on == [] and signal.getsignal(number) is outer
    out, err = capsys.readouterr()
    assert out.startswith("sgg-app: open http://127.0.0.1:") and out.endswith("/#token=the-token\n")
    loading, loaded = err.splitlines()[:2]
    assert loading == "sgg-app: Ctrl-C closes it; the model is being loaded"
    assert loaded == "sgg-app: ready, drawing with the toy model of this package"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--model", "./nothing", "--port", "0"], "--model ./nothing: no pipeline there"),
        (["--port", "99999"], "cannot listen at 127.0.0.1:99999: bind(): port must be 0-65535.; give another --port"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1:0: Cannot assign requested address; "),
    ],
)
def test_what_it_cannot_start_with_is_its_last_line(argv, reason, capsys):
    assert app.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"sgg-app: {reason}")


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch, capsys):
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "sgg_fast.app.server":
            raise ModuleNotFoundError("No module named 'starlette'", name="starlette")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert app.main([]) == 2
    assert capsys.readouterr().err.startswith("sgg-app: starlette is not installed: pip install ")

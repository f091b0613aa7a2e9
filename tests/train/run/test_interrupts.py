"""Signals before, after and around the steps: one line, the signal's exit code, no traceback. Real processes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT
from support.forks import heed_signals
from support.tiny_runs import flags

from sgg_fast.train.run.interrupts import (
    BadNumbers,
    LostProcess,
    Signalled,
    lost_process,
    stops_after_step,
    stops_at_once,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
UNTIL = """
import sys
sys.path.insert(0, {root!r})
from sgg_fast.commands import train as command
{patch}
sys.exit(command.main(sys.argv[1:]))
"""
WAITS = """
import builtins
real = builtins.__import__
def waiting(name, *more, **named):
    if name == {name!r}:
        print("here", flush=True)
        try:
            import time
            time.sleep(60)
        except BaseException as error:  # as libraries do around imports that are optional
            raise ImportError(name) from error
    return real(name, *more, **named)
builtins.__import__ = waiting
"""


def start(tmp_path, patch: str, *words: str) -> subprocess.Popen:
    code = UNTIL.format(root=str(ROOT), patch=patch)
    argv = ["--stage", "pretrain", "--out", str(tmp_path / "run"), *flags(pretrain_steps=1, resolution=32), *words]
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", ["sgg_fast.train.preflight", "sgg_fast.train.trainer"])
def test_a_signal_in_the_set_up_is_one_line_whatever_an_import_makes_of_exceptions(tmp_path, number, place):
    child = start(tmp_path, WAITS.format(name=place))
    assert child.stdout.readline() == "here\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    name = signal.Signals(number).name
    assert said == f"train.py: {name}: stopped; the same command continues from the last checkpoint\n"
    assert child.returncode == 128 + number


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """nohup starts a run so; its terminal may close."""
    child = start(tmp_path, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + WAITS.format(name="tqdm"))
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143


def test_the_handlers_before_are_back_afterwards(request):
    request.addfinalizer(functools.partial(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP)))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in SIGNALS]
    with stops_at_once("train.py"):
        outer = signal.getsignal(signal.SIGHUP)
        with stops_after_step() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught.number == signal.SIGHUP
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL, "a second one stops at once"
        assert signal.getsignal(signal.SIGHUP) is outer
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stdout_that_has_gone_takes_nothing_from_success(tmp_path, unbuffered):
    code = UNTIL.format(root=str(ROOT), patch="")
    read, write = os.pipe()
    os.close(read)
    argv = ["--stage", "pretrain", "--out", str(tmp_path / "run"), *flags(pretrain_steps=1, resolution=32)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 0 and "Broken pipe" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "pretrain" / "graph_encoder").is_dir()


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] "


@pytest.mark.parametrize(
    ("text", "what", "is_late"),
    [
        (GLOO + "Connection closed by peer [127.0.0.1]:4711", "died", False),
        (GLOO + "Timed out waiting 7000ms for recv", "did not answer for 7 s (--rank-timeout)", True),
    ],
)
def test_a_collective_that_fails_is_a_lost_process_only_among_several(monkeypatch, text, what, is_late):
    def fails(error: Exception) -> None:
        with lost_process(7.0):
            raise error

    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="gloo"):
        fails(RuntimeError(text))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LostProcess) as caught:
        fails(RuntimeError(text))
    assert str(caught.value).startswith(f"another process of this run {what}; this one stops. Its own message says why")
    assert (caught.value.is_late, caught.value.exit_code) == (is_late, 4)
    for other in (RuntimeError("shapes differ"), ValueError("gloo")):
        with pytest.raises(type(other), match=str(other)):
            fails(other)


def test_a_stop_says_how_to_go_on_and_has_its_own_code():
    stopped = Signalled(signal.SIGTERM, 12)
    assert str(stopped) == "SIGTERM: stopped and saved at step 12; the same command continues"
    assert [stopped.exit_code, BadNumbers("x").exit_code, LostProcess.after(2.5).exit_code] == [143, 3, 4]

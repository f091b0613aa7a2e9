"""Every command, found by walking the project: --help, a mistyped flag, random flags. No traceback, one line, no wrong
in silence."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT
from support.cases.commands import main_of, names, parsers_of, random_line
from support.forks import heed_signals

COMMANDS = names()
CODES = {0, 1, 2, 3}
"""Done; found something wrong (a measuring command, the doctor); refused; numbers that are not finite."""
CPU_SECONDS = 3
"""A command that runs longer does real work, and is killed: its line was accepted."""
LOADED = ("sgg_fast.train.trainer", "sgg_fast.train.memory.advice", "sgg_fast.eval.evaluate", "sgg_fast.app.server",
          "sgg_fast.drawing.talk", "sgg_fast.drawing.jobs", "sgg_fast.data.prepare.cache", "sgg_fast.doctor.kernels",
          "benchmarks.quality.cells", "benchmarks.harness.plots")  # fmt: skip
"""What commands import when they are under way; imported once, before the forks."""


def test_the_walk_finds_what_people_type():
    assert {"train", "infer", "sgg_fast.app.__main__", "sgg_fast.doctor.__main__", "sgg_fast.eval.__main__",
            "sgg_fast.data.prepare.__main__", "sgg_fast.train.warmup", "benchmarks.run"} <= set(COMMANDS)  # fmt: skip
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_mistyped_flag(name, capsys):
    main = main_of(name)
    for words, parser in parsers_of(name):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        said = capsys.readouterr()
        assert ended.value.code == 0 and said.out.startswith("usage: ") and said.err == ""
        flag = max(parser._option_string_actions, key=len)
        with pytest.raises(SystemExit) as ended:
            main([*words, f"{flag}x", "1"])
        said = capsys.readouterr()
        meant = difflib.get_close_matches(f"{flag}x", list(parser._option_string_actions), n=1)[0]
        assert ended.value.code == 2 and said.out == ""
        assert said.err == f"{parser.prog}: no flag {flag}x (did you mean {meant}?); --help lists the flags\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_word_too_many_and_a_value_that_is_none_are_one_line(name, capsys):
    for words, parser in parsers_of(name):
        kinds = (None, str, Path)
        numbers = [action for action in parser._actions if action.type not in kinds and action.option_strings]
        for action in numbers[:4]:
            with pytest.raises(SystemExit) as ended:
                main_of(name)([*words, action.option_strings[-1], "many"])
            said = capsys.readouterr()
            assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
            assert said.err.startswith(f"{parser.prog}: ")


def test_progress_bars_are_for_terminals():
    """Every bar of ours says `disable`: None draws it on a terminal only."""
    calls = [
        (path, node)
        for top in ("sgg_fast", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tqdm", "trange")
    ]
    assert len(calls) > 5
    assert [f"{path}:{node.lineno}" for path, node in calls if not any(k.arg == "disable" for k in node.keywords)] == []


def furnish(folder: Path) -> None:
    """Files of the names that the random lines give."""
    graph = {"objects": ["sheep", "grass"], "relationships": [[0, "standing on", 1]]}
    (folder / "g.json").write_text(json.dumps(graph))
    (folder / "bad.json").write_bytes(b'{"objects": ["\xff"]}')
    (folder / "log.jsonl").write_text('{"step": "x"}\n')
    (folder / "rows.csv").write_text("ms_p50,device,commit,date\nx,NVIDIA,c,d\n")
    (folder / "folder").mkdir()
    Image.new("RGB", (64, 64), "white").save(folder / "folder" / "a.png")
    (folder / "folder" / "a.json").write_text(json.dumps(graph))


def _guard(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: the checkout is read-only for a command under attack."""
    if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        return
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate"):
        path = arguments[0]
        inside = isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(f"{ROOT}{os.sep}")
        if inside and "__pycache__" not in str(path):
            raise OSError(30, "Read-only file system", str(path))


def _child(name: str, words: list[str], folder: Path) -> None:
    os.setsid()
    heed_signals()
    os.chdir(folder)
    for descriptor, file in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (open(k, "w" if k else "r", closefd=False) for k in range(3))  # noqa: SIM115
    sys.argv = [name, *words]
    os.environ |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
                   "SGG_FAST_CACHE": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "cache")}  # fmt: skip
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
    sys.addaudithook(_guard)
    try:
        code = main_of(name)(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def run(name: str, words: list[str], folder: Path) -> tuple[int | None, str, str]:
    """(exit code, or None of one that was killed at its work; stdout; stderr) of a command in a fork."""
    pid = os.fork()
    if pid == 0:
        try:
            _child(name, words, folder)
        except BaseException:  # border: what the interpreter itself would print
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(70)
    end, status = time.monotonic() + 15 * CPU_SECONDS, 0
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its workers
    code = os.waitstatus_to_exitcode(status)
    return (None if code < 0 else code), *((folder / file).read_text(errors="replace") for file in ("stdout", "stderr"))


def fault(name: str, words: list[str], code: int | None, out: str, err: str, place: Path) -> str:
    """What is wrong with the way a command ended; "" for nothing."""
    lines = err.replace("\r", "\n").splitlines()
    if "Traceback" in err + out or not (code is None or code in CODES):
        return "a traceback or another exit code"
    if not all(line.isprintable() for line in lines):
        return "raw control characters"
    if code in (2, 3):
        notice = "sgg-app: Ctrl-C closes it; the model is being loaded"
        refusals = [line for line in lines if line.split(": ")[0] in _prefixes(name) and line != notice]
        return "" if len(refusals) == 1 and lines[-1] == refusals[0] else "not one line of refusal at the end"
    made = {path.name for path in place.iterdir()} - {"stdout", "stderr"}
    silent = code == 0 and not out.strip() and made <= {"g.json", "bad.json", "log.jsonl", "rows.csv", "folder"}
    return "nothing said and nothing made" if silent else ""


def attack(num: int, seed: int, folder: Path) -> dict[str, int]:
    """`num` random lines over all commands in turn; how they ended."""
    for module in LOADED:
        importlib.import_module(module)
    ends: dict[str, int] = {}
    faults = []
    for k in range(num):
        name, random_ = COMMANDS[k % len(COMMANDS)], random.Random(f"{seed} {k}")
        words, place = random_line(name, random_), folder / str(k)
        place.mkdir()
        furnish(place)
        code, out, err = run(name, words, place)
        if found := fault(name, words, code, out, err, place):
            faults.append(f"{found}: {name} {words}\nexit code {code}\n{out[-1000:]}\n{err[-3000:]}")
        print(f"{k} {name} {words}: {code}"[:300], flush=True)
        end = {None: "killed at work", 0: "done", 1: "found faults", 2: "refused", 3: "not finite"}.get(code, str(code))
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(place)
    print(f"{num} random lines over {len(COMMANDS)} commands: {ends}, {len(faults)} faults")
    assert not faults, "\n\n".join(faults)
    return ends


def _prefixes(name: str) -> set[str]:
    short = name.removesuffix(".__main__")
    own = {short, f"{short}.py", short.rpartition(".")[2], short.removeprefix("sgg_fast."), f"python -m {short}",
           f"sgg-{short.rpartition('.')[2]}", short.removeprefix("benchmarks.")}  # fmt: skip
    return own | {parser.prog for _, parser in parsers_of(name)}


def test_some_random_lines_over_all_commands(tmp_path):
    ends = attack(len(COMMANDS), 0, tmp_path)
    assert ends["refused"] > 3


@pytest.mark.slow
def test_two_hundred_random_lines_over_all_commands(tmp_path):
    ends = attack(200, 1, tmp_path)
    assert ends["refused"] > 50 and sum(ends.values()) == 200

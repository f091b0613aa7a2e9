"""How commands end: exit codes and one line on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
from support import ROOT

from sgg_fast.commands import NotFiniteError, command, refuse, tell, typed


def run(error: BaseException | None = None, code: int | None = None, **settings) -> int:
    @command("name", **settings)
    def main(argv: list[str] | None) -> int | None:
        """What it does."""
        if error:
            raise error
        return code

    assert main.__doc__ == "What it does."
    return main(["--flag"])


@pytest.mark.parametrize(("code", "exit_code"), [(None, 0), (0, 0), (1, 1)])
def test_the_code_of_the_body_is_the_exit_code(code, exit_code, capsys):
    assert run(code=code) == exit_code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (ValueError("no such\n  thing"), 2, "name: no such thing\n"),
        (FileNotFoundError(2, "gone", "a.json"), 2, "name: [Errno 2] gone: 'a.json'\n"),
        (NotFiniteError("NaN in\n a picture"), 3, "name: NaN in a picture\n"),
        (KeyboardInterrupt(), 130, "name: interrupted; it goes on\n"),
    ],
)
def test_what_users_can_mend_is_one_line(error, exit_code, line, capsys):
    assert run(error, interrupted="it goes on") == exit_code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("bug"), SystemExit(3)])
def test_bugs_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)):
        run(error)
    with pytest.raises(ValueError, match="bug"):
        run(ValueError("bug"), refused=(OSError,))
    assert capsys.readouterr().err == ""


def test_the_module_that_is_the_program_runs_its_command(tmp_path):
    """Once, with the words of the command line; imported it does not run."""
    body = '@command("x")\ndef main(argv):\n    print("ran")\n    return 4\n'
    (tmp_path / "program.py").write_text(f"from sgg_fast.commands import command\n\n\n{body}")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    for words, code, out in ((["-m", "program"], 4, "ran\n"), (["-c", "import program"], 0, "")):
        done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, out, "")


def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_refusal_is_one_line(capsys):
    assert refuse("x", "a\nb") == 2
    assert capsys.readouterr().err == "x: a b\n"
    assert refuse("x", "a\x1b[2Jb" + "c" * 5000, code=7) == 7
    said = capsys.readouterr().err
    assert said.startswith("x: a\\x1b[2Jbc") and len(said) == len("x: \n") + 2000


@pytest.mark.parametrize(
    ("script", "words"),
    [("/venv/bin/sgg-train", ["sgg-infer"]), ("train.py", ["python", "infer.py"]), ("", ["python", "infer.py"])],
)
def test_the_next_command_is_typed_as_this_one(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert typed("infer") == words


def test_installed_commands_are_those_of_the_scripts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, place in project["scripts"].items():
        module, function = place.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function)), name
    for script in ("train", "infer"):
        module = project["scripts"][f"sgg-{script}"].split(":")[0]
        assert f"from {module} import main" in (ROOT / f"{script}.py").read_text()


def test_a_result_is_told_on_stdout_at_once(capsys):
    tell("saved a.png")
    assert capsys.readouterr() == ("saved a.png\n", "")


@pytest.mark.parametrize("say", [tell, print], ids=["told", "left for the end"])
def test_a_reader_that_exits_costs_the_output_and_not_the_work(say, monkeypatch, capsys):
    """A pipe without a reader: the system itself refuses what is written."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    done = []

    @command("name")
    def main(argv: list[str] | None) -> None:
        say("a result")
        done.append("the work after it")

    assert main([]) == 0 and done == ["the work after it"]
    assert sys.stdout.name == os.devnull and capsys.readouterr().err == ""
    os.dup2(sys.stdout.fileno(), writer)  # the stream writes its rest as it is closed
    stream.close()
    sys.stdout.close()

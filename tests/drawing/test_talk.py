"""What infer.py says: results on stdout; the model, its reading of the words, warnings and a bar on stderr."""

from __future__ import annotations

import io
import os
import sys

import pytest

from sgg_fast.data.inputs import Item
from sgg_fast.data.text_form import parse_text
from sgg_fast.drawing import Options, load_model, make_jobs
from sgg_fast.drawing.talk import Talk


def test_a_bar_is_shown_in_a_terminal_and_tells_the_time_that_remains(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        with Talk(quiet).progress(4) as progress:
            for _ in range(8):
                progress(0.25)
        assert ("4 pictures" in stream.getvalue() and "to go" in stream.getvalue()) is not quiet


def test_it_begins_with_the_model_the_reading_of_words_and_the_warnings(tmp_path, capsys):
    model = load_model("toy")
    items = [
        Item(parse_text("zeppelin on grass"), "words", typed=True),
        Item(parse_text("sheep on grass"), "p-again", {"weights": "others"}),
    ]
    jobs = make_jobs(items, model, Options(out=tmp_path, steps=1, relation_guidance=2))
    capsys.readouterr()  # what the libraries say of loading
    Talk(quiet=False).begin(items, jobs, model)
    out, err = capsys.readouterr()
    first, read, other, unseen = err.splitlines()[:4]
    assert (out, first) == ("", "model: the toy model of this package")
    assert read == "read as: zeppelin (on) grass"
    assert other == "p-again: drawn with other weights than the toy model of this package: it will differ"
    assert unseen.startswith("words that the model never saw in training: ") and "zeppelin in words" in unseen
    Talk(quiet=True).begin(items, jobs, model)
    assert capsys.readouterr() == ("", "")


def test_words_that_were_read_as_one_long_name_are_pointed_out(tmp_path, capsys):
    model = load_model("toy")
    items = [Item(parse_text("sheep frobs grass"), "w", typed=True)]
    Talk(quiet=False).begin(items, make_jobs(items, model, Options(out=tmp_path, steps=1)), model)
    assert 'read as: sheep frobs grass ("sheep frobs grass" is one object)\n' in capsys.readouterr().err


def test_a_line_is_plain_text_and_an_empty_one_is_none(capsys):
    talk = Talk(quiet=False)
    talk.say("a\x1b[2Jb")
    talk.say("")
    Talk(quiet=True).say("nothing")
    assert capsys.readouterr() == ("", "a\\x1b[2Jb\n")


def test_a_result_is_a_line_on_stdout_also_when_quiet(capsys):
    Talk(quiet=True).result("outputs/a.png")
    assert capsys.readouterr() == ("outputs/a.png\n", "")


def test_a_full_disk_is_one_line_and_a_reader_that_exits_is_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(open("/dev/full", "wb", buffering=0)))  # noqa: SIM115
    with pytest.raises(OSError, match=r"^standard output: cannot be written: No space left on device$"):
        Talk(quiet=False).result("a.png")
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0)))
    Talk(quiet=False).result("a.png")
    assert sys.stdout.name == os.devnull
    sys.stdout.close()

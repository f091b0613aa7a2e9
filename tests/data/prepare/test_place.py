"""The output folder of a preparation: one writer, no set lost unasked, leftovers replaced, a report of each refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgg_fast.data.prepare.place import preparing
from sgg_fast.data.prepare.records import PrepareError
from sgg_fast.data.prepare.report import Report
from sgg_fast.files import ASIDE, InUseError, locked

RESULTS = ("a.txt", "report.json", "mark")


def write(out: Path, text: str, overwrite: bool = False, fault: Exception | None = None, names=RESULTS) -> None:
    """A preparation that writes `text` to every file of `names` and may fail."""
    report = Report({}, {"train": None})
    with preparing(out, RESULTS, overwrite, report):
        report.drop_image("train", 7, text)
        if fault:
            raise fault
        for name in names:
            (out / name).write_text(text)


def held(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in RESULTS if (out / name).exists()}


def test_a_set_is_replaced_only_on_purpose_and_remains_of_a_killed_run_unasked(tmp_path):
    out = tmp_path / "out"
    write(out, "one")
    with pytest.raises(PrepareError, match=r"already holds a set; --overwrite .*there: a\.txt, report\.json, mark\)"):
        write(out, "two")
    assert held(out) == dict.fromkeys(RESULTS, "one")
    write(out, "two", overwrite=True)
    assert held(out) == dict.fromkeys(RESULTS, "two")
    (out / "mark").unlink()  # files that no killed run of ours explains
    with pytest.raises(PrepareError, match="already holds a set"):
        write(out, "three")
    (out / f"{ASIDE}1").mkdir()
    write(out, "three")
    assert held(out) == dict.fromkeys(RESULTS, "three")


def test_a_refusal_leaves_its_report_which_is_no_set(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PrepareError, match=rf"^none fits; what was read and left out is in {out}/report\.json$"):
        write(out, "too small", fault=PrepareError("none fits"))
    assert json.loads((out / "report.json").read_text())["dropped_images"] == {"train": {"too small": [7]}}
    write(out, "whole")
    with pytest.raises(PrepareError, match=r"is in .*/refused\.json$"):
        write(out, "too large", overwrite=True, fault=PrepareError("none fits"))
    assert held(out) == dict.fromkeys(RESULTS, "whole")
    assert "too large" in (out / "refused.json").read_text()
    with pytest.raises(OSError, match=r"^disk$"):
        write(tmp_path / "other", "", fault=OSError("disk"))
    assert held(tmp_path / "other") == {}, "a report is of what was read, not of the machine"


def test_one_writer_and_what_is_no_place_at_all(tmp_path):
    report = Report({}, {"train": None})
    second = pytest.raises(InUseError, match="in use by process")
    with preparing(tmp_path / "out", RESULTS, False, report), second, locked(tmp_path / "out"):
        raise AssertionError
    (tmp_path / "file").write_text("")
    for out, images, said in (
        (tmp_path / "file", None, "file: is a file; give a folder"),
        (tmp_path / "new", tmp_path / "none", "--images .*none: there is no such folder"),
    ):
        with pytest.raises(PrepareError, match=said), preparing(out, RESULTS, False, report, images):
            raise AssertionError
    assert not (tmp_path / "new").exists()

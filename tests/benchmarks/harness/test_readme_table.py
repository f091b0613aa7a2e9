"""Generated tables of the README: printed, written between their markers, compared."""

from __future__ import annotations

import pytest

from benchmarks.harness import readme_table
from benchmarks.harness.readme_table import ReadmeTable, markdown

FIRST = "<!-- small: python -m benchmarks.counts.small --write -->"
TABLE = ReadmeTable("counts.small", "small", lambda: "| a |")


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{FIRST}\nold\n<!-- end of small -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(readme_table, "README", path)
    return path


def test_a_table_is_printed_compared_and_written_between_its_markers(readme, capsys):
    main = TABLE.main("What it counts.")
    expected = f"{FIRST}\n\n| a |\n\n<!-- end of small -->"
    old = readme.read_text()
    assert main([]) == 0 and capsys.readouterr().out == f"{expected}\n"
    assert main(["--check"]) == 1 and readme.read_text() == old
    assert "README.md differs" in capsys.readouterr().out
    assert main(["--write"]) == 0 and readme.read_text() == f"before\n{expected}\nafter\n"
    assert main(["--check"]) == 0 and "README.md holds" in capsys.readouterr().out


def test_a_readme_without_markers_is_not_written(readme):
    readme.write_text("text\n")
    assert TABLE.committed() == ""
    with pytest.raises(AssertionError, match="has no markers"):
        TABLE.main("What it counts.")(["--write"])
    assert readme.read_text() == "text\n"


def test_a_table_in_markdown():
    assert markdown(["a", "b"], [["1", "2"], ("3", "")]) == ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 |  |"]

"""How a command refuses bad input: one line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

GRAPH = {"objects": ["sky", "sheep"], "relationships": [[0, "above", 1]]}


def files(folder: Path) -> list[str]:
    """Paths of everything below `folder`."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def refused(main: Callable[[list[str]], int], argv: list[str], capsys: Any, folder: Path, reason: str) -> None:
    """`main(argv)` exits with 2 and one line that holds `reason`, and leaves `folder` as it was."""
    before = files(folder)
    code = main(argv)
    out, err = capsys.readouterr()
    name = main.__module__.rpartition(".")[2]
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{name}.py:")]
    assert code == 2
    assert len(said) == 1 and reason in said[0], err
    assert "Traceback" not in err and out == ""
    assert files(folder) == before

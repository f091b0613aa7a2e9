"""Generated tables in kernels/README.md: a program writes the text between two markers."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

README = pathlib.Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in (header, *rows))
    return [first, "|" + "---|" * len(header), *rest]


@dataclasses.dataclass(frozen=True)
class ReadmeTable:
    """One program's table in the README."""

    module: str
    """Module of benchmarks; the first marker contains its command."""
    name: str
    """Name in the second marker."""
    body: Callable[[], str]

    @property
    def command(self) -> str:
        """The command that writes it."""
        return f"python -m benchmarks.{self.module} --write"

    def section(self) -> str:
        """The expected text in the README, markers included."""
        return f"<!-- {self.name}: {self.command} -->\n\n{self.body()}\n\n<!-- end of {self.name} -->"

    def committed(self) -> str:
        """The committed text in the README; empty if the markers are missing."""
        text, last = README.read_text(encoding="utf-8"), f"<!-- end of {self.name} -->"
        begin, end = text.find(f"<!-- {self.name}: {self.command} -->"), text.find(last)
        return "" if begin < 0 or end < 0 else text[begin : end + len(last)]

    def main(self, description: str, argv: list[str] | None = None) -> int:
        """Print, --write or --check; exit status 1 if --check finds another table."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.module}", description=description)
        parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
        parser.add_argument("--check", action="store_true", help="compare with kernels/README.md")
        args = parser.parse_args(argv)
        made, old = self.section(), self.committed()
        if args.write:
            assert old, f"{README} has no markers"
            README.write_text(README.read_text(encoding="utf-8").replace(old, made), encoding="utf-8")
        elif args.check:
            if made != old:
                print(f"{README.name} differs from what the code counts; {self.command}")
                return 1
        else:
            print(made)
        return 0

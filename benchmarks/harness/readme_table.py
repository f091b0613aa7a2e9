"""Generated tables in kernels/README.md: a program writes the text between two markers."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

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
    def typed(self) -> str:
        """The command that writes it."""
        return f"python -m benchmarks.{self.module} --write"

    def section(self) -> str:
        """The expected text in the README, markers included."""
        return f"<!-- {self.name}: {self.typed} -->\n\n{self.body()}\n\n<!-- end of {self.name} -->"

    def committed(self) -> str:
        """The committed text in the README; empty if the markers are missing."""
        text, last = README.read_text(encoding="utf-8"), f"<!-- end of {self.name} -->"
        begin, end = text.find(f"<!-- {self.name}: {self.typed} -->"), text.find(last)
        return "" if begin < 0 or end < 0 else text[begin : end + len(last)]

    def main(self, description: str) -> Callable[..., int]:
        """The program's `main(argv)`: print, --write or --check; exit status 1 if --check finds another table."""
        return command(f"benchmarks.{self.module}")(lambda argv: self._run(description, argv))

    def _run(self, description: str, argv: list[str] | None) -> int:
        parser = OneLineParser(prog=f"python -m benchmarks.{self.module}", description=description)
        parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
        parser.add_argument("--check", action="store_true", help="compare with kernels/README.md")
        args = parser.parse_args(argv)
        if args.write or args.check:
            return self.put(args.write)
        print(self.section())
        return 0

    def put(self, write: bool) -> int:
        """Put the table into the README, or only compare; exit status 1 if the README has another one."""
        made, old = self.section(), self.committed()
        if write:
            assert old, f"{README} has no markers"
            README.write_text(README.read_text(encoding="utf-8").replace(old, made), encoding="utf-8")
        elif made != old:
            print(f"{README.name} differs from what the code counts; {self.typed}")
            return 1
        else:
            print(f"{README.name} holds what the code counts")
        return 0

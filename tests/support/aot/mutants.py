"""Plants faults in compiled kernels, one at a time, and says which ones the PTX machine or the comparison catches.

A program of its own, since Triton must not be the interpreter: python tests/support/aot/mutants.py KIND CASE...
prints a JSON list of [case, kernel, line of the PTX, what caught it or ""].
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch

from benchmarks.aot.ptx.cases import small_cases
from benchmarks.aot.ptx.host import Host
from benchmarks.aot.ptx.program import PtxError

MUTATIONS = {
    "barrier": (r"\tbar\.sync[^;]*;", ""),
    "off by one": (r"(setp)\.lt(\.[su]32 \t%p\d+, %r\d+, (?P<bound>%r\d+);)", r"\1.le\2"),
    "stride": (r"(mul\.wide\.[su]32 \t%rd\d+, %r\d+), (2|4|6|8);", r"\1, 12;"),
}
"""Kind -> (what is looked for, what stands in its place): a barrier left out, a mask that lets one element more in
(all comparisons with one bound at once), an element's size that is not its own."""


class Planting(Host):
    """A host that runs a changed text of one kernel."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.texts: dict[str, str] = {}
        """Text -> what runs in its place; itself until a fault is planted."""

    def text_of(self, compiled: Any) -> str:
        text = compiled.asm["ptx"]
        return self.texts.setdefault(text, text)


def outcome(run) -> str:
    """What caught a fault, "" where nothing did."""
    try:
        run()
    except PtxError as error:
        return f"machine: {str(error).splitlines()[0]}"
    except AssertionError as error:
        return f"result: {str(error).splitlines()[0]}"
    return ""


def plant(kind: str, names: list[str]) -> list[tuple[str, str, str, str]]:
    """Every place of a kind in every kernel of the cases."""
    pattern, instead = MUTATIONS[kind]
    found = []
    torch.set_num_threads(1)
    host = Planting("sm_89")
    with host.taking_over():
        for name in names:
            host.texts.clear()
            run = small_cases()[name]
            run()
            for text in list(host.texts):
                kernel = re.search(r"\.entry\s+(\w+)", text)[1]
                places: dict[object, list[re.Match]] = {}
                for m in re.finditer(pattern, text):
                    places.setdefault(m.groupdict().get("bound", m.start()), []).append(m)
                for together in places.values():
                    changed = text
                    for m in reversed(together):
                        changed = changed[: m.start()] + m.expand(instead) + changed[m.end() :]
                    host.texts[text] = changed
                    found.append((name, kernel, together[0][0].strip(), outcome(run)))
                    host.fresh.forget()
                host.texts[text] = text
    return found


if __name__ == "__main__":
    print(json.dumps(plant(sys.argv[1], sys.argv[2:])))

"""Report of a preparation: kept and skipped items counted by filter, faults listed one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

REPORT = "report.json"
REFUSED = "refused.json"
"""Report of a failed preparation, beside an earlier set with its own report."""
MAX_LISTED = 1000
"""Most listed faults of one reason; further ones are only counted."""
MAX_SHOWN = 8
"""Most names shown of a difference between vocabularies."""


class Report:
    """Counts of a run. Every object, relation and image counts once, under the first reason that applies."""

    def __init__(self, options: Mapping[str, Any], paper: Mapping[str, int | None]) -> None:
        self.options, self.paper = dict(options), dict(paper)
        self.listed: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.dropped: dict[str, dict[str, list[Any]]] = {split: {} for split in paper}
        self.read_parts: Counter[str] = Counter()
        self.parts: dict[str, Counter[str]] = {"objects": Counter(), "relations": Counter()}
        self.notes: dict[str, Any] = {}
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.fault_counts: Counter[tuple[str, str]] = Counter()
        self.vocabulary: dict[str, Any] = {}
        self.warnings: list[str] = []

    def drop_image(self, split: str, image: Any, reason: str) -> None:
        """Count an image of the splits that is not in the result."""
        self.dropped[split].setdefault(reason, []).append(image)

    def drop(self, part: str, reason: str) -> None:
        """Count an object or a relation skipped by a filter or for a fault."""
        self.parts[part][reason] += 1

    def fault(self, file: str, where: str, reason: str) -> None:
        """Record a fault: an unusable record or part of a record."""
        self.fault_counts[file, reason] += 1
        named = self.faults.setdefault((file, reason), [])
        if len(named) < MAX_LISTED:
            named.append(where)

    def document(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "options": self.options,
            "images": {
                split: {
                    "listed": self.listed[split],
                    "kept": self.kept[split],
                    "paper": self.paper[split],
                    "dropped": {reason: len(ids) for reason, ids in self.dropped[split].items()},
                }
                for split in self.paper
            },
            **{
                part: {
                    "read": self.read_parts[part],
                    "kept": self.read_parts[part] - sum(dropped.values()),
                    "dropped": dict(dropped),
                }
                for part, dropped in self.parts.items()
            },
            "notes": self.notes,
            "vocabulary": self.vocabulary,
            "warnings": self.warnings,
            "faults": [
                {"file": file, "reason": reason, "count": self.fault_counts[file, reason], "where": where}
                for (file, reason), where in self.faults.items()
            ],
            "dropped_images": self.dropped,
        }

    def text(self) -> str:
        """report.json as text; ASCII, so that values with lone surrogates can be written."""
        return json.dumps(self.document(), indent=1) + "\n"

    def why(self, split: str = "train") -> str:
        """One line with the reasons for skipped images of a split, down to the parts and records."""
        reasons = [f"{len(ids)} {reason}" for reason, ids in self.dropped[split].items()] or ["none is listed"]
        for part, dropped in self.parts.items():
            most = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(3))
            reasons += [f"of {self.read_parts[part]} {part} left out: {most}"] if most else []
        named = [(at[0], reason) for (_, reason), at in self.faults.items()]
        reasons += [f"{at}: {reason}" for at, reason in named if not any(reason in text for text in reasons)][:3]
        return "; ".join(reasons)

    def table(self) -> str:
        """The report as a table for a terminal, without the lists."""
        splits = list(self.paper)
        reasons = list(dict.fromkeys(reason for split in splits for reason in self.dropped[split]))
        rows = [["images", *splits], ["listed in the splits", *(str(self.listed[s]) for s in splits)]]
        rows += [[f"- {reason}", *(str(len(self.dropped[s].get(reason, []))) for s in splits)] for reason in reasons]
        rows.append(["kept", *(str(self.kept[s]) for s in splits)])
        if any(self.paper.values()):
            rows.append(["the paper's count", *(str(self.paper[s]) for s in splits)])
        lines = _columns(rows)
        for part, dropped in self.parts.items():
            read = self.read_parts[part]
            if not read:
                continue
            rows = [[f"{part} read", str(read)]]
            rows += [[f"- {reason}", str(count)] for reason, count in dropped.items()]
            lines += ["", *_columns([*rows, ["kept", str(read - sum(dropped.values()))]])]
        if self.notes:
            lines += ["", *_columns([[name.replace("_", " "), str(count)] for name, count in self.notes.items()])]
        lines += ["", *self._vocabulary_lines()] if self.vocabulary else [""]
        for (file, reason), count in self.fault_counts.items():
            lines.append(f"fault in {file}: {reason}: {count} ({', '.join(self.faults[file, reason][:3])}"
                         f"{', ...' if count > 3 else ''})")  # fmt: skip
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _vocabulary_lines(self) -> list[str]:
        names, compared = self.vocabulary.get("names", {}), self.vocabulary.get("compared")
        lines = ["vocabulary: " + ", ".join(f"{count} {what}" for what, count in names.items())]
        for what, difference in (compared or {}).items():
            if difference["same"]:
                lines.append(f"{what}: as in {self.vocabulary['compared_with']}")
                continue
            lines.append(
                f"{what}: differ from {self.vocabulary['compared_with']}: missing {_few(difference['missing'])}; "
                f"extra {_few(difference['extra'])}" + ("; another order" if difference["reordered"] else "")
            )
        return lines


def _few(names: list[str]) -> str:
    if not names:
        return "none"
    rest = f", ... ({len(names)})" if len(names) > MAX_SHOWN else ""
    return ", ".join(repr(name) for name in names[:MAX_SHOWN]) + rest


def _columns(rows: list[list[str]]) -> list[str]:
    """Lines of a table: first column left aligned, the others right aligned."""
    if not rows:
        return []
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths,
            strict=True))) for row in rows]  # fmt: skip

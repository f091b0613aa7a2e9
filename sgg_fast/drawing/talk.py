"""What infer.py says: results on stdout; on stderr what it understood, what may disappoint, how long it will take."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from sgg_fast.data.inputs import Item
from sgg_fast.data.text_form import to_text
from sgg_fast.drawing.jobs import Job, Progress
from sgg_fast.drawing.models import Model, unseen_notice, untaught_notice


class Talk:
    """One line a matter, results apart; nothing but results when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        if line and not self.quiet:
            print(line, file=sys.stderr)

    def begin(self, items: Sequence[Item], jobs: Sequence[Job], model: Model) -> None:
        """The model, the reading of graphs given in words, and what to expect little of."""
        model.pipeline.set_progress_bar_config(disable=True)
        self.say("; ".join(filter(None, (f"model: {model.description}", model.notice))))
        for item in items:
            if item.typed:
                self.say(f"read as: {to_text(item.graph)}")
            if item.settings.get("weights", model.weights) != model.weights:
                self.say(f"{item.stem}: drawn with other weights than {model.description}: it will differ")
        self.say(unseen_notice(model.pipeline, [item.graph for item in items]))
        self.say(untaught_notice(model.pipeline, max(job.record["relation_guidance"] for job in jobs)))

    def result(self, line: str) -> None:
        """A line on stdout, above the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, num_pictures: int) -> Iterator[Progress]:
        """A bar of the whole command with the time that remains; none where stderr is no terminal."""
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
        off = self.quiet or not sys.stderr.isatty()
        what = f"{num_pictures} pictures" if num_pictures > 1 else "drawing"
        with tqdm(total=num_pictures, desc=what, bar_format=form, disable=off, leave=False, file=sys.stderr) as bar:
            yield bar.update

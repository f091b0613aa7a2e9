"""Messages of infer.py: results on stdout; on stderr its reading of the input, warnings and the remaining time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from sgg_fast.data.inputs import Item
from sgg_fast.data.text_form import to_text
from sgg_fast.diffusion.limits import late_start
from sgg_fast.drawing.jobs import Job, Progress
from sgg_fast.drawing.models import Model, made_scheduler
from sgg_fast.drawing.notices import notice_lines, untaught_notice
from sgg_fast.graph import SceneGraph, plain


class Talk:
    """One line for each message, apart from results; only results when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        if line and not self.quiet:
            print(plain(line), file=sys.stderr)

    def begin(self, items: Sequence[Item], jobs: Sequence[Job], model: Model) -> None:
        """Print the model, the reading of graphs given in words, and the warnings."""
        model.pipeline.set_progress_bar_config(disable=True)
        self.say("; ".join(filter(None, (f"model: {model.description}", model.notice))))
        for item in items:
            if item.typed:
                self.say(f"read as: {_reading(item.graph)}")
            if item.settings.get("weights", model.weights) != model.weights:
                self.say(f"{item.stem}: drawn with other weights than {model.description}: it will differ")
        if not self.quiet:
            graphs = {graph: stem for stem, graph in reversed([(job.path.stem, job.graph) for job in jobs])}
            for line in notice_lines(model.pipeline, {stem: graph for graph, stem in reversed(graphs.items())}):
                self.say(line)
        self.say(untaught_notice(model.pipeline, max(job.record["relation_guidance"] for job in jobs)))
        for name, steps in dict.fromkeys((job.record["scheduler"], job.record["steps"]) for job in jobs):
            self.say(late_start(made_scheduler(model.pipeline, name), steps))
        if jobs[0].variant > 1:
            self.say(f"pictures of other settings have these names and stay: the new ones end in -v{jobs[0].variant}")

    def result(self, line: str) -> None:
        """Print a line on stdout, above the bar; if the reader has closed stdout, drawing continues."""
        try:
            tqdm.write(plain(line) if sys.stdout.isatty() else line, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # The buffer's rest would otherwise be written, and fail, once more when the interpreter exits.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            raise OSError(f"standard output: cannot be written: {error.strerror}") from error

    @contextlib.contextmanager
    def progress(self, num_pictures: int) -> Iterator[Progress]:
        """A bar of the whole command with the remaining time; none if stderr is not a terminal."""
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
        off = self.quiet or not sys.stderr.isatty()
        what = f"{num_pictures} pictures" if num_pictures > 1 else "drawing"
        with tqdm(total=num_pictures, desc=what, bar_format=form, disable=off, leave=False, file=sys.stderr) as bar:
            yield bar.update


def _reading(graph: SceneGraph) -> str:
    """The graph in one line; marks words that could be a relation but were read as part of one object's name."""
    whole = [name for name, num in Counter(graph.objects).items() if num == 1 and len(name.split()) > 2]
    return to_text(graph) + "".join(f' ("{name}" is one object)' for name in whole)

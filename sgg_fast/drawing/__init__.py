"""From scene graphs to PNG files: models, jobs, sheets. infer.py calls it; the same from Python:

>>> from sgg_fast.data.inputs import read_inputs
>>> from sgg_fast.drawing import Options, draw_jobs, load_model, make_jobs
>>> items = read_inputs(["sheep standing on grass; sky above grass"])
>>> model, options = load_model("toy"), Options(steps=2, edits=("sheep -> horse",))
>>> for job in draw_jobs(make_jobs(items, model, options), model, options):
...     print(job.path, job.graph.objects, job.record["seed"])
outputs/sheep-standing-on-grass-sky-above-grass.png ('horse', 'grass', 'sky') 0
"""

from typing import TYPE_CHECKING, Any

from sgg_fast.drawing.edit import edited
from sgg_fast.drawing.options import Options, picture_paths

if TYPE_CHECKING:
    from sgg_fast.drawing.jobs import Job, Step, draw_grid, draw_jobs, make_jobs, make_records, sample, work
    from sgg_fast.drawing.models import SHIPPED, Model, load_model
    from sgg_fast.drawing.notices import graph_notices

__all__ = [
    "SHIPPED",
    "Job",
    "Model",
    "Options",
    "Step",
    "draw_grid",
    "draw_jobs",
    "edited",
    "graph_notices",
    "load_model",
    "make_jobs",
    "make_records",
    "picture_paths",
    "sample",
    "work",
]


def __getattr__(name: str) -> Any:
    """Import the parts that need models on first use: their libraries take seconds, too long for an error message."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sgg_fast.drawing import jobs, models, notices

    return next(getattr(module, name) for module in (jobs, models, notices) if hasattr(module, name))

"""From scene graphs to PNG files: models, jobs, sheets. What infer.py calls; the same from Python:

>>> from sgg_fast.data.inputs import read_inputs
>>> from sgg_fast.drawing import Options, draw_jobs, load_model, make_jobs
>>> items = read_inputs(["sheep standing on grass; sky above grass"])
>>> model, options = load_model("toy"), Options(steps=2, edits=("sheep -> horse",))
>>> for job in draw_jobs(make_jobs(items, model, options), model, options):
...     print(job.path, job.graph.objects, job.record["seed"])
outputs/sheep-standing-on-grass-sky-above-grass.png ('horse', 'grass', 'sky') 0
"""

from sgg_fast.drawing.jobs import Job, OnStep, Step, draw_grid, draw_jobs, make_jobs, make_records, sample, work
from sgg_fast.drawing.models import SHIPPED, Model, find_pipeline, load_model, load_pipeline
from sgg_fast.drawing.options import Options, picture_paths

__all__ = [
    "SHIPPED",
    "Job",
    "Model",
    "OnStep",
    "Options",
    "Step",
    "draw_grid",
    "draw_jobs",
    "find_pipeline",
    "load_model",
    "load_pipeline",
    "make_jobs",
    "make_records",
    "picture_paths",
    "sample",
    "work",
]

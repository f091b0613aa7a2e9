"""Turns published annotation files into training sets: `python -m sgg_fast.data.prepare vg --root DIR --out DIR`."""

"""Published annotation files to training sets: `python -m sgg_fast.data.prepare vg --root DIR --out DIR`."""

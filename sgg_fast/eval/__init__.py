"""Measures how well pictures follow their graphs: metrics, floors and ceilings, for `python -m sgg_fast.eval`."""

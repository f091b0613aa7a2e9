"""First check of a new GPU, and the start of a bug report: `sgg-doctor`, or `python -m sgg_fast.doctor`."""

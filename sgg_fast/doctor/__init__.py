"""What to type first on a new GPU, and what a report begins with: `sgg-doctor`, or `python -m sgg_fast.doctor`."""

"""Triton kernels and their launchers: tensors in, tensors out. `reference/` is the readable form of each."""

"""Kernels of the flat optimiser: the step's decision, Adam in 32, 8 and 4 bits, and factored second moments."""

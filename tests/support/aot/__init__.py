"""Kernels, PTX and modules by hand, for the tests of compiled code."""

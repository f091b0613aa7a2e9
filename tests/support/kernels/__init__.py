"""Inputs and checks that the tests of kernels and of operators share."""
